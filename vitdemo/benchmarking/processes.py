"""The processes that are measured (``Worker``), and replicas seen as one of them (``ReplicaBench``)."""

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import psutil

from vitdemo.benchmarking.bench import ANSWER, EngineBench, Failure
from vitdemo.dataset.imagenet import ImageNetVal
from vitdemo.engines.contract import Engine
from vitdemo.errors import reason_of
from vitdemo.inference.replicas import Replicas


class Failed(Exception):
    """A bench could not do what it was asked. The message is one line."""


class Nursery:
    """A process that has imported what benches need and starts theirs, see ``worker.nurse``. Raises Failed where it
    does not come up."""

    def __init__(self):
        self._socket, end = socket.socketpair()
        command = [sys.executable, "-m", "vitdemo.benchmarking.bench", "nurse", str(end.fileno())]
        path = os.pathsep.join(filter(None, sys.path))  # what this process can import, that one can
        # A process with threads could not be forked safely; no engine uses OpenBLAS's.
        environment = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
        # A group of its own: Ctrl-C and Ctrl-Z are for the parent, who ends this one.
        own = dict(env=environment, stdin=subprocess.DEVNULL, process_group=0)
        self._process = subprocess.Popen(command, pass_fds=[end.fileno()], **own)
        end.close()
        self._answer()

    def start(self, end: Connection) -> int:
        """The pid of a new process, which serves ``end``."""
        return self._ask(0, [end.fileno()])

    def exit_code(self, pid: int) -> int:
        """Of a process that was started here, once it has ended."""
        return self._ask(pid)

    def _ask(self, number: int, fds: Sequence[int] = ()) -> int:
        with suppress(BrokenPipeError):
            socket.send_fds(self._socket, [ANSWER.pack(number)], fds)
        return self._answer()

    def _answer(self) -> int:
        message = b""
        with suppress(ConnectionResetError):
            message = self._socket.recv(ANSWER.size)
        if not message:
            raise Failed(f"the process that starts the others ended (exit code {self._process.wait()})")
        return ANSWER.unpack(message)[0]

    def end(self) -> None:
        """End the process; on Linux those that it has started end with it."""
        self._process.kill()
        self._process.wait()
        self._socket.close()


class Worker:
    """A process with one bench, stopped by the system except while an answer is waited for.

    No thread of an idle runtime spins meanwhile. Where a process does not end with its parent (anywhere but on Linux)
    it is left running: a stopped one would stay for ever.
    """

    def __init__(self, nursery: Nursery):
        self._nursery = nursery
        self._pipe, end = Pipe()
        self._pid = nursery.start(end)
        end.close()
        self._control = psutil.Process(self._pid) if sys.platform == "linux" else None

    def ask(self, name: str, *arguments):
        """What the bench's method ``name`` answers; the first ask makes the bench. Raises Failed."""
        if self._pid is None:
            raise Failed("its process has ended")
        try:
            with self._awake():
                self._pipe.send_bytes(pickle.dumps((name, *arguments)))
                answer = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError, psutil.NoSuchProcess):
            raise self._last_words() from None
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

    def _last_words(self) -> Failed:
        code = self._kill()
        killed = code == -signal.SIGKILL
        why = "killed, as it is where memory runs out: measure it without the others" if killed else f"exit code {code}"
        return Failed(f"its process ended ({why})")

    def _kill(self) -> int:
        """Its exit code: its own where it was ending already."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        pid, self._pid = self._pid, None  # another process may have the number from now on
        return self._nursery.exit_code(pid)

    def end(self) -> None:
        """End the process, whatever it does."""
        with suppress(Failed):
            if self._pid is not None:
                self._kill()
        self._pipe.close()


class ReplicaBench(EngineBench):
    """An engine in replicas, in the synchronous schedule: one step is a batch of ``device_batch_size`` on each of them,
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
