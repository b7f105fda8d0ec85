"""``Replica``: one replica, in a process that Ray starts, perhaps on another machine.

Runtimes are imported only after the process has been bound to its cores, because they count the cores when loaded.
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
    """The place where a replica runs.

    It holds the process id, Ray's id of the node, the host name, the replica's cores, and the ``installed`` versions.
    """

    pid: int
    node: str
    host: str
    cores: list[int]
    installed: dict[str, str | None]


class Shard(NamedTuple):
    """The results for a range of images.

    rows: one ``Row`` per image. times: one ``BatchTimes`` per batch. phases: seconds by name, as in ``predict``.
    wall_s, cpu_s: seconds of this process, from the first to the last batch. peak_memory_bytes: its peak so far.
    """

    indices: range
    rows: list
    times: list
    phases: dict[str, float]
    wall_s: float
    cpu_s: float
    peak_memory_bytes: int


class Replica:
    """One engine on its share of a machine, with a data set that it opens itself."""

    def __init__(self, number: int, count: int, each: int | None):
        """Bind the process to the cores of the ``number``-th (from 0) of ``count`` replicas, see ``share_cores``."""
        assert "torch" not in sys.modules
        self._cores = share_cores(_allowed_cores(), count, each)[number]
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self._cores)
        os.environ["OMP_NUM_THREADS"] = str(len(self._cores))  # Ray sets it to 1

    def place(self) -> Place:
        """The place where this replica runs."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return Place(os.getpid(), node, socket.gethostname(), self._cores, installed())

    def prepare(self, ticket, recipe: list, address: tuple | None) -> tuple[int, dict[str, float]]:
        """Make the engine of ``ticket`` ready, and open the data set of ``address``.

        Returns the engine's number of threads and its ``precision_ran``. Raises VitdemoError with this machine's name.

        recipe: a list with one Ray reference to the Recipe of the engine; it is fetched only if this machine's cache
        has no artifact for the ticket.
        """
        import ray
        import torch

        from vitdemo.dataset.dataset import open_again

        torch.set_num_threads(len(self._cores))
        try:
            self._data = address and open_again(address)
            self._engine = ticket.open(lambda: ray.get(recipe[0]), len(self._cores))
        except VitdemoError as error:
            raise VitdemoError(f"replica on {socket.gethostname()}: {error}") from None
        self._pixels = lru_cache(1)(self._engine.info.random_pixels)
        return self._engine.threads, self._engine.precision_ran

    def run(self, number: int, indices: range, device_batch_size: int, input_path: str, streams: bool) -> Shard:
        """Compute the rows of ``indices``. Raises EngineFailure when the engine breaks.

        number: this replica's number. device_batch_size, input_path: as in ``evaluate``. streams: True for one stream
        per thread, False for one call at a time on all threads.
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
        """Compute one batch of random pixels, which the first call of that size makes."""
        self._engine(self._pixels(device_batch_size))


def _allowed_cores() -> list[int]:
    """The numbers of the cores that this process may use.

    A container's CPU quota limits time and not which cores are used. So as many cores as the quota is worth are taken,
    from an offset that depends on the host name, because otherwise all containers of a machine would take the first
    cores.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    count = cores()
    first = zlib.crc32(socket.gethostname().encode()) % (len(allowed) - count + 1)
    return sorted(allowed)[first : first + count]


@cache
def installed() -> dict[str, str | None]:
    """The versions of all packages that can change a result; for vitdemo itself, a hash over its source."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return versions() | {"vitdemo": digest.hexdigest()[:16]}
