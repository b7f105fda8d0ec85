"""What one replica does, in a process that Ray starts, perhaps on another machine.

Nothing heavy is imported before ``bind`` has set the process's cores: a runtime counts them when it is loaded.
"""

import hashlib
import os
import socket
import sys
import time
import zlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil

from vitdemo.errors import VitdemoError
from vitdemo.machine import cores, now, versions


class Place(NamedTuple):
    """Where a replica runs.

    created: when its process was, in seconds since 1970, which together with the pid says which one it is. cores: the
    numbers of those that its machine lets it use. code, versions: the vitdemo it has, and the packages.
    """

    pid: int
    created: float
    host: str
    cores: list[int]
    code: str
    versions: dict[str, str | None]


class Shard(NamedTuple):
    """A range of images, done.

    lines: of predictions.csv. times: one ``BatchTimes`` per batch, in seconds since 1970, which machines share.
    phases: seconds by name, as ``predict`` keeps them. wall_s, cpu_s: of this process, from the first to the last
    batch. peak_memory_bytes: so far.
    """

    indices: range
    lines: list[str]
    times: list
    phases: dict[str, float]
    wall_s: float
    cpu_s: float
    peak_memory_bytes: int


class Replica:
    """One engine on its share of a machine, over a data set that it opens itself."""

    def place(self) -> Place:
        affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        process, host = psutil.Process(), socket.gethostname()
        # A container's CPU quota limits time, not which cores: take as many cores as it is worth, from an offset by the
        # host's name, so that not all containers of a machine take the first ones.
        count = cores()
        first = zlib.crc32(host.encode()) % (len(affinity) - count + 1)
        affinity = sorted(affinity)[first : first + count]
        return Place(process.pid, process.create_time(), host, affinity, code_fingerprint(), versions())

    def bind(self, cores: list[int]) -> None:
        """Take ``cores``, before anything that counts them is imported."""
        assert "torch" not in sys.modules
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        os.environ["OMP_NUM_THREADS"] = str(len(cores))  # Ray sets it to 1
        self._threads = len(cores)

    def prepare(self, ticket, recipe: list, data: str, fingerprint: str) -> dict:
        """Get the engine of ``ticket`` ready, open the data set at ``data``.

        recipe: a list of one Ray reference to what the engine can be built from; it is fetched only where this
        machine's cache has no artifact of the ticket. Raises VitdemoError, naming this machine.
        """
        import ray
        import torch

        from vitdemo.dataset.imagenet import ImageNetVal

        torch.set_num_threads(self._threads)
        try:
            self._data = ImageNetVal(data)
            if self._data.fingerprint != fingerprint:
                raise VitdemoError(f"{data}: holds other images than on the machine that asks; copy it again")
            self._engine = ticket.open(lambda: ray.get(recipe[0]), self._threads)
        except VitdemoError as error:
            raise VitdemoError(f"replica on {socket.gethostname()}: {error}") from None
        return {"threads": self._engine.threads, "precision_ran": self._engine.precision_ran}

    def run(self, number: int, indices: range, device_batch_size: int, input_path: str) -> Shard:
        """The rows of ``indices``; ``number`` is this replica's. Raises EngineFailure when the engine breaks."""
        from vitdemo.inference.loop import predict
        from vitdemo.inference.predictions import csv_lines
        from vitdemo.machine import Phases, peak_memory_bytes

        lines, times, phases = [], [], Phases()
        options = dict(device_batch_size=device_batch_size, input_path=input_path, workers=cores())
        start, cpu = now(), time.process_time()
        for rows in predict(self._engine, self._data, indices, **options, phases=phases, times=times):
            with phases("postprocess"):
                lines += csv_lines(rows)
        wall_s, cpu_s = now() - start, time.process_time() - cpu
        epoch, moments = time.time() - now(), ("decode_began", "decode_ended", "submitted", "finished")
        shifted = [t._replace(replica=number, **{name: getattr(t, name) + epoch for name in moments}) for t in times]
        return Shard(indices, lines, shifted, phases.seconds, wall_s, cpu_s, peak_memory_bytes())

    def call(self, device_batch_size: int) -> float:
        """Seconds of one call on random pixels, made at the first call of that size."""
        if getattr(self, "_pixels", None) is None or len(self._pixels) != device_batch_size:
            self._pixels = self._engine.info.random_pixels(device_batch_size)
        start = now()
        self._engine(self._pixels)
        return now() - start


@cache
def code_fingerprint() -> str:
    """A hash over the library's own source: replicas of another vitdemo could give other answers."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]
