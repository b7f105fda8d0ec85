"""Those that are measured, each in a process of its own, and the rounds in which they take turns."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe

import psutil

from vitdemo.benchmarking.worker import EngineBench, Failure
from vitdemo.conversion.engines.contract import Engine
from vitdemo.dataset.imagenet import ImageNetVal
from vitdemo.errors import reason_of
from vitdemo.inference.replicas import Replicas


class Failed(Exception):
    """A bench could not do what it was asked. The message is one line."""


class Worker:
    """A process with one bench, stopped by the system except while an answer is waited for.

    No thread of an idle runtime spins meanwhile. Where a process does not end with its parent (anywhere but on Linux)
    it is left running: a stopped one would stay for ever.
    """

    def __init__(self):
        self._pipe, end = Pipe()
        command = [sys.executable, "-m", "vitdemo.benchmarking.worker", str(end.fileno())]
        path = os.pathsep.join(filter(None, sys.path))  # what this process can import, that one can
        environment = os.environ | {"PYTHONPATH": path}
        # A group of its own: Ctrl-C and Ctrl-Z are for the parent, who ends this one.
        own = dict(env=environment, stdin=subprocess.DEVNULL, process_group=0)
        self._process = subprocess.Popen(command, pass_fds=[end.fileno()], **own)
        end.close()
        self._control = psutil.Process(self._process.pid) if sys.platform == "linux" else None

    def wait(self) -> None:
        """Until the process has imported what it needs. Raises Failed."""
        try:
            self._pipe.recv_bytes()
            if self._control:
                self._control.suspend()
        except (EOFError, OSError, psutil.NoSuchProcess):
            raise Failed(self._last_words()) from None

    def ask(self, name: str, *arguments):
        """What the bench's method ``name`` answers; the first ask makes the bench. Raises Failed."""
        try:
            with self._awake():
                self._pipe.send_bytes(pickle.dumps((name, *arguments)))
                answer = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError, psutil.NoSuchProcess):
            raise Failed(self._last_words()) from None
        if isinstance(answer, Failure):
            raise Failed(answer.reason)
        return answer

    @contextmanager
    def _awake(self) -> Iterator[None]:
        if self._control:
            self._control.resume()
        yield
        if self._control:
            self._control.suspend()

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        code = self._process.wait()
        killed = "killed, as it is where memory runs out" if code == -9 else f"exit code {code}"
        return f"its process ended ({killed})"

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()


class ReplicaBench(EngineBench):
    """An engine in replicas, in the synchronous split: one step is a batch of ``device_batch_size`` on each of them,
    begun together and over when the last one is done. Answers and logits are those of the engine without replicas."""

    def __init__(self, engine: Engine, data: ImageNetVal, count: int, share: float):
        super().__init__(engine)
        self._replicas = Replicas(engine, data, count, share=share)

    def facts(self) -> dict:
        return super().facts() | {"load_s": self._replicas.start_s, "threads": self._replicas.threads}

    def step(self) -> float:
        return self._replicas.step(len(self._pixels[0]))

    def peak_memory_bytes(self) -> None:
        """Not measured."""

    def ask(self, name: str, *arguments):
        """As ``Worker.ask``."""
        try:
            return getattr(self, name)(*arguments)
        except Exception as error:  # as in a worker
            raise Failed(reason_of(error)) from None

    def end(self) -> None:
        self._replicas.close()
