"""The contract that every engine fulfils, and the registry that finds the engines."""

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

    The engine itself computes ``(x / 255 - mean) / std`` in float32, before the cast to its precision.

    A new engine is one file in this folder: a subclass that sets ``name`` and ``precisions`` and implements ``_infer``
    and ``precision_ran``. It is built in ``__init__(self, model, precision, *, device, threads)``. An engine whose
    runtime reads files is a ``CompiledEngine`` instead. A runtime is imported inside these functions, so that only its
    own engine is unavailable where it is not installed.

    name, precision: as requested. device: "cpu" or "cuda". threads: CPU threads that a call uses. info: the model's.
    depth: the largest number of submitted batches in flight. streams: the number of batches computed at the same time;
    None means one, or as many as ``evaluate`` finds to be faster. forms: the result of that trial. pipeline: the
    Pipeline that feeds a GPU, see ``captured``; None where calls run one after the other. devices: where it can
    compute, see ``runs_on``. packages: the distributions
    that contain the runtime. card: a record of how ``convert`` made the engine; ``card["key"]`` is the hash of
    everything on which it depends. recipe: the Recipe from which ``convert`` made it, and can make it again. load_s:
    the seconds to read and check the artifact and make it ready to run. has_run: whether it has been called. script:
    the lines with which a program without vitdemo computes ``logits`` from pixels (``write_script``).
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
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
        """Raise VitdemoError with installation advice where a requirement for building the engine is missing."""
        if missing := [name for name in cls.packages if not installed_version(name)]:
            raise VitdemoError(f"{cls.name} engine: needs {', '.join(missing)}; run pip install {' '.join(missing)}")

    @classmethod
    def runs_on(cls, device: str) -> bool:
        """Whether the engine can compute on ``device``, "cpu" or "cuda", if the machine has one."""
        return device in cls.devices

    @classmethod
    def support(cls, device: str) -> dict[str, str]:
        """How ``device`` computes in each of ``precisions``, as the runtime reports it (see ``support_of``).

        A value is "native", "emulated" (possible, but slower than fp32) or "absent" (the runtime computes in another
        precision). A precision that exists only on the other device is left out.
        """
        return dict.fromkeys(cls.precisions, NATIVE)

    @classmethod
    def answers(cls, device: str = "auto") -> dict[str, str]:
        """``support`` for the device that ``convert`` would take. Raises VitdemoError if the runtime does not start."""
        try:
            return cls.support(resolve_device(device, cls))
        except (ImportError, OSError, RuntimeError) as error:
            reason = reason_of(error)
            raise VitdemoError(f"{cls.name} engine: its runtime does not start ({reason}); install it again") from None

    @classmethod
    def native(cls, device: str = "auto") -> tuple[str, ...]:
        """The native ones of ``precisions`` on ``device``; errors as in ``answers``."""
        return tuple(name for name, support in cls.answers(device).items() if support == NATIVE)

    @classmethod
    def product(cls, precision: str, shape: Shape, threads: int) -> Call | None:
        """A function that multiplies an [m, k] by a [k, n] matrix, for measuring precisions and roofs.

        Args:
            precision: the precision of both matrices.
            shape: m, k, n.
            threads: CPU threads that the function uses.

        Returns:
            The function, or None where the runtime cannot multiply in ``precision`` here or has no plain products.
        """
        return None

    @abstractmethod
    def _infer(self, x: torch.Tensor) -> torch.Tensor:
        """The logits, float32[B, C] on the CPU, of a checked uint8[B, 3, H, W]."""

    @property
    @abstractmethod
    def precision_ran(self) -> dict[str, float]:
        """The share of multiply-accumulates in each precision, as read back from the runtime.

        The name of an emulated precision says so: ``bf16 emulated``.
        """

    def layers(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs of the layers for one batch, float32 on the CPU, by the names of ``graph.tap_points``.

        The last entry, "logits", comes from the same run as the layers. Where they need a second version of the
        artifact, it shows how far that version is from the artifact. Empty for an engine whose layers cannot be read.
        """
        return {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The logits of one batch. Raises VitdemoError when ``x`` is not uint8[B >= 1, 3, H, W] on the CPU."""
        if self.pipeline:
            return self.submit(x).result()
        self._check(x)
        self.has_run = True
        return self._infer(x)

    def submit(self, x: torch.Tensor) -> "Future[torch.Tensor]":
        """Start one batch and return a future at once; ``x`` must not be changed until the future is done."""
        self._check(x)
        self.has_run = True
        if self.pipeline:
            return self.pipeline.submit(x)
        if self._worker is None:
            lanes = self.depth if self.streams in (None, 1) else self.streams
            self._worker = ThreadPoolExecutor(lanes, thread_name_prefix=f"engine-{self.name}")
        return self._worker.submit(self._infer, x)

    def side_by_side(self) -> "Engine":
        """This engine with simultaneous calls, one per thread; the engine itself where it has one thread.

        Each call then takes longer, but many calls together may take less time. The loaded model is shared as far as
        the runtime allows. Raises EngineFailure where the runtime cannot load the part that is not shared.
        """
        if self.streams or self.threads == 1:
            return self
        other = copy.copy(self)
        other.threads, other.streams = 1, self.threads
        other.depth = other.streams + 1  # so that the next batch is waiting when one is done
        other.forms, other._worker = {}, None
        for kept in ("_tapped", "precision_ran"):  # cached values of the original engine
            vars(other).pop(kept, None)
        try:
            other._open_streams()
        except Exception as error:  # a runtime may raise anything
            raise EngineFailure(f"the {self.name} engine has no {other.streams} streams: {reason_of(error)}") from error
        return other

    def _open_streams(self) -> None:  # noqa: B027, because most engines share everything
        """Load again the parts that an engine with other ``threads`` and ``streams`` cannot share."""

    def close(self) -> None:
        """Wait for batches in flight and stop the threads. The engine may be used again afterwards."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)
            self._worker = None
        if self.pipeline:
            self.pipeline.close()

    def captured(
        self, compute: Callable[[torch.Tensor], torch.Tensor], device: Cuda, sizes: tuple[int, ...] = SIZES
    ) -> None:
        """Capture ``compute`` (uint8 pixels on ``device`` -> float32 logits there), and feed it by a Pipeline."""
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
        """Load the artifact that ``build`` wrote into ``folder``.

        Raises VitdemoError where this machine lacks something. Any other exception means that the artifact is damaged;
        it is then built again.
        """
        super().__init__(info, precision, device=device, threads=threads)

    @classmethod
    @abstractmethod
    def build(
        cls, model: Model, precision: str, folder: Path, *, device: str, calibration: torch.Tensor | None
    ) -> None:
        """Write the artifact of ``model`` into the empty ``folder``; nothing else is kept.

        Args:
            model: the model, which is not changed.
            precision: one of ``precisions``.
            folder: the folder whose files the runtime will read.
            device: "cpu" or "cuda".
            calibration: uint8[N, 3, H, W] for the precisions in ``calibrated``, otherwise None.

        Raises:
            VitdemoError: for a problem that the user can solve, such as a missing compiler.
        """


@cache
def find_engines() -> dict[str, type[Engine]]:
    """All engines in this folder by name. No runtime is imported, so it works without any of them."""
    package = importlib.import_module("vitdemo.engines")
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return {cls.name: cls for cls in classes if issubclass(cls, Engine) and hasattr(cls, "name")}


def resolve_device(device: str, cls: type[Engine]) -> str:
    """The device on which an engine will compute, "cpu" or "cuda".

    Args:
        device: "cpu", "cuda", or "auto", which takes CUDA if there is a GPU and the engine supports it.
        cls: the engine.

    Raises:
        VitdemoError: for a device that is unknown, missing, or not supported by the engine.
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
    """The ``answers`` of all engines that are installed and run on ``device``, by the engine's name.

    An engine whose runtime does not start is left out, so that the other engines stay usable.
    """
    found = {}
    for name, cls in find_engines().items():
        if all(map(installed_version, cls.packages)):
            with suppress(VitdemoError):
                found[name] = cls.answers(device)
    return found
