"""A device for ``Pipeline`` that runs what is queued as late as it may, in an order drawn from a seed.

What a GPU may do and a CPU never does: streams run on in any order that no event forbids, a copy reads its source when
it is run and not when it was queued, and memory that was given back holds something else by then.
"""

import random
import time
from collections import deque
from concurrent.futures import Future

import torch

STREAMS = ("in", "compute", "out")


class Event:
    """recorded: how often ``record`` was queued; happened: how often it was run; at: when, by the host's clock."""

    def __init__(self):
        self.recorded = self.happened = 0
        self.at = None

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds, as CUDA's."""
        return 1e3 * (end.at - self.at)


class LateFuture(Future):
    """Computed when somebody asks for it, so that an order of events is the seed's, and no thread's."""

    def __init__(self, work):
        super().__init__()
        self._work = work

    def _run(self) -> None:
        if self._work:
            work, self._work = self._work, None
            try:
                self.set_result(work())
            except Exception as error:
                self.set_exception(error)

    def result(self, timeout=None):
        self._run()
        return super().result(timeout)

    def exception(self, timeout=None):
        self._run()
        return super().exception(timeout)


class LateWaiter:
    def __init__(self):
        self.closed = False

    def submit(self, work, *args) -> LateFuture:
        assert not self.closed
        return LateFuture(lambda: work(*args))

    def shutdown(self) -> None:
        self.closed = True


class LateDevice:
    """Args:
    seed: of the order.
    without: the name of a wait that is left out.

    Counted are ``taken`` buffers and operations that were ``ran``.
    """

    def __init__(self, seed: int, without: str | None = None):
        self._random, self._without = random.Random(seed), without
        self._queued = {name: deque() for name in STREAMS}
        self.waits: set[str] = set()
        self.taken = self.ran = 0

    def empty(self, shape, dtype):
        self.taken += 1
        return torch.full(shape, 77, dtype=dtype)

    pinned = empty

    def event(self) -> Event:
        return Event()

    def waiter(self) -> LateWaiter:
        return LateWaiter()

    def copy(self, stream, target, source):
        self._queue(stream, lambda: target.copy_(source))

    def record(self, stream, event):
        event.recorded += 1

        def happen():
            event.happened += 1
            event.at = time.perf_counter()

        self._queue(stream, happen)

    def wait(self, name, what, stream=None):
        self.waits.add(name)
        if name == self._without:
            return
        if stream:  # for what was recorded up to now, as CUDA's
            least = what.recorded
            self._queue(stream, lambda: None, lambda: what.happened >= least)
        elif isinstance(what, Future):
            what.exception()
        else:
            least = what.recorded
            self.run(lambda: what.happened >= least)

    def capture(self, work):
        work()
        return work

    def replay(self, graph):
        self._queue("compute", graph)

    def finish(self):
        self.run(lambda: not any(self._queued.values()))

    def _queue(self, stream, work, ready=lambda: True):
        self._queued[stream].append((ready, work))

    def run(self, until):
        """Run what is queued until ``until()``, and now and then a little more."""
        while not until() or self._random.random() < 0.5:
            able = [queue for queue in self._queued.values() if queue and queue[0][0]()]
            if not able:
                assert until(), "nothing can go on: a wait for what nobody queued"
                return
            _, work = self._random.choice(able).popleft()
            work()
            self.ran += 1
