"""Two schedules, which decide which replica computes which range of images: asynchronous and synchronous.

A schedule is made from the batches to compute, in ascending order, and identifies replicas by their numbers. ``ahead``:
the number of ranges that a replica may have at once. ``step_s``: the seconds of each global batch, if there are any.
"""

from collections import deque
from collections.abc import Sequence

from vitdemo.machine import now

RANGE_S = 5.0  # the approximate duration of a range in the asynchronous schedule
LONGEST_BATCHES = 64


class AsyncSchedule:
    """Each replica takes the next range when it finishes one, so that a slow or dying replica delays no other.

    A range is a number of whole batches that take about RANGE_S at the replica's own rate. Towards the end ranges are
    shorter, so that all replicas finish at the same time.
    """

    ahead = 2  # the next range is already there when one is done, so that a replica never waits for the driver

    def __init__(self, batches: Sequence[range], replicas: int):
        self._batches, self._replicas = deque(batches), replicas
        self.step_s: list[float] = []  # this schedule has no steps
        self._again: deque[range] = deque()

    def take(self, replica: int, images_per_s: float) -> range | None:
        if self._again:
            return self._again.popleft()
        if not self._batches:
            return None
        fair = len(self._batches) // (2 * self._replicas)
        at_rate = round(RANGE_S * images_per_s / len(self._batches[0]))
        indices = self._batches.popleft()
        for _ in range(min(at_rate, fair, LONGEST_BATCHES) - 1):
            if self._batches[0].start != indices.stop:  # the images in between were done before
                break
            indices = range(indices.start, self._batches.popleft().stop)
        return indices

    def give_back(self, indices: range, replica: int) -> None:
        self._again.append(indices)

    def done(self, indices: range) -> None:
        pass


class SyncSchedule:
    """A global batch is one batch per replica; the next global batch begins when all of its batches are done.

    The successor of a lost replica gets that replica's batch. step_s: the seconds of each global batch, from its start
    to the last batch returned.
    """

    ahead = 1

    def __init__(self, batches: Sequence[range], replicas: int):
        self._batches, self._replicas = deque(batches), replicas
        self.step_s: list[float] = []
        self._step()

    def _step(self) -> None:
        count = min(self._replicas, len(self._batches))
        self._shards: dict[int, range] = {k: self._batches.popleft() for k in range(count)}
        self._open = set(self._shards.values())
        self._began = now()

    def take(self, replica: int, images_per_s: float) -> range | None:
        return self._shards.pop(replica, None)

    def give_back(self, indices: range, replica: int) -> None:
        self._shards[replica] = indices

    def done(self, indices: range) -> None:
        self._open.discard(indices)
        if not self._open:
            self.step_s.append(now() - self._began)
            self._step()


Schedule = AsyncSchedule | SyncSchedule
SCHEDULES: dict[str, type[Schedule]] = {"async": AsyncSchedule, "sync": SyncSchedule}
