"""``convert``: from a Model to an Engine ready to run. Engines that take long to build are built once and cached.

An artifact is a folder in the cache, named by the hash of everything that it depends on. It is written under another
name and then renamed, so that a folder with the right name is complete. Its ``card.json`` records how it was made.
"""

import atexit
import fcntl
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from uuid import uuid4

import pandas as pd
import torch
from filelock import FileLock, Timeout
from torch import nn

from vitdemo.dataset.tars import TARS
from vitdemo.engines import graph
from vitdemo.engines.calibration import Calibration, CalibrationImages, calibration_for
from vitdemo.engines.contract import CompiledEngine, Engine, find_engines, resolve_device
from vitdemo.engines.pipeline import gpu_record
from vitdemo.errors import VitdemoError, at_least_1, named_errors, reason_of
from vitdemo.machine import cores, free_memory_bytes, installed_version, message_stream, now
from vitdemo.models.loading import weights_sha256
from vitdemo.models.model import Model, ModelInfo
from vitdemo.paths import PART, cache_root
from vitdemo.precisions import ABSENT, EMULATED

UNKNOWN = "unknown"
OF_TORCH = set(vars(nn.Module())) - {"training"}  # attributes of every module: parameters, hooks …


def architecture_sha256(module: nn.Module) -> str | None:
    """The sha256 of the architecture of ``module``, without its weights, which are hashed separately.

    It covers the module's repr, the source code of its classes and of the files that define them, and the values in its
    parts, because a LayerNorm's eps or the kind of a GELU is not in the state dict. None where the architecture cannot
    be determined: a class or a function defined in a notebook may have other code under the same name tomorrow, and one
    that another function created may hold values of that function.
    """
    classes = {cls for part in module.modules() for cls in type(part).__mro__} - {nn.Module, object}
    classes = sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__))
    told = [repr(module), *map(_source, classes), *(_source(inspect.getmodule(cls) or cls) for cls in classes)]
    for name, part in module.named_modules():
        told += [name, *_values({key: value for key, value in vars(part).items() if key not in OF_TORCH})]
    return None if None in told else _sha256("\n".join(told).encode())


def _source(thing: object) -> str | None:
    """The name and source code of a class, function or module; None where these do not determine what it does."""
    name = getattr(thing, "__qualname__", thing.__name__)
    made = getattr(thing, "__closure__", None) or inspect.isclass(thing) and "<locals>" in name
    if made or getattr(thing, "__module__", "") == "__main__":
        return None
    try:
        return f"{name}\n{inspect.getsource(thing)}"
    except TypeError:  # written in C, so it belongs to torch or Python, whose versions are in the key
        return name
    except OSError:
        return None


def _values(value: object) -> Iterator[str | None]:
    """Yield strings that identify a value, the same in every process; None where it cannot be identified."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from (str(key), *_values(value[key]))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _values(each)
    elif isinstance(value, partial):
        yield from _values((value.func, value.args, value.keywords))
    elif isinstance(value, torch.Tensor):  # numpy does not know bfloat16
        yield _sha256((value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True).tobytes())
    elif inspect.isclass(value) or inspect.isroutine(value):
        yield _source(value)
    else:
        ordered = sorted(map(repr, value)) if isinstance(value, (set, frozenset)) else value
        yield re.sub(r" at 0x[0-9a-f]+", "", repr(ordered))


# The folder of the artifacts; listing and clearing it.


CARD = "card.json"
ELSEWHERE = ", or set VITDEMO_CACHE to a folder where you may write"
CARD_COLUMNS = ["model", "weights", "engine", "precision", "bytes", "build_s", "built", "key"]


def artifacts_root() -> Path:
    """The folder of the artifacts."""
    return cache_root() / "artifacts"


def cached_artifacts() -> pd.DataFrame:
    """The content of the cache, one row per artifact: model, weights, engine, precision, bytes, build_s, built, key."""
    rows = []
    for path in sorted(artifacts_root().glob(f"*/{CARD}")):
        if path.parent.name.endswith(PART):  # still being built
            continue
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
            size = sum(file["bytes"] for file in card["files"].values())
            row = {"model": card["model"]["tag"], "weights": card["model"]["weights"], "bytes": size}
            rows.append(row | {name: card[name] for name in CARD_COLUMNS if name not in row})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            rows.append({"model": f"unreadable: {path.parent.name}", "bytes": _bytes_below(path.parent)})
    return pd.DataFrame(rows, columns=CARD_COLUMNS)


def clear_cache() -> int:
    """Remove the decompressed tars and all artifacts, except those that are being built or are in use.

    Returns:
        The number of bytes freed.
    """
    freed = _bytes_below(cache_root() / TARS)
    shutil.rmtree(cache_root() / TARS, ignore_errors=True)  # a process that reads a tar keeps its open file
    with named_errors(artifacts_root(), ELSEWHERE):
        for folder in [path for path in artifacts_root().glob("*") if path.is_dir()]:
            whole = str(folder).removesuffix(PART)
            with suppress(Timeout), FileLock(f"{whole}.lock", blocking=False), ExitStack() as claim:
                try:  # claim it: a process that begins to load from the folder has to wait
                    card = claim.enter_context(open(folder / CARD, "r+"))  # NFS can lock only files opened for writing
                    fcntl.flock(card, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # a process has loaded an engine from there, and may read further files
                    print(f"{folder}: in use by a running program, kept", file=sys.stderr)
                    continue
                except OSError:  # there is no card, or the file system has no locks
                    pass
                freed += _bytes_below(folder)
                shutil.rmtree(folder, ignore_errors=True)
    return freed  # the lock files stay, because a process may be waiting for one


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


BUILD_MEMORY = 6  # times the size of the weights; a little more than any build of a ViT-B/16 took


def convert(
    model: Model,
    engine: str = "eager",
    precision: str = "fp32",
    *,
    calibration: CalibrationImages = None,
    device: str = "auto",
    threads: int | None = None,
    force: bool = False,
) -> Engine:
    """Load ``model`` in ``engine`` and ``precision`` from the cache, or build it first and keep it there.

    A line on stderr says so if the precision is emulated.

    Args:
        model: the model; each call reads its architecture and its weights again.
        engine: the engine's name, one of ``find_engines()``.
        precision: one of the engine's ``precisions``.
        calibration: the images that int8 needs, see ``calibration_for``.
        device: "cpu", "cuda", or "auto" (CUDA if there is a GPU and the engine supports it).
        threads: CPU threads that a call may use; all cores by default.
        force: build it again even if the cache has it.

    Returns:
        The engine, ready to run.

    Raises:
        VitdemoError: for an unknown engine, precision or device, with a list of the known ones; for a precision that
            the runtime does not have on this processor; for a runtime that is not installed; and when calibration
            images are missing.
    """
    at_least_1(threads=threads)
    what = recipe_for(model, engine, precision, calibration=calibration, device=device)
    return what.engine(threads or cores(), force)


def recipe_for(
    model: Model, engine: str, precision: str, *, calibration: CalibrationImages = None, device: str = "auto"
) -> "Recipe":
    """The Recipe from which ``convert`` makes the engine, with the same arguments and errors."""
    engines = find_engines()
    if engine not in engines:
        raise VitdemoError(f"engine {engine!r}: there is no such engine; there are {_listed(sorted(engines))}")
    cls = engines[engine]
    if precision not in cls.precisions:
        raise VitdemoError(f"precision {precision!r}: the {engine} engine has {_listed(cls.precisions)}")
    if cls.packages:  # loading needs these too; build itself checks what only building needs, such as a compiler
        cls.check_requirements()
    device = resolve_device(device, cls)
    _say_what_is_not_native(cls, precision, device)
    images = calibration_for(model, calibration) if precision in getattr(cls, "calibrated", ()) else None
    return Recipe.of(model, cls, precision, device, images)


@dataclass(frozen=True)
class Recipe:
    """The inputs from which an engine is made, and the key under which the cache stores it.

    hashes: the hashes of the architecture, of the code that builds the engine, and of the calibration images.
    model, calibration: the model and the images from which the engine is built; None in a ``ticket``.
    """

    cls: type[Engine]
    precision: str
    device: str
    info: ModelInfo
    hashes: dict[str, str | None]
    model: Model | None
    calibration: Calibration | None

    @classmethod
    def of(
        cls, model: Model, engine: type[Engine], precision: str, device: str, calibration: Calibration | None = None
    ) -> "Recipe":
        """The recipe for ``model`` in its present state."""
        weights_sha256(model.module)  # reads the weights again, because torch does not notice writes through ``.data``
        model = Model(model.module, model.info)
        hashes = {
            "architecture": architecture_sha256(model.module) or f"{UNKNOWN} {uuid4()}",
            "builder": _sha256(f"{_source(inspect.getmodule(engine) or engine)}\n{_source(graph)}".encode()),
            "calibration": calibration and calibration.fingerprint,
        }
        return cls(engine, precision, device, model.info, hashes, model, calibration)

    @property
    def ingredients(self) -> dict:
        """Everything on which the engine depends on this machine, as a dict for JSON."""
        packages = ("vitdemo", "torch", "torchvision", "timm", "transformers", *self.cls.packages)
        return {
            "engine": self.cls.name,
            "precision": self.precision,
            "device": self.device,
            "model": asdict(replace(self.info, class_names=None)),  # class names do not change the engine
            **self.hashes,
            "versions": {name: installed_version(name) for name in packages},
            "instruction_set": [name for name, has in sorted(torch.cpu.get_capabilities().items()) if has is True],
            **({"gpu": gpu_record()} if self.device == "cuda" else {}),
        }

    @property
    def key(self) -> str:
        """The sha256 of the ingredients. It differs on a machine that needs a different artifact."""
        return _sha256(json.dumps(self.ingredients, sort_keys=True).encode())

    @property
    def folder_name(self) -> str:
        name = re.sub(r"[^\w.]+", "_", self.info.tag)
        return f"{name}-{self.cls.name}-{self.precision}-{self.key[:16]}"

    def ticket(self) -> "Recipe":
        """This recipe without the model, with which another process gets the same engine from a cache."""
        return replace(self, model=None, calibration=None)

    def engine(self, threads: int, force: bool = False) -> Engine:
        """The engine, from the cache; it is built first if the cache lacks it or ``force`` is given."""
        if issubclass(self.cls, CompiledEngine):
            with named_errors(artifacts_root(), ELSEWHERE):
                ready = self._cached(threads, force)
        else:
            card = {"key": self.key, **self.ingredients}  # outside the measured time
            with self._named("cannot be made ready"):
                ready = self._ready(card, threads, self.model)
        ready.recipe = self
        return ready

    def open(self, recipe: "Callable[[], Recipe]", threads: int) -> Engine:
        """The engine of a ticket from this machine's cache, or made from ``recipe`` where the cache lacks it."""
        with suppress(Exception):  # after any failure the engine is built below
            return self.load(artifacts_root() / self.folder_name, threads)
        return recipe().engine(threads)

    def load(self, folder: Path, threads: int) -> Engine:
        """Load the engine that was built into ``folder``. May raise any exception if it is damaged or another one."""
        # Where the cache holds links, take the folder to which they lead: runtimes refuse weights outside their folder.
        card = (folder / CARD).resolve()
        folder = card.parent if card.name == CARD else folder
        with open(folder / CARD, encoding="utf-8") as file:
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(file, fcntl.LOCK_SH)  # marks the artifact as in use
            card = json.load(file)
            if card["key"] != self.key:
                raise ValueError("its card is that of another artifact")
            if card["files"] != _files(folder):
                raise ValueError("its files do not have the sizes of those that were built")
            ready = self._ready(card, threads, folder, self.info)
            weakref.finalize(ready, os.close, os.dup(file.fileno()))  # keeps the lock for as long as the engine exists
        return ready

    def _ready(self, card: dict, threads: int, *source) -> Engine:
        start = now()
        ready = self.cls(*source, self.precision, device=self.device, threads=threads)
        ready.card, ready.load_s = card, now() - start
        return ready

    def _cached(self, threads: int, force: bool) -> Engine:
        folder = artifacts_root() / self.folder_name
        if not force:
            try:
                return self.load(folder, threads)  # without a lock, because a cache may be read-only
            except VitdemoError:
                raise
            except Exception:  # missing or damaged; damage is reported below
                pass
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # the system releases the lock of a process that dies
            if folder.exists() and not force:
                try:
                    return self.load(folder, threads)
                except VitdemoError:  # this machine lacks something, which a new build would lack too
                    raise
                except Exception as error:  # runtimes raise many types for a damaged file; the remedy is the same
                    print(f"{folder}: cannot be used ({reason_of(error)}); building it again", file=message_stream())
            self._build(folder)
            with self._named("it was built, and cannot be loaded"):
                return self.load(folder, threads)

    def _build(self, folder: Path) -> None:
        partial = folder.with_name(folder.name + PART)
        shutil.rmtree(partial, ignore_errors=True)  # left by a build that was killed
        self._check_room(folder.parent)
        partial.mkdir()
        print(f"building {self.cls.name} {self.precision} of {self.info.tag}, once", file=message_stream())
        try:
            start = now()
            pixels = self.calibration.pixels if self.calibration else None
            with self._named("cannot be built"):
                self.cls.build(self.model, self.precision, partial, device=self.device, calibration=pixels)
            made = {"build_s": now() - start, "built": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}
            card = {"key": self.key, **made, "files": _files(partial), **self.ingredients}
            card["calibration"] = self.calibration and self.calibration.to_dict()
            (partial / CARD).write_text(json.dumps(card, indent=2), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            if self.hashes["architecture"].startswith(UNKNOWN):  # no later process can find this artifact
                atexit.register(shutil.rmtree, folder, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @contextmanager
    def _named(self, what: str):
        """Turn any exception of an exporter or a runtime inside the block into a VitdemoError of one line."""
        try:
            yield
        except (VitdemoError, OSError):
            raise
        except Exception as error:
            why = f"{what} ({reason_of(error)}); see `vitdemo doctor`, or take another engine"
            raise VitdemoError(f"{self.cls.name} {self.precision} of {self.info.tag}: {why}") from error

    def _check_room(self, folder: Path) -> None:
        """Raise VitdemoError where a build needs more disk or memory than is free.

        Otherwise the process would end without a message, when the disk fills while torch writes, or memory runs out.
        """
        weights = sum(tensor.nbytes for tensor in self.model.module.state_dict().values())
        needed = 3 * weights + (16 << 20)  # the artifact, an exported copy, and some more for the runtime
        free = shutil.disk_usage(folder).free
        if needed > free:
            room = f"a build may need {needed / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free"
            raise VitdemoError(f"{folder}: {room}; make room, or set VITDEMO_CACHE to another folder")
        needed, free = BUILD_MEMORY * weights, free_memory_bytes()
        if needed > free:
            what = f"{self.cls.name} {self.precision} of {self.info.tag}"
            sizes = f"building may take {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
            raise VitdemoError(f"{what}: {sizes}; close other programs, or take eager")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


@cache
def _say_what_is_not_native(cls: type[Engine], precision: str, device: str) -> None:
    """Print one line, once, for an emulated precision. Raises VitdemoError for an absent one."""
    answers, has = cls.answers(device), _listed(cls.native(device)) or "nothing"
    own = f"{cls.name} {precision}"
    if precision not in answers:
        raise VitdemoError(f"{own}: not on the device {device!r}, where it has {_listed(answers)}")
    if (support := answers[precision]) == ABSENT:
        raise VitdemoError(f"{own}: absent here, the runtime would compute in another precision; native to it: {has}")
    if support == EMULATED:
        print(f"{own}: emulated here, slower than fp32; native to {cls.name} here: {has}", file=message_stream())


def _files(folder: Path) -> dict[str, dict]:
    """The size in bytes of every file of an artifact, without the card."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CARD)
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size} for path in paths}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
