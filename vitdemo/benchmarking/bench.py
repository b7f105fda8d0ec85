"""Measures one engine of a model in its own process, which is controlled over a pipe."""

import ctypes
import os
import pickle
import signal
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from threading import RLock

import torch
from tqdm import tqdm

from vitdemo.dataset.dataset import open_again
from vitdemo.engines.artifacts import Recipe, artifacts_root
from vitdemo.engines.contract import Engine
from vitdemo.engines.pipeline import gpu_joules
from vitdemo.engines.roof import Products, Shape
from vitdemo.errors import VitdemoError, reason_of
from vitdemo.machine import now, peak_memory_bytes, seconds_of

INPUTS = 4  # sets of pixels, used in rotation, so that the next set is not in the CPU's cache from its last use
EXPLORE_S = 1.0
ENERGY_S = 2.0  # a GPU updates its energy counter in steps of up to a tenth of a second
STABLE, LAST = 0.05, 3  # an engine is warm when the last 3 calls lie within this fraction of their median


class Failed(Exception):
    """A bench could not answer a request. The message is one line."""


class EngineBench:
    """One engine, measured by calls of ``step``, which compute one batch of random pixels."""

    def __init__(self, engine: Engine):
        self.engine = engine
        engine.streams = 1  # single calls are timed, and the predictions must come from the same form
        self._pixels: torch.Tensor | None = None
        self._turn = count()

    def facts(self) -> dict:
        """The facts about the engine for its rows."""
        engine = self.engine
        known = {name: getattr(engine, name) for name in ("load_s", "device", "threads", "streams")}
        return known | {"build_s": engine.card.get("build_s"), "artifact": engine.card["key"]}

    def precision_ran(self) -> dict[str, float]:
        """The engine's ``precision_ran``; requested after the first timed calls, because it runs an image."""
        return self.engine.precision_ran

    def first_call(self, device_batch_size: int) -> float:
        """The seconds of a call on new pixels of this batch size, which later calls use too."""
        self._pixels = self.engine.info.random_pixels(INPUTS, device_batch_size, pinned=self.engine.device == "cuda")
        return self.step()

    def step(self) -> float:
        """The seconds of one call."""
        return seconds_of(self.engine, self._pixels[next(self._turn) % INPUTS])

    def warm_up(self, seconds: float) -> float:
        """Call until the last few calls take equally long, or about ``seconds`` are over; return the seconds taken."""
        return sum(until_stable(self.step, seconds))

    def turn(self, seconds: float) -> list[float]:
        """The seconds of each call; calls continue until ``seconds`` are filled, and there is at least one.

        If calls are short, a first one, which warms caches and threads, is not counted.
        """
        first = self.step()
        taken = [first] if first > seconds / 4 else []
        while not taken or sum(taken) < seconds:
            taken.append(self.step())
        return taken

    def logits(self) -> torch.Tensor:
        """The logits of the current random pixels, float32[N, C]."""
        return torch.cat([self.engine(x) for x in self._pixels])

    def answers(self, address: tuple, images: int) -> dict:
        """Evaluate the first ``images`` of the data set of an ``address``.

        Returns ``images``, ``top1``, ``calibrated_on_scored``, and ``answers``, the predicted class indices.
        """
        from vitdemo.evaluation.evaluation import evaluate  # imported here: the import takes longer than most calls

        found = evaluate(self.engine, open_again(address), limit=images, progress=False)
        known = {name: found.metrics[name] for name in ("images", "top1", "calibrated_on_scored")}
        return known | {"answers": found.rows["predicted_1"].fillna(-1).astype(int).tolist()}

    def peak_memory_bytes(self) -> int | None:
        """The process's largest resident size since the engine was ready; on CUDA, torch's largest use of GPU memory.

        None where the system does not report it. The weights of `inductor` on CUDA are not in it: AOTInductor takes
        their memory from CUDA itself and not from torch's allocator.
        """
        if self.engine.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return peak_memory_bytes() if sys.platform == "linux" else None

    def joules_per_image(self) -> float | None:
        """The energy of the GPU's whole board over ENERGY_S of calls; None on a CPU, or if NVML does not report it."""
        if self.engine.device != "cuda" or (before := gpu_joules()) is None:
            return None
        begin, images = now(), 0
        while now() - begin < ENERGY_S:
            self.step()
            images += len(self._pixels[0])
        return (gpu_joules() - before) / images


def open_bench(source: Recipe, threads: int) -> EngineBench:
    """Make the bench of an engine.

    source: for an engine that reads an artifact, its ticket; for any other engine, its complete recipe.
    """
    if source.model is None:
        engine = source.load(artifacts_root() / source.folder_name, threads)
    else:
        engine = source.engine(threads)
        engine.recipe = None  # its memory must not count as the engine's
    with suppress(OSError):  # reset the peak, so that loading does not count
        Path("/proc/self/clear_refs").write_text("5")
    return EngineBench(engine)


class RoofBench:
    """Plain matrix products, the fastest of which gives the roof; later calls time only this product."""

    def __init__(self, shapes: list[Shape], device: str):
        self._shapes, self._device = shapes, device
        self._products: dict[str, Products | None] = {}

    def explore(self, precision: str) -> None:
        """Find the fastest product in ``precision``, once."""
        if precision in self._products:
            return
        try:
            products = self._products[precision] = Products(precision, self._shapes, self._device)
            products.best(EXPLORE_S, least=1, keep=1)
        except VitdemoError:
            self._products[precision] = None

    def flops_per_s(self, precision: str, seconds: float) -> float | None:
        """The throughput in this turn; None where no runtime here multiplies in that precision."""
        products = self._products[precision]
        return products and products.best(seconds, least=1).flops_per_s


def until_stable(step: Callable[[], float], seconds: float) -> list[float]:
    """Call ``step`` until the last LAST calls lie within STABLE of their median; return the seconds of each call.

    It stops earlier if another call would exceed ``seconds``.
    """
    taken: list[float] = []
    while sum(taken) + (taken[-1] if taken else 0) < seconds:
        taken.append(step())
        last = taken[-LAST:]
        if len(last) == LAST and max(last) - min(last) <= STABLE * statistics.median(last):
            break
    return taken


def serve(pipe: Connection, environment: dict[str, str]) -> None:
    """Make the bench that the first message names, then call its methods by name, until the other end is closed.

    environment: the starter's present environment; the server from which this process was forked has an older one.
    """
    os.environ.clear()
    os.environ |= environment
    os.setpgrp()  # only the starter receives Ctrl-C and Ctrl-Z; it ends this process
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the server, even if suspended
        os.close(forkserver._forkserver._forkserver_alive_fd)  # so that the server ends when the starter ends
        with suppress(OSError):  # when memory runs out, the system should kill this process and not the starter
            Path("/proc/self/oom_score_adj").write_text("1000")
    tqdm.set_lock(RLock())  # tqdm's own lock is a semaphore, which a killed process leaves behind
    bench = None
    with suppress(EOFError, OSError):  # the other end was closed, or its process was killed
        while True:
            name, *arguments = pickle.loads(pipe.recv_bytes())
            try:
                if bench is None:
                    bench = {"engine": open_bench, "roof": RoofBench}[name](*arguments)
                    answer = None
                else:
                    answer = getattr(bench, name)(*arguments)
            except Exception as error:  # a runtime may raise anything, which becomes the status of a row
                answer = Failed(reason_of(error))
            pipe.send_bytes(pickle.dumps(answer))
