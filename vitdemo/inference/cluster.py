"""Ray: starts a cluster on this machine or connects to an existing one, and gives each replica its share."""

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
    """The share of a replica: Ray's node, the number of the node's Ray CPUs, and of GPUs.

    It is the ``number``-th of ``count`` replicas on that node, counted from 0.
    """

    node: str
    cpus: float
    gpus: int
    number: int
    count: int


def share_cores(cores: list[int], count: int, each: int | None = None) -> list[list[int]]:
    """Distribute a machine's cores over its replicas.

    Args:
        cores: the numbers of the machine's cores.
        count: the number of replicas on the machine.
        each: the number of cores per replica; None is an equal share.

    Returns:
        The cores of each replica. If there are too few, replicas share cores.
    """
    if each is None and count <= len(cores):
        starts = [-(-k * len(cores) // count) for k in range(count + 1)]
        return [cores[start:stop] for start, stop in pairwise(starts)]
    each = min(each or 1, len(cores))
    return [sorted({cores[(k * each + i) % len(cores)] for i in range(each)}) for k in range(count)]


def check_ray(address: str | None) -> None:
    """Check within a few seconds whether replicas can be started.

    Args:
        address: the address of a cluster, "host:port" or "auto"; None for a cluster on this machine.

    Raises:
        VitdemoError: where Ray is not installed, or nothing answers at ``address``.
    """
    if find_spec("ray") is None:
        raise VitdemoError("replicas: need Ray; run pip install ray")
    if address and address != "auto":  # Ray itself would try for a whole minute
        host, port = _host_and_port(address)
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        except (OSError, ValueError, OverflowError) as error:
            cure = "on the head run `ray start --head`, and give host:port as it prints them"
            raise VitdemoError(f"ray_address {address!r}: nothing answers there ({error}); {cure}") from None


def connect(address: str | None, again: bool = True) -> ModuleType:
    """Connect Ray to the cluster at ``address``, or to the one that this process already has, or start one here.

    Args:
        address: as in ``check_ray``.
        again: whether to try once more if Ray does not start.

    Returns:
        The module ``ray``, connected.

    Raises:
        VitdemoError: as in ``check_ray``, and where this process has another Ray, or Ray does not start.
    """
    check_ray(address)
    # Otherwise Ray reports its use to its developers, no worker starts under `uv run`, and replicas have niceness 15:
    # on a busy machine they would get less of their cores than an engine in this process, with which they are compared.
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "RAY_worker_niceness"):
        os.environ.setdefault(name, "0")
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
    except Exception as error:  # of any type; Ray waits for half a minute, which may be too short on a busy machine
        if not again:
            reason = reason_of(error)
            cure = "set RAY_TMPDIR to a short path, such as /tmp" if "AF_UNIX" in reason else "see `ray status`"
            raise VitdemoError(f"Ray did not start at {address or 'this machine'}: {reason}; {cure}") from None
        print("Ray did not start; trying once more", file=sys.stderr)
        ray.shutdown()
        return connect(address, again=False)
    if threading.current_thread() is threading.main_thread():  # Ray's handler would end the process silently
        signal.signal(signal.SIGTERM, on_sigterm)
    # Ray ignores log_to_driver when it reports a lost worker, in fifteen lines.
    ray._private.worker.print_to_stdstream = lambda *args, **kwargs: None
    return ray


def _resolved(address: str) -> tuple[str, str]:
    """The host and port of an address in Ray's form: an IP address, and this machine's own one for localhost."""
    from ray.util import get_node_ip_address

    host, port = _host_and_port(address)
    with suppress(OSError):
        host = socket.gethostbyname(host)
    return get_node_ip_address() if host.startswith("127.") else host, port


def _host_and_port(address: str) -> tuple[str, str]:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    return host, port


def stop_ray() -> None:
    """Stop the Ray that this process started, or leave the cluster. This also happens when the process ends."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def loss_of(error: Exception) -> str:
    """The reason why Ray lost a replica, as one line of Ray's long message."""
    if missing := re.search(r"No module named '[\w.]+'", str(error)):  # in the traceback of the actor's creation
        return f"{missing[0]}: install on that machine what is installed here"
    return reason_of(MemoryError() if "low on memory" in str(error) else error)


def place_replicas(ray: ModuleType, count: int, device: str, part: float) -> list[Share]:
    """Choose each replica's share of Ray's nodes, and wait until the shares are free.

    Args:
        ray: the module, connected.
        count: the number of replicas; each goes to the node where its share is the largest.
        device: the engine's device: for "cuda" a replica gets a GPU, otherwise an equal share of its node's CPUs.
        part: the fraction of the CPUs that all replicas together may have.

    Raises:
        VitdemoError: where there are too few GPUs, or GPUs or CPUs are in use; Ray itself would wait for ever.
    """
    kind = "GPU" if device == "cuda" else "CPU"
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    size = {node: resources.get(kind, 0.0) for node, resources in nodes.items()}
    if kind == "GPU" and sum(size.values()) < count:
        there = f"{sum(size.values()):.0f} GPUs"
        raise VitdemoError(f"replicas {count}: there are {there}; take at most that many, or an engine on the CPU")
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
    """Wait until the whole cluster has enough free; replicas that have just ended free their share in a moment."""
    begin = now()
    while (free := ray.available_resources().get(kind, 0.0)) < 0.99 * needed:
        if now() - begin > FREE_S:
            wrong = f"Ray has {free:.1f} of the {needed:.1f} {kind}s that they need free"
            raise VitdemoError(f"replicas: {wrong}; close other Replicas, or wait for the others on that cluster")
        time.sleep(0.1)
