"""The machine's cores, memory, instructions and versions as one record; timers, and this process's memory."""

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from math import ceil
from pathlib import Path
from typing import TextIO

import psutil

from vitdemo.paths import REPOSITORY

now = time.perf_counter


def seconds_of(call: Callable[..., object], *arguments: object) -> float:
    """The seconds that one call of ``call`` with these arguments takes."""
    start = now()
    call(*arguments)
    return now() - start


PACKAGES = "vitdemo torch torchvision timm transformers pillow openvino nncf onnxruntime onnxruntime-gpu ray".split()
# Instructions for bf16 and int8, by PyTorch's names
SMALL_NUMBERS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "bf16", "i8mm")
GROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class Phases:
    """The seconds spent in named parts of one thread's work.

    ``with phases("load"): …`` adds the block's wall time to ``phases.seconds["load"]``. Phases are
    not nested, so their sum is at most the thread's wall time.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str):
        start = now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + now() - start


def message_stream() -> TextIO:
    """Where messages of what takes its time go: to stderr, in a notebook's kernel to stdout.

    JupyterLab shows what comes on stderr on red, as if it were an error.
    """
    return sys.stdout if type(sys.stderr).__module__ == "ipykernel.iostream" else sys.stderr


def peak_memory_bytes() -> int:
    """The largest resident size this process has had, in bytes.

    On Linux it is VmHWM of /proc/self/status, because getrusage's value survives fork and exec, so that a child would
    report its parent's peak. Elsewhere it is getrusage's, which macOS gives in bytes.
    """
    peak = _proc_field("/proc/self/status", "VmHWM")
    return int(peak.split()[0]) * 1024 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _proc_field(path: str, name: str) -> str | None:
    with suppress(OSError), open(path) as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith(name)), None)
    return None


def cores() -> int:
    """The number of CPU cores that this process may use, within the limits of its container."""
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for group in _control_groups("cpu"):
        with suppress(OSError, ValueError):  # no such file, or its value is "max": no limit
            quota, period = map(int, _read(group, "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"))
            counts += [ceil(quota / period)] if quota > 0 else []  # -1 is version 1's "no limit"
    return min(counts)


def memory_bytes() -> int:
    """The machine's memory in bytes, or its container's limit where that is lower."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for group in _control_groups("memory"):
        with suppress(OSError, ValueError):
            sizes.append(int(_read(group, "memory.max", "memory.limit_in_bytes")[0]))
    return min(sizes)


def free_memory_bytes() -> int:
    """The bytes of memory that can still be taken without swapping, within the limits of the container."""
    rooms = [psutil.virtual_memory().available]
    for group in _control_groups("memory"):
        with suppress(OSError, ValueError):
            limit = int(_read(group, "memory.max", "memory.limit_in_bytes")[0])
            used = int(_read(group, "memory.current", "memory.usage_in_bytes")[0])
            pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            files = pages.get("total_inactive_file") or pages["inactive_file"]  # file cache that the kernel gives back
            rooms.append(limit - used + int(files))
    return max(0, min(rooms))


def _control_groups(controller: str) -> list[Path]:
    """This process's cgroups and their parents, whose limits hold as well; an empty list on other systems than Linux.

    Version 2 has one tree, called "unified" where version 1 exists too. Version 1 has one tree per controller.
    https://docs.kernel.org/admin-guide/cgroup-v2.html and …/cgroup-v1/index.html

    Args:
        controller: "cpu" or "memory".
    """
    found: list[Path] = []
    with suppress(OSError):
        for _, names, place in (line.split(":", 2) for line in OWN_GROUP.read_text().splitlines()):
            if not names or controller in names.split(","):
                for root in [GROUPS / controller] if names else [GROUPS, GROUPS / "unified"]:
                    inner = root / place.lstrip("/")  # may be invisible inside a container, which sees the root instead
                    found += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
    return found


def _read(group: Path, name: str, *older: str) -> list[str]:
    """The values in the file ``name`` of a cgroup; in version 1 those of the files ``older``, which mean the same."""
    files = [group / name] if (group / name).exists() else [group / each for each in older]
    return [value for file in files for value in file.read_text().split()]


def versions() -> dict[str, str | None]:
    """The installed versions of all packages that can change a result."""
    return {name: installed_version(name) for name in PACKAGES}


def installed_version(package: str) -> str | None:
    """The installed version of a distribution, or None; nothing is imported.

    Args:
        package: the distribution's name for pip.
    """
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def machine_record() -> dict:
    """The machine on which a number was measured: processor, cores, memory, instruction set, versions, GPU.

    It is a plain dict that JSON can hold, and is stored with every result.

    isa: the instruction set that PyTorch uses, and the instructions for bf16 and int8, such as
    ``AVX512 avx512_bf16 avx512_vnni``.
    precisions: how torch computes in each precision, "native" or "emulated"; ``vitdemo doctor`` asks every engine.
    """
    import torch

    from vitdemo.precisions import no_cuda, torch_support

    has = torch.cpu.get_capabilities()
    return {
        "cpu": _proc_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "isa": " ".join([torch.backends.cpu.get_cpu_capability(), *(name for name in SMALL_NUMBERS if has.get(name))]),
        "precisions": dict(torch_support()),
        "gpu": None if no_cuda() else torch.cuda.get_device_name(),
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": versions(),
    }


@cache
def source_commit() -> str:
    """The commit of vitdemo's source, with ``+`` appended where files have changed since; "unknown" without git."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty=+", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def describe_machine(record: dict) -> str:
    """One line for people: ``AMD EPYC …, 2 cores, 23 GiB, AVX512 avx512_bf16, bf16 native, no GPU, torch 2.15.0``.

    Args:
        record: the result of ``machine_record``, on this machine or on another one.
    """
    parts = [record["cpu"], f"{record['cores']} cores", f"{record['memory_bytes'] / 2**30:.0f} GiB", record["isa"]]
    parts += [f"bf16 {record['precisions']['bf16']}", record["gpu"] or "no GPU", f"torch {record['versions']['torch']}"]
    return ", ".join(parts)
