"""Who does which range of images when: two ways to share a data set among replicas.

A schedule is made of the batches to do, by ascending index, and knows replicas by their numbers. ``ahead``: how many
ranges a replica may have at once. ``step_s``: seconds of each global batch, where there are such.
"""

from collections import deque
from collections.abc import Sequence

from vitdemo.machine import now

RANGE_S = 5.0  # about how long a range of the asynchronous schedule takes
LONGEST_BATCHES = 64


class AsyncSchedule:
    """Replicas take the next range as they finish: a slow or dying one holds nobody up.

    Ranges are whole batches, of about RANGE_S at the replica's own rate, and shorter towards the end, so that all
    finish together.
    """

    ahead = 2  # the next one lies ready, so that nobody waits for the driver

    def __init__(self, batches: Sequence[range], replicas: int):
        self._batches, self._replicas = deque(batches), replicas
        self.step_s: list[float] = []  # it has no steps
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
            if self._batches[0].start != indices.stop:  # what lies between was done before
                break
            indices = range(indices.start, self._batches.popleft().stop)
        return indices

    def give_back(self, indices: range, replica: int) -> None:
        self._again.append(indices)

    def done(self, indices: range) -> None:
        pass


class SyncSchedule:
    """Each global batch, of one batch per replica, is cut into these; the next one begins when all are done.

    What a lost replica had is its successor's. step_s: seconds of each global batch, from the first shard handed out to
    the last one back.
    """

    ahead = 1

    def __init__(self, batches: Sequence[range], replicas: int):
        self._batches, self._replicas = deque(batches), replicas
        self._shards: dict[int, range] = {}
        self._open: set[range] = set()
        self.step_s: list[float] = []
        self._step()

    def _step(self) -> None:
        count = min(self._replicas, len(self._batches))
        self._shards = {k: self._batches.popleft() for k in range(count)}
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
