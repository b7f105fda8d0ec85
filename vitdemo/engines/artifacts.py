"""From a Model to an Engine ready to run; what takes long to build is built once and kept.

An artifact is a folder in the cache, named by the hash of everything that shaped it. It is written under another
name and renamed, so that a folder of the right name is whole. ``card.json`` in it says how it was made.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from vitdemo.dataset.samples import Sample
from vitdemo.dataset.tars import TARS
from vitdemo.engines import graph
from vitdemo.engines.calibration import Calibration, calibration_for
from vitdemo.engines.contract import CompiledEngine, Engine, find_engines, resolve_device
from vitdemo.engines.pipeline import gpu_record
from vitdemo.errors import VitdemoError, at_least_1, named_errors, reason_of
from vitdemo.machine import cores, free_memory_bytes, installed_version, message_stream, now
from vitdemo.models.loading import weights_sha256
from vitdemo.models.model import Model, ModelInfo
from vitdemo.paths import PART, cache_root
from vitdemo.precisions import ABSENT, EMULATED

UNKNOWN = "unknown"
OF_TORCH = set(vars(nn.Module())) - {"training"}  # what every module holds: parameters, hooks …


def architecture_sha256(module: nn.Module) -> str | None:
    """sha256 of what ``module`` computes with its weights, which are hashed apart.

    That is its repr, the source of its classes, and the values that its parts hold: a LayerNorm's eps and the kind of a
    GELU are in no state dict. None where nobody can tell: a class or a function that was typed into a notebook has
    other code under the same name tomorrow, and one made by another function may hold values of that one.
    """
    classes = {cls for part in module.modules() for cls in type(part).__mro__} - {nn.Module, object}
    told = [repr(module), *map(_source, sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__)))]
    for name, part in module.named_modules():
        told += [name, *_values({key: value for key, value in vars(part).items() if key not in OF_TORCH})]
    return None if None in told else _sha256("\n".join(told).encode())


def _source(thing: object) -> str | None:
    """Where a class, a function or a module is from, and its source; None where that is not all of it."""
    name = getattr(thing, "__qualname__", thing.__name__)
    made = getattr(thing, "__closure__", None) or inspect.isclass(thing) and "<locals>" in name
    if made or getattr(thing, "__module__", "") == "__main__":
        return None
    try:
        return f"{name}\n{inspect.getsource(thing)}"
    except TypeError:  # of C: it is torch's or Python's, whose versions are in the key
        return name
    except OSError:
        return None


def _values(value: object) -> Iterator[str | None]:
    """What a value adds to what is computed, the same in every process."""
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
        yield re.sub(
            r" at 0x[0-9a-f]+", "", repr(sorted(map(repr, value)) if isinstance(value, (set, frozenset)) else value)
        )


# Where artifacts are kept, a folder each; what is there, and how to clear it.


CARD = "card.json"
ELSEWHERE = ", or set VITDEMO_CACHE to a folder where you may write"
CARD_COLUMNS = ["model", "weights", "engine", "precision", "bytes", "build_s", "built", "key"]


def artifacts_root() -> Path:
    """The folder of the artifacts."""
    return cache_root() / "artifacts"


def cached_artifacts() -> pd.DataFrame:
    """What is in the cache, one row per artifact: model, weights, engine, precision, bytes, build_s, built, key."""
    rows = []
    for path in sorted(artifacts_root().glob(f"*/{CARD}")):
        if path.parent.name.endswith(PART):  # being built
            continue
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
            size = sum(file["bytes"] for file in card["files"].values())
            row = {"model": card["model"]["tag"], "weights": card["model"]["weights"], "bytes": size}
            rows.append(row | {name: card[name] for name in CARD_COLUMNS if name not in row})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            size = _bytes_below(path.parent)
            rows.append({"model": f"unreadable: {path.parent.name}", "bytes": size})
    return pd.DataFrame(rows, columns=CARD_COLUMNS)


def clear_cache() -> int:
    """Remove every artifact but one that is being built just now, or is in use, and what tars were unpacked to.

    Returns:
        The bytes that became free.
    """
    freed = _bytes_below(cache_root() / TARS)
    shutil.rmtree(cache_root() / TARS, ignore_errors=True)  # who reads from one goes on: its open file stays
    with named_errors(artifacts_root(), ELSEWHERE):
        for folder in [path for path in artifacts_root().glob("*") if path.is_dir()]:
            whole = str(folder).removesuffix(PART)
            with suppress(Timeout), FileLock(f"{whole}.lock", blocking=False):
                with claimed(folder) as free:
                    if not free:
                        print(f"{folder}: in use by a running program, kept", file=sys.stderr)
                        continue
                    freed += _bytes_below(folder)
                    shutil.rmtree(folder, ignore_errors=True)
    return freed  # the lock files stay, as somebody may be waiting for one


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether no engine of any process that lives was loaded from ``folder``, which may yet read other files there.

    Inside, who begins to load from it waits.
    """
    with ExitStack() as stack:
        try:
            card = stack.enter_context(open(folder / CARD, "r+"))  # NFS locks only what may be written to
            fcntl.flock(card, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:  # there is no card, or no locks
            free = True
        yield free


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


BUILD_MEMORY = 6  # times the weights: a little more than the largest build of a ViT-B/16 took


def convert(
    model: Model,
    engine: str = "eager",
    precision: str = "fp32",
    *,
    calibration: Sequence[Sample] | torch.Tensor | Path | str | None = None,
    device: str = "auto",
    threads: int | None = None,
    force: bool = False,
) -> Engine:
    """``model`` in ``engine`` and ``precision``, ready to run: from the cache, or built now and kept there.

    An emulated precision is said so on stderr.

    Args:
        model: what it computes, and with which weights, is looked at anew in each call.
        engine: its name, one of ``find_engines()``.
        precision: one of the engine's ``precisions``.
        calibration: the images that int8 needs, see ``calibration_for``.
        device: "cpu", "cuda", or "auto" (CUDA where there is one).
        threads: CPU threads a call may use, all cores by default.
        force: build anew.

    Raises:
        VitdemoError: for an unknown engine, precision or device, listing those there are, for a precision that the
            runtime does not have on this processor, for a runtime that is not installed, and when calibration images
            are missing.
    """
    at_least_1(threads=threads)
    what = recipe_for(model, engine, precision, calibration=calibration, device=device)
    return what.engine(threads or cores(), force)


def recipe_for(
    model: Model,
    engine: str,
    precision: str,
    *,
    calibration: Sequence[Sample] | torch.Tensor | Path | str | None = None,
    device: str = "auto",
) -> "Recipe":
    """From what ``convert`` makes the engine; arguments and errors as there."""
    cls = _engine_class(engine, precision)
    device = resolve_device(device, cls)
    _say_what_is_not_native(cls, precision, device)
    images = calibration_for(model, calibration) if precision in getattr(cls, "calibrated", ()) else None
    return Recipe.of(model, cls, precision, device, images)


@dataclass(frozen=True)
class Recipe:
    """What an engine is made from, and how the cache knows it.

    hashes: of the architecture, of the code that builds, and of the calibration images. model, calibration: of which
    it is built; None in a ``ticket``.
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
        """For ``model`` as it is now."""
        weights_sha256(model.module)  # reads them anew, as nobody else sees what was written through ``.data``
        model = Model(model.module, model.info)
        hashes = {
            "architecture": architecture_sha256(model.module) or f"{UNKNOWN} {uuid4()}",
            "builder": _sha256(f"{_source(inspect.getmodule(engine) or engine)}\n{_source(graph)}".encode()),
            "calibration": calibration and calibration.fingerprint,
        }
        return cls(engine, precision, device, model.info, hashes, model, calibration)

    @property
    def ingredients(self) -> dict:
        """Everything that shapes the engine on this machine, as JSON can hold it."""
        packages = ("vitdemo", "torch", "torchvision", "timm", "transformers", *self.cls.packages)
        return {
            "engine": self.cls.name,
            "precision": self.precision,
            "device": self.device,
            "model": asdict(replace(self.info, class_names=None)),  # which shape nothing
            **self.hashes,
            "versions": {name: installed_version(name) for name in packages},
            "instruction_set": [name for name, has in sorted(torch.cpu.get_capabilities().items()) if has is True],
            **({"gpu": gpu_record()} if self.device == "cuda" else {}),
        }

    @property
    def key(self) -> str:
        """sha256 of the ingredients, so another one on a machine that needs another artifact."""
        return _sha256(json.dumps(self.ingredients, sort_keys=True).encode())

    @property
    def folder_name(self) -> str:
        name = re.sub(r"[^\w.]+", "_", self.info.tag)
        return f"{name}-{self.cls.name}-{self.precision}-{self.key[:16]}"

    def ticket(self) -> "Recipe":
        """This without the model: what another process needs to get the same engine from a cache."""
        return replace(self, model=None, calibration=None)

    def engine(self, threads: int, force: bool = False) -> Engine:
        """The engine; from the cache, where it is built first if it is not there or ``force`` is given."""
        if issubclass(self.cls, CompiledEngine):
            with named_errors(artifacts_root(), ELSEWHERE):
                ready = self._cached(threads, force)
        else:
            card = {"key": self.key, **self.ingredients}  # before the clock starts
            with self._named("cannot be made ready"):
                ready = self._ready(card, threads, self.model)
        ready.recipe = self
        return ready

    def open(self, recipe: "Callable[[], Recipe]", threads: int) -> Engine:
        """A ticket's engine, from this machine's cache; made from ``recipe`` where it has none."""
        with suppress(Exception):  # on any failure go on, and build
            return self.load(artifacts_root() / self.folder_name, threads)
        return recipe().engine(threads)

    def load(self, folder: Path, threads: int) -> Engine:
        """The engine that was built into ``folder``. Raises anything when it is damaged or another one."""
        # In a cache of links the folder that they lead to: runtimes refuse weights that are a link out of their folder.
        card = (folder / CARD).resolve()
        folder = card.parent if card.name == CARD else folder
        with open(folder / CARD, encoding="utf-8") as file:
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(file, fcntl.LOCK_SH)  # which says that the artifact is in use
            card = json.load(file)
            if card["key"] != self.key:
                raise ValueError("its card is that of another artifact")
            if card["files"] != _files(folder):
                raise ValueError("its files have not the sizes of those that were built")
            ready = self._ready(card, threads, folder, self.info)
            weakref.finalize(ready, os.close, os.dup(file.fileno()))  # the same lock, for as long as the engine lives
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
                return self.load(folder, threads)  # without a lock, as a cache may be read-only
            except VitdemoError:
                raise
            except Exception:  # not there, or damaged, as is said below
                pass
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # the system takes it back from a holder that dies
            if folder.exists() and not force:
                try:
                    return self.load(folder, threads)
                except VitdemoError:  # what this machine lacks a new build would not put right
                    raise
                except Exception as error:  # whatever a runtime says of a damaged file, the cure is the same
                    print(f"{folder}: cannot be used ({reason_of(error)}); building it again", file=message_stream())
            self._build(folder)
            with self._named("it was built, and cannot be loaded"):
                return self.load(folder, threads)

    def _build(self, folder: Path) -> None:
        partial = folder.with_name(folder.name + PART)
        shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed
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
            if self.hashes["architecture"].startswith(UNKNOWN):  # nobody will find it again
                atexit.register(shutil.rmtree, folder, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @contextmanager
    def _named(self, what: str):
        """Exporters and runtimes have a hundred types of errors; a VitdemoError of one line for all of them."""
        try:
            yield
        except (VitdemoError, OSError):
            raise
        except Exception as error:
            own = f"{self.cls.name} {self.precision} of {self.info.tag}"
            raise VitdemoError(
                f"{own}: {what} ({reason_of(error)}); see `vitdemo doctor`, or take another engine"
            ) from error

    def _check_room(self, folder: Path) -> None:
        """Asked before, as a disk that fills while torch writes ends the process, and memory that runs out too."""
        weights = sum(tensor.nbytes for tensor in self.model.module.state_dict().values())
        needed = 3 * weights + (16 << 20)  # an exported copy beside the artifact, and what a runtime adds
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise VitdemoError(
                f"{folder}: a build may need {needed / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free; make room, "
                "or set VITDEMO_CACHE to another folder"
            )
        needed, free = BUILD_MEMORY * weights, free_memory_bytes()
        if needed > free:
            raise VitdemoError(
                f"{self.cls.name} {self.precision} of {self.info.tag}: building may take {needed / 1e9:.1f} GB "
                f"of memory, and {free / 1e9:.1f} GB are free; close other programs, or take eager"
            )


def _engine_class(engine: str, precision: str) -> type[Engine]:
    engines = find_engines()
    if engine not in engines:
        raise VitdemoError(f"engine {engine!r}: there is no such engine; there are {_listed(sorted(engines))}")
    cls = engines[engine]
    if precision not in cls.precisions:
        raise VitdemoError(f"precision {precision!r}: the {engine} engine has {_listed(cls.precisions)}")
    if cls.packages:  # loading needs them too; what only building needs, such as a compiler, build asks for
        cls.check_requirements()
    return cls


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


@cache
def _say_what_is_not_native(cls: type[Engine], precision: str, device: str) -> None:
    """One line, once, for an emulated precision. Raises VitdemoError for an absent one."""
    answers, native = cls.answers(device), _listed(cls.native(device)) or "nothing"
    if precision not in answers:
        raise VitdemoError(f"{cls.name} {precision}: not on the device {device!r}, where it has {_listed(answers)}")
    if (support := answers[precision]) == ABSENT:
        raise VitdemoError(
            f"{cls.name} {precision}: absent here, the runtime would compute in another precision; native to it: "
            f"{native}"
        )
    if support == EMULATED:
        print(
            f"{cls.name} {precision}: emulated here, slower than fp32; native to {cls.name} here: {native}",
            file=message_stream(),
        )


def _files(folder: Path) -> dict[str, dict]:
    """Size in bytes of every file of an artifact, the card left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CARD)
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size} for path in paths}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
