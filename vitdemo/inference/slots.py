"""A replica's place in a run: who works there, on what, and what was done so far."""

from collections import deque
from dataclasses import dataclass, field

import psutil

from vitdemo.inference.worker import Place, Shard


@dataclass
class Task:
    """What a replica was asked for. indices: of a range of images, None while the replica is made ready."""

    reference: object
    indices: range | None
    began: float


@dataclass
class Slot:
    """A replica's place in the run, which its successors take over, and what was done there.

    cpus: its share of Ray's CPUs on its node. busy_s: seconds it worked on ranges that it brought back.
    """

    number: int
    node: str
    cpus: float
    gpus: int
    actor: object = None
    place: Place | None = None
    process: psutil.Process | None = None
    host: str = ""
    cores: list[int] = field(default_factory=list)
    threads: int = 0
    precision_ran: dict[str, float] = field(default_factory=dict)
    ready: bool = False
    tasks: deque[Task] = field(default_factory=deque)
    lost: int = 0
    lost_in_a_row: int = 0
    images: int = 0
    ranges: int = 0
    busy_s: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def pid(self) -> int | None:
        """Of its process on its machine; None while it is being started."""
        return self.place and self.place.pid

    @property
    def images_per_s(self) -> float:
        return self.images / self.busy_s if self.busy_s else 0.0

    def brought_back(self, shard: Shard) -> None:
        """Count a range that it did."""
        self.images += len(shard.indices)
        self.ranges += 1
        self.busy_s += shard.wall_s
        self.lost_in_a_row = 0
        self.peak_memory_bytes = shard.peak_memory_bytes

    def forget_run(self) -> None:
        """Begin to count anew."""
        self.images, self.ranges, self.busy_s, self.lost, self.lost_in_a_row = 0, 0, 0.0, 0, 0

    def record(self, wall_s: float) -> dict:
        """Of a run that took ``wall_s``: its machine and cores, images and ranges that it brought back, ``busy_s``
        (working on those), ``idle_s`` (the rest of ``wall_s``: waiting, being replaced, or working on what was lost),
        ``images_per_s`` (over ``busy_s``), the precision that ran there, its process's peak memory."""
        return {
            "replica": self.number,
            "host": self.host,
            "cores": self.cores,
            "images": self.images,
            "ranges": self.ranges,
            "busy_s": self.busy_s,
            "idle_s": wall_s - self.busy_s,
            "images_per_s": self.images_per_s,
            "precision_ran": self.precision_ran,
            "peak_memory_bytes": self.peak_memory_bytes,
            "lost": self.lost,
        }
