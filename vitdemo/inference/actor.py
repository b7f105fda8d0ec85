"""What one replica does, in a process that Ray starts, perhaps on another machine.

Nothing heavy is imported before the process has taken its cores: a runtime counts them when it is loaded.
"""

import hashlib
import os
import socket
import sys
import time
import zlib
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from vitdemo.errors import VitdemoError
from vitdemo.inference.cluster import share_cores
from vitdemo.machine import cores, now, versions


class Place(NamedTuple):
    """Where a replica runs: its process, Ray's name of the machine and the machine's own, the cores it has taken, and
    what is ``installed`` there."""

    pid: int
    node: str
    host: str
    cores: list[int]
    installed: dict[str, str | None]


class Shard(NamedTuple):
    """A range of images, done.

    rows: one ``Row`` per image. times: one ``BatchTimes`` per batch. phases: seconds by name, as ``predict`` keeps
    them. wall_s, cpu_s: of this process, from the first to the last batch. peak_memory_bytes: so far.
    """

    indices: range
    rows: list
    times: list
    phases: dict[str, float]
    wall_s: float
    cpu_s: float
    peak_memory_bytes: int


class Replica:
    """One engine on its share of a machine, over a data set that it opens itself."""

    def __init__(self, number: int, count: int, each: int | None):
        """Take the cores of the ``number``-th (from 0) of ``count`` replicas on this machine, see ``share_cores``."""
        assert "torch" not in sys.modules
        self._cores = share_cores(_allowed_cores(), count, each)[number]
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self._cores)
        os.environ["OMP_NUM_THREADS"] = str(len(self._cores))  # Ray sets it to 1

    def place(self) -> Place:
        """Where this is."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return Place(os.getpid(), node, socket.gethostname(), self._cores, installed())

    def prepare(self, ticket, recipe: list, address: tuple) -> tuple[int, dict[str, float]]:
        """Get the engine of ``ticket`` ready, open the data set of ``address``.

        Gives the engine's threads and what it runs in.

        recipe: a list of one Ray reference to what the engine can be built from; it is fetched only where this
        machine's cache has no artifact of the ticket. Raises VitdemoError, naming this machine.
        """
        import ray
        import torch

        from vitdemo.dataset.dataset import open_again

        torch.set_num_threads(len(self._cores))
        try:
            self._data = open_again(address)
            self._engine = ticket.open(lambda: ray.get(recipe[0]), len(self._cores))
        except VitdemoError as error:
            raise VitdemoError(f"replica on {socket.gethostname()}: {error}") from None
        self._pixels = lru_cache(1)(self._engine.info.random_pixels)
        return self._engine.threads, self._engine.precision_ran

    def run(self, number: int, indices: range, device_batch_size: int, input_path: str, streams: bool) -> Shard:
        """The rows of ``indices``. Raises EngineFailure when the engine breaks.

        number: this replica's. device_batch_size, input_path: as in ``evaluate``. streams: whether there is a stream
        for each thread, or one call at a time on all of them.
        """
        from vitdemo.inference.loop import predict
        from vitdemo.machine import Phases, peak_memory_bytes

        rows, times, phases = [], [], Phases()
        options = dict(device_batch_size=device_batch_size, input_path=input_path)
        engine = self._split if streams else self._engine
        start, cpu = now(), time.process_time()
        for batch in predict(engine, self._data, indices, **options, phases=phases, times=times):
            rows += batch
        wall_s, cpu_s = now() - start, time.process_time() - cpu
        times = [batch._replace(replica=number) for batch in times]
        return Shard(indices, rows, times, phases.seconds, wall_s, cpu_s, peak_memory_bytes())

    @cached_property
    def _split(self):
        return self._engine.side_by_side()

    def call(self, device_batch_size: int) -> None:
        """Compute one batch of random pixels, made at the first call of that size."""
        self._engine(self._pixels(device_batch_size))


def _allowed_cores() -> list[int]:
    """The numbers of the cores that this machine lets the process use.

    A container's CPU quota limits time, not which cores: as many as it is worth, from an offset by the host's name, so
    that not all containers of a machine take the first ones.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    count = cores()
    first = zlib.crc32(socket.gethostname().encode()) % (len(allowed) - count + 1)
    return sorted(allowed)[first : first + count]


@cache
def installed() -> dict[str, str | None]:
    """The versions of all that shapes an answer; vitdemo's own is a hash over its source."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return versions() | {"vitdemo": digest.hexdigest()[:16]}
