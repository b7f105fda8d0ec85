"""Ray: a cluster of one's own on this machine, or one that others started; and what of it each replica gets."""

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

from vitdemo.errors import VitdemoError, reason_of
from vitdemo.machine import cores, now

CONNECT_S, FREE_S = 5.0, 10.0


class Share(NamedTuple):
    """What a replica gets: Ray's node, a part of the node's Ray CPUs, GPUs; it is the ``number``-th of ``count`` there,
    from 0."""

    node: str
    cpus: float
    gpus: int
    number: int
    count: int


def share_cores(cores: list[int], count: int, each: int | None = None) -> list[list[int]]:
    """Who gets which cores.

    Args:
        cores: the machine's, by number.
        count: of replicas on it.
        each: cores of each replica; None is an equal share.

    Returns:
        The cores of each replica; by turns where there are too few.
    """
    if each is None and count <= len(cores):
        starts = [-(-k * len(cores) // count) for k in range(count + 1)]
        return [cores[start:stop] for start, stop in pairwise(starts)]
    each = min(each or 1, len(cores))
    return [sorted({cores[(k * each + i) % len(cores)] for i in range(each)}) for k in range(count)]


def check_ray(address: str | None) -> None:
    """Look whether replicas can be started, in a few seconds at most.

    Args:
        address: of a cluster, "host:port" or "auto"; None for one on this machine.

    Raises:
        VitdemoError: where Ray is not installed, or nothing answers at ``address``.
    """
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


def connect(address: str | None, again: bool = True) -> ModuleType:
    """Ray, connected: to the cluster at ``address``; by default the one this process has, or one started here.

    Args:
        address: as in ``check_ray``.
        again: whether to try once more where it does not start.

    Returns:
        The module ``ray``.

    Raises:
        VitdemoError: as ``check_ray``, and where this process has another Ray, or none starts.
    """
    check_ray(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # under `uv run` no worker would ever come up
    import ray

    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address and address != "auto" and _resolved(address) != _resolved(here):
            raise VitdemoError(f"ray_address {address!r}: this process has the Ray at {here}; call stop_ray() first")
        return ray
    own = {} if address else dict(include_dashboard=False, num_cpus=cores())
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # Ray raises plain ones too; it gives itself half a minute, a busy machine may need more
        if not again:
            reason = reason_of(error)
            cure = "set RAY_TMPDIR to a short path, such as /tmp" if "AF_UNIX" in reason else "see `ray status`"
            raise VitdemoError(f"Ray did not start at {address or 'this machine'}: {reason}; {cure}") from None
        print("Ray did not start; trying once more", file=sys.stderr)
        ray.shutdown()
        return connect(address, again=False)
    if threading.current_thread() is threading.main_thread():  # Ray's own would end the process without a word
        signal.signal(signal.SIGTERM, on_sigterm)
    # It tells of a lost worker in fifteen lines, whatever log_to_driver says.
    ray._private.worker.print_to_stdstream = lambda *args, **kwargs: None
    return ray


def _resolved(address: str) -> tuple[str, str]:
    """Host and port by which Ray calls an address: a number, and this machine's own one for localhost."""
    from ray.util import get_node_ip_address

    host, port = _host_and_port(address)
    with suppress(OSError):
        host = socket.gethostbyname(host)
    return get_node_ip_address() if host.startswith("127.") else host, port


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


def place_replicas(ray: ModuleType, count: int, device: str, part: float) -> list[Share]:
    """What of Ray's nodes each replica gets, once it is free.

    Args:
        ray: connected.
        count: how many replicas; each goes to where a replica's share is the largest.
        device: of the engine: on "cuda" a replica gets a GPU, else an equal share of its node's CPUs.
        part: of the CPUs that all of them may have.

    Raises:
        VitdemoError: where there are too few GPUs, or others hold them or the CPUs: Ray itself would wait for ever.
    """
    kind = "GPU" if device == "cuda" else "CPU"
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    size = {node: resources.get(kind, 0.0) for node, resources in nodes.items()}
    if kind == "GPU" and sum(size.values()) < count:
        there = f"{sum(size.values()):.0f} GPUs"
        raise VitdemoError(f"replicas {count}: there are {there}; take at most so many, or an engine on the CPU")
    placed: Counter[str] = Counter()
    for _ in range(count):
        placed[max(size, key=lambda node: size[node] / (placed[node] + 1))] += 1
    shares = []
    for node, number in sorted(placed.items()):
        cpus = int(1e4 * part * nodes[node].get("CPU", 0.0) / number) / 1e4  # Ray counts in 1e-4
        shares += [Share(node, cpus, int(kind == "GPU"), k, number) for k in range(number)]
    _wait_until_free(ray, kind, count if kind == "GPU" else sum(share.cpus for share in shares))
    return shares


def _wait_until_free(ray: ModuleType, kind: str, needed: float) -> None:
    """Those that were just ended free theirs in a moment. Ray tells of the cluster only, not of its machines."""
    begin = now()
    while (free := ray.available_resources().get(kind, 0.0)) < 0.99 * needed:
        if now() - begin > FREE_S:
            raise VitdemoError(
                f"replicas: Ray has {free:.1f} of the {needed:.1f} {kind}s that they need free; close other "
                "Replicas, or wait for the others on that cluster"
            )
        time.sleep(0.1)
