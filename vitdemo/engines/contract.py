"""What every engine promises, and the registry that finds the engines."""

import copy
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch

from vitdemo.engines.pipeline import SIZES, SLOTS, Cuda, Pipeline
from vitdemo.errors import EngineFailure, VitdemoError, reason_of
from vitdemo.machine import installed_version
from vitdemo.models.model import Model, ModelInfo
from vitdemo.precisions import NATIVE, Call, Shape, no_cuda


class Engine(ABC):
    """A model ready to run: ``engine(x: uint8[B, 3, H, W]) -> float32[B, C]``, both on the CPU, any B >= 1.

    ``(x / 255 - mean) / std`` happens inside, in float32, before the cast to the engine's precision.

    A new engine is one file in this folder: a subclass that sets ``name`` and ``precisions`` and has ``_infer`` and
    ``precision_ran``. It builds itself in ``__init__(self, model, precision, *, device, threads)``; one whose runtime
    reads a file is a ``CompiledEngine`` instead. Imports of a runtime go inside these functions, so that a missing one
    costs only its own engine.

    name, precision: what was asked for. device: "cpu" or "cuda". threads: CPU threads a call uses. info: the model's.
    depth: how many submitted batches may be in flight. streams: how many of them are computed side by side; None is
    one, or as many as ``evaluate`` finds to be quicker; forms: what it found. pipeline: what feeds a GPU, see
    ``captured``; None where calls run one after the other. packages: the distributions that its
    runtime comes in. card: what ``convert`` knows of how it was made: ``card["key"]`` is the hash of everything that
    shaped it. recipe: from which ``convert`` made it, and can make it again. load_s: seconds it took to read the
    artifact, check it and make it ready to run. has_run: whether it was called yet. script: the lines by which a
    program without vitdemo makes ``logits`` of pixels (``write_script``).
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]] = ()
    depth = 1
    streams: int | None = None
    pipeline: Pipeline | None = None
    script = ""

    def __init__(self, info: ModelInfo, precision: str, *, device: str, threads: int):
        self.info = info
        self.precision = precision
        self.device = device
        self.threads = threads
        self.card: dict = {}
        self.recipe = None
        self.load_s: float | None = None
        self.has_run = False
        self.forms: dict = {}
        self._worker: ThreadPoolExecutor | None = None

    @classmethod
    def check_requirements(cls) -> None:
        """Raise VitdemoError, saying what to install, where this machine lacks what building the engine needs."""
        if missing := [name for name in cls.packages if not installed_version(name)]:
            raise VitdemoError(f"{cls.name} engine: needs {', '.join(missing)}; run pip install {' '.join(missing)}")

    @classmethod
    def runs_on(cls, device: str) -> bool:
        """Whether the engine computes on ``device``, "cpu" or "cuda", given a machine that has one."""
        return device == "cpu"

    @classmethod
    def support(cls, device: str) -> dict[str, str]:
        """How ``device`` computes in each of ``precisions``: "native", "emulated" (it can, slower than in fp32) or
        "absent" (the runtime computes in another precision), by the runtime's own words, see ``support_of``. One that
        is for the other device alone is left out."""
        return dict.fromkeys(cls.precisions, NATIVE)

    @classmethod
    def answers(cls, device: str = "auto") -> dict[str, str]:
        """``support`` for the device that ``convert`` would take. Raises VitdemoError where no runtime starts."""
        try:
            return cls.support(resolve_device(device, cls))
        except (ImportError, OSError, RuntimeError) as error:
            reason = reason_of(error)
            raise VitdemoError(f"{cls.name} engine: its runtime does not start ({reason}); install it again") from None

    @classmethod
    def native(cls, device: str = "auto") -> tuple[str, ...]:
        """Those of ``precisions`` that are native on ``device``; errors as in ``answers``."""
        return tuple(name for name, support in cls.answers(device).items() if support == NATIVE)

    @classmethod
    def product(cls, precision: str, shape: Shape, threads: int) -> Call | None:
        """A call that multiplies an [m, k] matrix by a [k, n] one, by which precisions and roofs are measured.

        Args:
            precision: of both matrices.
            shape: m, k, n.
            threads: CPU threads that it uses.

        Returns:
            None where the runtime does not multiply in ``precision`` here, or has no plain products.
        """
        return None

    @abstractmethod
    def _infer(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, float32[B, C] on the CPU, of a checked uint8[B, 3, H, W]."""

    @property
    @abstractmethod
    def precision_ran(self) -> dict[str, float]:
        """The share of multiply-accumulates in each precision, as read back from the runtime; a precision that is
        emulated here is called so, ``bf16 emulated``."""

    def layers(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the layers gave on the way to the logits, float32 on the CPU by the names of ``graph.tap_points``.

        The last entry, "logits", is of the very run that gave the layers: where looking inside needs a twin of the
        artifact, it shows how far the twin is from it. Empty for an engine that nobody can look into.
        """
        return {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of one batch. Raises VitdemoError when ``x`` is not uint8[B >= 1, 3, H, W] on the CPU."""
        if self.pipeline:
            return self.submit(x).result()
        self._check(x)
        self.has_run = True
        return self._infer(x)

    def submit(self, x: torch.Tensor) -> "Future[torch.Tensor]":
        """Start one batch and return at once; ``x`` must stay untouched until the future is done."""
        self._check(x)
        self.has_run = True
        if self.pipeline:
            return self.pipeline.submit(x)
        if self._worker is None:
            lanes = self.depth if self.streams in (None, 1) else self.streams
            self._worker = ThreadPoolExecutor(lanes, thread_name_prefix=f"engine-{self.name}")
        return self._worker.submit(self._infer, x)

    def side_by_side(self) -> "Engine":
        """This engine with one call on each of its threads, at the same time; itself where it has one thread.

        A call takes longer, and many of them together less time. What was loaded is shared as far as the runtime can.
        Raises EngineFailure where the runtime cannot load what is not shared.
        """
        if self.streams or self.threads == 1:
            return self
        other = copy.copy(self)
        other.threads, other.streams = 1, self.threads
        other.depth = other.streams + 1  # the next batch lies ready when one is done
        other.forms, other._worker = {}, None
        for kept in ("_tapped", "precision_ran"):  # of this one
            vars(other).pop(kept, None)
        try:
            other._open_streams()
        except Exception as error:  # a runtime may raise anything
            raise EngineFailure(f"the {self.name} engine has no {other.streams} streams: {reason_of(error)}") from error
        return other

    def _open_streams(self) -> None:  # noqa: B027, as most engines share all they have
        """Load again what cannot be shared with an engine of another ``threads`` and ``streams``."""

    def close(self) -> None:
        """Wait for what is in flight and give threads back. The engine may be used again afterwards."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)
            self._worker = None
        if self.pipeline:
            self.pipeline.close()

    def captured(
        self, compute: Callable[[torch.Tensor], torch.Tensor], device: Cuda, sizes: tuple[int, ...] = SIZES
    ) -> None:
        """Have ``compute``, from uint8 pixels on ``device`` to float32 logits there, captured and fed by a pipeline."""
        self.pipeline = Pipeline(device, compute, self.info.preprocessing.input_size, sizes)
        self.depth = SLOTS

    def _check(self, x: torch.Tensor) -> None:
        size = self.info.preprocessing.input_size
        if not isinstance(x, torch.Tensor):
            raise VitdemoError(f"{self.name} engine: a batch is a torch tensor, not {type(x).__name__}")
        if x.dtype != torch.uint8 or x.device.type != "cpu" or x.ndim != 4 or len(x) == 0 or x.shape[1:] != size:
            raise VitdemoError(
                f"{self.name} engine: a batch is uint8[B >= 1, {', '.join(map(str, size))}] on the CPU, "
                f"not {str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
            )


class CompiledEngine(Engine):
    """An engine whose runtime reads files: ``build`` writes them once, ``__init__`` loads them.

    calibrated: the precisions whose ``build`` needs images to find the ranges of the activations.
    """

    calibrated: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __init__(self, folder: Path, info: ModelInfo, precision: str, *, device: str, threads: int):
        """Load what ``build`` wrote into ``folder``.

        Raises VitdemoError for what this machine lacks; any other exception means that the artifact is damaged, and it
        is built again.
        """
        super().__init__(info, precision, device=device, threads=threads)

    @classmethod
    @abstractmethod
    def build(
        cls, model: Model, precision: str, folder: Path, *, device: str, calibration: torch.Tensor | None
    ) -> None:
        """Write the artifact of ``model`` into the empty ``folder``; nothing else is kept.

        Args:
            model: is left as it is.
            precision: one of ``precisions``.
            folder: whose files the runtime will read.
            device: "cpu" or "cuda".
            calibration: uint8[N, 3, H, W] for the precisions in ``calibrated``, else None.

        Raises:
            VitdemoError: for what the user can put right, such as a missing compiler.
        """


@cache
def find_engines() -> dict[str, type[Engine]]:
    """Every engine in this folder by name. Imports no runtime, so it works whatever is installed."""
    package = importlib.import_module("vitdemo.engines")
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return {cls.name: cls for cls in classes if issubclass(cls, Engine) and hasattr(cls, "name")}


def resolve_device(device: str, cls: type[Engine]) -> str:
    """ "cpu" or "cuda" for an engine.

    Args:
        device: "auto" takes CUDA where there is one and the engine runs on it.
        cls: the engine.

    Raises:
        VitdemoError: for a device that is unknown, missing, or not the engine's.
    """
    if device == "auto":
        return "cuda" if cls.runs_on("cuda") and not no_cuda() else "cpu"
    if device not in ("cpu", "cuda"):
        raise VitdemoError(f"device {device!r}: there are auto, cpu, cuda")
    if device == "cuda" and (reason := no_cuda()):
        raise VitdemoError(f"device 'cuda': {reason}; use cpu or auto")
    if not cls.runs_on(device):
        raise VitdemoError(f"device {device!r}: the {cls.name} engine does not run on it here; use cpu or auto")
    return device


def precisions_here(device: str = "auto") -> dict[str, dict[str, str]]:
    """What every engine that is installed, and runs on ``device``, answers of its precisions, by its name.

    An engine whose runtime does not start is left out: it costs its own part alone.
    """
    found = {}
    for name, cls in find_engines().items():
        if all(map(installed_version, cls.packages)):
            with suppress(VitdemoError):
                found[name] = cls.answers(device)
    return found
