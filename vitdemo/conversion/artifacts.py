"""From a Model to an Engine ready to run."""

from collections.abc import Iterable

import torch

from vitdemo.conversion.engines.contract import Engine, find_engines
from vitdemo.conversion.models import Model
from vitdemo.errors import VitdemoError
from vitdemo.measure.clock import cores


def convert(
    model: Model, engine: str = "eager", precision: str = "fp32", *, device: str = "auto", threads: int | None = None
) -> Engine:
    """Build ``engine`` for ``model`` in ``precision``.

    device: "cpu", "cuda", or "auto" (CUDA where there is one). threads: CPU threads a call may use, all
    cores by default. Raises VitdemoError for an unknown engine, precision or device, listing those there are.
    """
    engines = find_engines()
    if engine not in engines:
        raise VitdemoError(f"engine {engine!r}: there is no such engine; there are {_listed(sorted(engines))}")
    if precision not in engines[engine].precisions:
        raise VitdemoError(f"precision {precision!r}: the {engine} engine has {_listed(engines[engine].precisions)}")
    if threads is not None and threads < 1:
        raise VitdemoError(f"threads {threads}: must be at least 1")
    return engines[engine](model, precision, device=_resolve_device(device), threads=threads or cores())


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise VitdemoError(f"device {device!r}: there are auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise VitdemoError("device 'cuda': torch sees no CUDA device here; use cpu or auto")
    return device
