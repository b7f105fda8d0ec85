"""Ray: a cluster of one's own on this machine, or one that others started; and what of it each replica gets."""

import logging
import os
import re
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import psutil

from vitdemo.errors import VitdemoError, reason_of
from vitdemo.machine import cores, now

CONNECT_S, FREE_S = 5.0, 10.0


def share_cores(cores: list[int], count: int, each: int | None = None) -> list[list[int]]:
    """The cores of each of ``count`` replicas: equal shares, or ``each``; by turns where there are too few."""
    if each is None and count <= len(cores):
        return [part.tolist() for part in np.array_split(cores, count)]
    each = min(each or 1, len(cores))
    return [sorted({cores[(k * each + i) % len(cores)] for i in range(each)}) for k in range(count)]


def check_ray(address: str | None) -> None:
    """Raise VitdemoError where Ray is not installed, or nothing answers at ``address``, in a few seconds at most."""
    if find_spec("ray") is None:
        raise VitdemoError("replicas: need Ray; run pip install ray")
    if address and address != "auto":  # Ray itself would try for a minute
        host, port = _host_and_port(address)
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        except (OSError, ValueError, OverflowError) as error:
            raise VitdemoError(
                f"ray_address {address!r}: nothing answers there ({error}); on the head run `ray start --head`, and "
                "give host:port as it prints them"
            ) from None


def connect(address: str | None) -> ModuleType:
    """Ray, connected: to the cluster at ``address``; by default the one this process has, or one started here."""
    check_ray(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    import ray

    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address and address != "auto" and not _same_place(address, here):
            raise VitdemoError(f"ray_address {address!r}: this process has the Ray at {here}; call stop_ray() first")
        return ray
    try:
        _start(ray, address)
    except Exception:  # Ray raises plain ones too; it gives itself half a minute, a busy machine may need more
        print("Ray did not start; trying once more", file=sys.stderr)
        ray.shutdown()
        try:
            _start(ray, address)
        except Exception as error:
            raise VitdemoError(f"Ray did not start at {address or 'this machine'}: {reason_of(error)}") from None
    if hasattr(ray._private.worker, "print_to_stdstream"):  # where Ray tells of a lost worker in fifteen lines
        ray._private.worker.print_to_stdstream = lambda *args, **kwargs: None
    return ray


def _start(ray: ModuleType, address: str | None) -> None:
    own = {} if address else dict(include_dashboard=False, num_cpus=cores())
    ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)


def _same_place(address: str, here: str) -> bool:
    """Whether both are one socket: Ray turns localhost, and names, into a number of its own."""
    (host, port), (own, own_port) = (_host_and_port(each) for each in (address, here))
    if port != own_port:
        return False
    numbers = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    with suppress(OSError):
        host, own = socket.gethostbyname(host), socket.gethostbyname(own)
    return host == own or {host, own} <= numbers


def _host_and_port(address: str) -> tuple[str, str]:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    return host, port


def stop_ray() -> None:
    """End the Ray that this process started, or leave the cluster; also happens when the process ends."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def loss_of(error: Exception) -> str:
    """Why Ray lost a replica, in one line of its many."""
    if missing := re.search(r"No module named '[\w.]+'", str(error)):  # buried in a traceback of its creation
        return f"{missing[0]}: install on that machine what is installed here"
    return reason_of(MemoryError() if "low on memory" in str(error) else error)


def place_replicas(ray: ModuleType, count: int, device: str, share: float) -> list[tuple[str, float, int]]:
    """For each replica its node, its part of that ``share`` of the node's Ray CPUs, and its GPUs.

    Raises VitdemoError where there are too few GPUs, or others hold them or the CPUs: Ray itself would wait for ever.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    cuda = device == "cuda"
    size = {node["NodeID"]: node["Resources"].get("GPU" if cuda else "CPU", 0.0) for node in nodes}
    cpus = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in nodes}
    if cuda and sum(size.values()) < count:
        there = f"{sum(size.values()):.0f} GPUs"
        raise VitdemoError(f"replicas {count}: there are {there}; take at most so many, or an engine on the CPU")
    placed: Counter[str] = Counter()
    for _ in range(count):  # each to where a replica's share is the largest
        placed[max(size, key=lambda node: size[node] / (placed[node] + 1))] += 1
    each = {node: int(1e4 * share * cpus[node] / number) / 1e4 for node, number in placed.items()}  # Ray counts in 1e-4
    needed = {"CPU": sum(each[node] * number for node, number in placed.items()), "GPU": count if cuda else 0}
    _wait_until_free(ray, needed)
    return [(node, each[node], int(cuda)) for node in sorted(placed) for _ in range(placed[node])]


def _wait_until_free(ray: ModuleType, needed: dict[str, float]) -> None:
    """Those that were just ended free theirs in a moment. Ray tells of the cluster only, not of its machines."""
    begin = now()
    while lacking := {k: free for k, n in needed.items() if (free := ray.available_resources().get(k, 0.0)) < 0.99 * n}:
        if now() - begin > FREE_S:
            kind, free = next(iter(lacking.items()))
            raise VitdemoError(
                f"replicas: Ray has {free:.1f} of the {needed[kind]:.1f} {kind}s that they need free; close other "
                "Replicas, or wait for the others on that cluster"
            )
        time.sleep(0.1)
