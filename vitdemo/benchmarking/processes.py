"""The processes that are measured (``Worker``), and replicas with the same interface (``ReplicaBench``)."""

import atexit
import os
import pickle
import signal
import sys
from multiprocessing import get_context
from types import ModuleType

import psutil

from vitdemo.benchmarking.bench import EngineBench, Failed, serve
from vitdemo.dataset.dataset import Dataset
from vitdemo.engines.contract import Engine
from vitdemo.errors import reason_of
from vitdemo.inference.replicas import Replicas

CONTEXT = get_context("forkserver" if sys.platform == "linux" else "spawn")  # on other systems a fork is not safe
CONTEXT.set_forkserver_preload(["vitdemo.benchmarking.preload"])
ENDED = {-signal.SIGKILL: "killed, perhaps because memory ran out: measure it without the others"}
ENDED |= {255: "together with the process that starts the others"}


class Worker:
    """A process with one bench, suspended except while it answers a request. Raises Failed where it does not start.

    Suspending it keeps the threads of an idle runtime from using cores. On other systems than Linux a process does not
    end with its starter, and is not suspended, because it would then remain for ever.
    """

    def __init__(self):
        self._pipe, end = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=serve, args=(end, dict(os.environ)), daemon=True)
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")  # do not run a script again
        try:
            self._process.start()
        except (EOFError, OSError) as error:
            raise Failed(f"no process could be started ({reason_of(error)})") from None
        finally:
            sys.modules["__main__"] = main
            end.close()
        atexit.register(self._process.kill)  # a suspended process would not react when multiprocessing ends it
        self._control = psutil.Process(self._process.pid) if sys.platform == "linux" else None

    def ask(self, name: str, *arguments):
        """Call the bench's method ``name`` and return its result; the first call makes the bench. Raises Failed."""
        try:
            if self._control:
                self._control.resume()
            self._pipe.send_bytes(pickle.dumps((name, *arguments)))  # multiprocessing would share tensors' memory
            answer = pickle.loads(self._pipe.recv_bytes())
            if self._control:
                self._control.suspend()
        except (EOFError, OSError, psutil.NoSuchProcess):
            self._process.join(1)  # so that its exit code says why it ended
            self.end()
            code = self._process.exitcode
            raise Failed(f"its process ended ({ENDED.get(code, f'exit code {code}')})") from None
        if isinstance(answer, Failed):
            raise answer
        return answer

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


class ReplicaBench(EngineBench):
    """An engine in replicas with the synchronous schedule.

    One step is one batch of ``device_batch_size`` per replica; all begin together, and the step ends with the last one.
    Predictions and logits are those of the engine without replicas.
    """

    def __init__(self, engine: Engine, data: Dataset | None, count: int, share: float):
        super().__init__(engine)
        self._replicas = Replicas(engine, data, count, share=share)

    def facts(self) -> dict:
        return super().facts() | {"load_s": self._replicas.start_s, "threads": self._replicas.threads}

    def step(self) -> float:
        return self._replicas.step(len(self._pixels[0]))

    def peak_memory_bytes(self) -> None:
        """None, because it is not measured with replicas."""

    joules_per_image = peak_memory_bytes

    def ask(self, name: str, *arguments):
        """As ``Worker.ask``."""
        try:
            return getattr(self, name)(*arguments)
        except Exception as error:  # as in a worker
            raise Failed(reason_of(error)) from None

    def end(self) -> None:
        self._replicas.close()
