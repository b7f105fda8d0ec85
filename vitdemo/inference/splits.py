"""Who does which range of images when: two ways to split a data set among replicas."""

from collections import deque
from typing import Protocol

from vitdemo.inference.worker import Shard
from vitdemo.measure.clock import now

RANGE_S = 5.0  # about how long a range of the asynchronous split takes
LONGEST_BATCHES = 64


class Split(Protocol):
    """Who does which range when, by the replicas' numbers.

    ahead: how many ranges a replica may have at once. step_s: seconds of each global batch, where there are such.
    """

    ahead: int
    step_s: list[float]

    def take(self, replica: int, images_per_s: float) -> range | None: ...
    def give_back(self, indices: range, replica: int) -> None: ...
    def done(self, shard: Shard) -> None: ...


class AsyncSplit:
    """Replicas take the next range as they finish: a slow or dying one holds nobody up.

    Ranges are whole batches, of about RANGE_S at the replica's own rate, and shorter towards the end, so that all
    finish together.
    """

    ahead = 2  # the next one lies ready, so that nobody waits for the driver

    def __init__(self, images: range, device_batch_size: int, replicas: int):
        self._next, self._stop, self._batch, self._replicas = images.start, images.stop, device_batch_size, replicas
        self.step_s: list[float] = []  # it has no steps
        self._again: deque[range] = deque()

    def take(self, replica: int, images_per_s: float) -> range | None:
        if self._again:
            return self._again.popleft()
        left = -(-(self._stop - self._next) // self._batch)
        fair = left // (2 * self._replicas)
        batches = max(1, min(round(RANGE_S * images_per_s / self._batch), fair, LONGEST_BATCHES))
        indices = range(self._next, min(self._next + batches * self._batch, self._stop))
        self._next = indices.stop
        return indices or None

    def give_back(self, indices: range, replica: int) -> None:
        self._again.append(indices)

    def done(self, shard: Shard) -> None:
        pass


class SyncSplit:
    """Each global batch is cut into one contiguous shard a replica; the next one begins when all are done.

    step_s: seconds of each global batch, from the first shard handed out to the last one back.
    """

    ahead = 1

    def __init__(self, images: range, device_batch_size: int, replicas: int):
        self._next, self._stop, self._batch, self._replicas = images.start, images.stop, device_batch_size, replicas
        self._shards: dict[int, range] = {}
        self._open: set[range] = set()
        self.step_s: list[float] = []
        self._step()

    def _step(self) -> None:
        starts = range(self._next, self._stop, self._batch)[: self._replicas]
        self._shards = {k: range(start, min(start + self._batch, self._stop)) for k, start in enumerate(starts)}
        self._open = set(self._shards.values())
        self._next = max((shard.stop for shard in self._open), default=self._stop)
        self._began = now()

    def take(self, replica: int, images_per_s: float) -> range | None:
        return self._shards.pop(replica, None)

    def give_back(self, indices: range, replica: int) -> None:
        self._shards[replica] = indices

    def done(self, shard: Shard) -> None:
        self._open.discard(shard.indices)
        if not self._open:
            self.step_s.append(now() - self._began)
            self._step()


SPLITS: dict[str, type[Split]] = {"async": AsyncSplit, "sync": SyncSplit}
