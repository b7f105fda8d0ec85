"""Measures one engine of a model, in a process of its own, which answers questions over a pipe.

These processes are forked from one helper that has imported torch already, ``python -m vitdemo.benchmarking.bench nurse
FD``: that saves seconds and memory per engine, and a caller's own script is not run again.
"""

import os
import pickle
import signal
import socket
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from threading import RLock

import torch
from tqdm import tqdm

from vitdemo.dataset.imagenet import ImageNetVal
from vitdemo.engines.artifacts import Recipe, artifacts_root
from vitdemo.engines.contract import Engine
from vitdemo.engines.roof import Products, Shape
from vitdemo.errors import VitdemoError, reason_of
from vitdemo.machine import now, peak_memory_bytes

ANSWER = struct.Struct("i")  # of the nursery's messages, both ways
INPUTS = 4  # sets of pixels, by turns, so that none lies ready in a cache by having just been used
EXPLORE_S = 1.0
STABLE, LAST = 0.05, 3  # warm, when the last calls lie within this share of their median


@dataclass(frozen=True)
class Failure:
    """What a bench could not do. reason: one line."""

    reason: str


class EngineBench:
    """One engine, measured by calls of ``step``: one batch of random pixels, there and back."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._pixels: torch.Tensor | None = None
        self._turn = count()

    def facts(self) -> dict:
        """Of the engine, for its rows."""
        engine = self.engine
        known = {"load_s": engine.load_s, "device": engine.device, "threads": engine.threads}
        return known | {"build_s": engine.card.get("build_s"), "artifact": engine.card["key"]}

    def precision_ran(self) -> dict[str, float]:
        """Asked for after the first timed calls, as reading it back runs an image."""
        return self.engine.precision_ran

    def first_call(self, device_batch_size: int) -> float:
        """Seconds of a call on new pixels of that batch size, which later calls use too."""
        self._pixels = self.engine.info.random_pixels(INPUTS, device_batch_size)
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

    def answers(self, data: str, images: int) -> dict:
        """Of the first ``images`` of the data set at ``data``.

        ``top1``, how many were ``calibrated_on_scored``, and ``answers``, their class indices.
        """
        from vitdemo.evaluation.evaluation import evaluate  # here, as importing it takes longer than most calls

        found = evaluate(self.engine, ImageNetVal(data), limit=images, progress=False)
        known = {name: found.metrics[name] for name in ("images", "top1", "calibrated_on_scored")}
        return known | {"answers": found.rows["predicted_1"].fillna(-1).astype(int).tolist()}

    def peak_memory_bytes(self) -> int | None:
        """The process's largest resident size since the engine was ready; None where no system tells."""
        return peak_memory_bytes() if sys.platform == "linux" else None


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

    def __init__(self, shapes: list[Shape]):
        self._shapes = shapes
        self._products: dict[str, Products | None] = {}

    def explore(self, precision: str) -> None:
        """Find the best product in ``precision``, once."""
        if precision in self._products:
            return
        try:
            products = self._products[precision] = Products(precision, self._shapes)
            products.keep(1, EXPLORE_S, least=1)
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


def serve(pipe: Connection) -> None:
    """Make the bench that comes first, then call its methods by name, until the other end is closed."""
    tqdm.set_lock(RLock())  # its own is a semaphore, which a process that is killed leaves behind
    bench = None
    while True:
        try:
            name, *arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            if bench is None:
                bench = {"engine": open_bench, "roof": RoofBench}[name](*arguments)
                answer = None
            else:
                answer = getattr(bench, name)(*arguments)
        except Exception as error:  # a runtime may raise anything; it becomes a row that says so
            answer = Failure(reason_of(error))
        pipe.send_bytes(pickle.dumps(answer))


CHILDREN: dict[int, subprocess.Popen] = {}  # a nursery's; one that is dropped loses its exit code to the next one


def nurse(here: socket.socket) -> None:
    """Start a process for each message 0, which brings its pipe along, and answer its pid; for the pid of one that
    has ended or is about to, answer its exit code. Until the other end is closed."""
    import vitdemo.evaluation.evaluation  # noqa: F401 - what benches import later, so that they share it too

    here.send(ANSWER.pack(0))
    while True:
        message, pipes, *_ = socket.recv_fds(here, ANSWER.size, 1)
        if not message:
            return
        (pid,) = ANSWER.unpack(message)
        if pid:
            answer = CHILDREN.pop(pid).wait() if pid in CHILDREN else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        else:
            answer = start(pipes[0], here)
            os.close(pipes[0])
        here.send(ANSWER.pack(answer))


def start(pipe: int, here: socket.socket) -> int:
    """The pid of a new process that serves ``pipe``. Forked, it shares what is imported; elsewhere than on Linux a fork
    is not safe, and it imports anew."""
    if sys.platform != "linux":
        command = [sys.executable, "-m", "vitdemo.benchmarking.bench", "serve", str(pipe)]
        child = subprocess.Popen(command, pass_fds=[pipe])
        CHILDREN[child.pid] = child
        return child.pid
    if pid := os.fork():
        return pid
    try:
        here.close()
        end_with_parent()
        with suppress(OSError):  # where memory runs out, this process is to go, and not the one that asks
            Path("/proc/self/oom_score_adj").write_text("1000")
        serve(Connection(pipe))
    finally:
        os._exit(0)  # the nursery's own way back is not this process's


def end_with_parent() -> None:
    """Have the kernel end this process with its parent, also while it is stopped. On Linux alone."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    role, number = sys.argv[1:]
    if role == "nurse":
        end_with_parent()
        nurse(socket.socket(fileno=int(number)))
    else:
        serve(Connection(int(number)))


if __name__ == "__main__":
    from vitdemo.benchmarking import bench as worker  # under its own name, so that what it sends can be read elsewhere

    worker.main()
