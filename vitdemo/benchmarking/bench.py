"""Measures one engine of a model, in a process of its own, which answers questions over a pipe."""

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
from vitdemo.machine import now, peak_memory_bytes

INPUTS = 4  # sets of pixels, by turns, so that none lies ready in a cache by having just been used
EXPLORE_S = 1.0
ENERGY_S = 2.0  # a GPU counts its energy on in steps of up to a tenth of a second
STABLE, LAST = 0.05, 3  # warm, when the last calls lie within this share of their median


class Failed(Exception):
    """A bench could not do what it was asked. The message is one line."""


class EngineBench:
    """One engine, measured by calls of ``step``: one batch of random pixels, there and back."""

    def __init__(self, engine: Engine):
        self.engine = engine
        engine.streams = 1  # single calls are timed, and the answers are to be those of the same form
        self._pixels: torch.Tensor | None = None
        self._turn = count()

    def facts(self) -> dict:
        """Of the engine, for its rows."""
        engine = self.engine
        known = {name: getattr(engine, name) for name in ("load_s", "device", "threads", "streams")}
        return known | {"build_s": engine.card.get("build_s"), "artifact": engine.card["key"]}

    def precision_ran(self) -> dict[str, float]:
        """Asked for after the first timed calls, as reading it back runs an image."""
        return self.engine.precision_ran

    def first_call(self, device_batch_size: int) -> float:
        """Seconds of a call on new pixels of that batch size, which later calls use too."""
        self._pixels = self.engine.info.random_pixels(INPUTS, device_batch_size, pinned=self.engine.device == "cuda")
        return self.step()

    def step(self) -> float:
        """Seconds of one call."""
        x = self._pixels[next(self._turn) % INPUTS]
        start = now()
        self.engine(x)
        return now() - start

    def warm_up(self, seconds: float) -> float:
        """Seconds of calling until the last few take equally long, at most about ``seconds``."""
        return sum(until_stable(self.step, seconds))

    def turn(self, seconds: float) -> list[float]:
        """Seconds of each call, as many as fill ``seconds``, one at least.

        Of short calls one more, which wakes caches and threads and is not counted.
        """
        first = self.step()
        taken = [first] if first > seconds / 4 else []
        while not taken or sum(taken) < seconds:
            taken.append(self.step())
        return taken

    def logits(self) -> torch.Tensor:
        """Of the random pixels in use, float32[N, C]."""
        return torch.cat([self.engine(x) for x in self._pixels])

    def answers(self, address: tuple, images: int) -> dict:
        """Of the first ``images`` of the data set of an ``address``.

        ``top1``, how many were ``calibrated_on_scored``, and ``answers``, their class indices.
        """
        from vitdemo.evaluation.evaluation import evaluate  # here, as importing it takes longer than most calls

        found = evaluate(self.engine, open_again(address), limit=images, progress=False)
        known = {name: found.metrics[name] for name in ("images", "top1", "calibrated_on_scored")}
        return known | {"answers": found.rows["predicted_1"].fillna(-1).astype(int).tolist()}

    def peak_memory_bytes(self) -> int | None:
        """The process's largest resident size since the engine was ready, or on CUDA what torch took of the GPU's
        memory at most; None where no system tells."""
        if self.engine.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return peak_memory_bytes() if sys.platform == "linux" else None

    def joules_per_image(self) -> float | None:
        """What the GPU's whole board uses, over ENERGY_S of calls; None on a CPU, and where NVML does not tell."""
        if self.engine.device != "cuda" or (before := gpu_joules()) is None:
            return None
        begin, images = now(), 0
        while now() - begin < ENERGY_S:
            self.step()
            images += len(self._pixels[0])
        return (gpu_joules() - before) / images


def open_bench(source: Recipe, threads: int) -> EngineBench:
    """source: the ticket of an engine that reads an artifact; what any other engine is made from."""
    if source.model is None:
        engine = source.load(artifacts_root() / source.folder_name, threads)
    else:
        engine = source.engine(threads)
        engine.recipe = None  # its memory is not the engine's
    with suppress(OSError):  # the peak of what it took to get ready is forgotten
        Path("/proc/self/clear_refs").write_text("5")
    return EngineBench(engine)


class RoofBench:
    """Plain matrix products, the best of which is the roof; what was found best stays in use."""

    def __init__(self, shapes: list[Shape], device: str):
        self._shapes, self._device = shapes, device
        self._products: dict[str, Products | None] = {}

    def explore(self, precision: str) -> None:
        """Find the best product in ``precision``, once."""
        if precision in self._products:
            return
        try:
            products = self._products[precision] = Products(precision, self._shapes, self._device)
            products.best(EXPLORE_S, least=1, keep=1)
        except VitdemoError:
            self._products[precision] = None

    def flops_per_s(self, precision: str, seconds: float) -> float | None:
        """The rate in this turn; None where nothing here multiplies in that precision."""
        products = self._products[precision]
        return products and products.best(seconds, least=1).flops_per_s


def until_stable(step: Callable[[], float], seconds: float) -> list[float]:
    """The calls' seconds until the last LAST lie within STABLE of their median, or another call would take longer
    than what is left of ``seconds``."""
    taken: list[float] = []
    while sum(taken) + (taken[-1] if taken else 0) < seconds:
        taken.append(step())
        last = taken[-LAST:]
        if len(last) == LAST and max(last) - min(last) <= STABLE * statistics.median(last):
            break
    return taken


def serve(pipe: Connection, environment: dict[str, str]) -> None:
    """Make the bench that comes first, then call its methods by name, until the other end is closed.

    environment: the starter's, now; the server, from which this process was forked, keeps that of its own start.
    """
    os.environ.clear()
    os.environ |= environment
    os.setpgrp()  # Ctrl-C and Ctrl-Z are for the starter, who ends this process
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with the server, also while it is stopped
        os.close(forkserver._forkserver._forkserver_alive_fd)  # and the server with the starter: it waits for all ends
        with suppress(OSError):  # where memory runs out, this process is to go, and not the one that asks
            Path("/proc/self/oom_score_adj").write_text("1000")
    tqdm.set_lock(RLock())  # its own is a semaphore, which a process that is killed leaves behind
    bench = None
    with suppress(EOFError, OSError):  # the other end is closed, or its process was killed
        while True:
            name, *arguments = pickle.loads(pipe.recv_bytes())
            try:
                if bench is None:
                    bench = {"engine": open_bench, "roof": RoofBench}[name](*arguments)
                    answer = None
                else:
                    answer = getattr(bench, name)(*arguments)
            except Exception as error:  # a runtime may raise anything; it becomes a row that says so
                answer = Failed(reason_of(error))
            pipe.send_bytes(pickle.dumps(answer))
