"""From a Model to an Engine ready to run; what takes long to build is built once and kept.

An artifact is a folder in the cache, named by the hash of everything that shaped it. It is written under another
name and renamed, so that a folder of the right name is whole. ``card.json`` in it says how it was made.
"""

import hashlib
import inspect
import json
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import CodeType

import pandas as pd
import torch
from filelock import FileLock, Timeout
from torch import nn

from vitdemo.conversion import graph
from vitdemo.conversion.calibration import Calibration, calibration_for
from vitdemo.conversion.engines.contract import CompiledEngine, Engine, find_engines
from vitdemo.conversion.models import Model
from vitdemo.dataset.imagenet import Sample
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.measure.clock import cores, installed_version, now
from vitdemo.paths import PART, cache_root

CARD = "card.json"
VERIFIED = ".verified.json"  # after the artifact's name, as nothing is added to an artifact once it is built
OF_TORCH = set(vars(nn.Module())) - {"training"}  # what every module holds: parameters, hooks …
CARD_COLUMNS = ["model", "weights", "engine", "precision", "bytes", "build_s", "built", "key"]


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

    calibration: the images that int8 needs, see ``calibration_for``. device: "cpu", "cuda", or "auto" (CUDA where
    there is one). threads: CPU threads a call may use, all cores by default. force: build anew. Raises VitdemoError for
    an unknown engine, precision or device, listing those there are, for a runtime that is not installed, and when
    calibration images are missing.
    """
    cls = _engine_class(engine, precision)
    if threads is not None and threads < 1:
        raise VitdemoError(f"threads {threads}: must be at least 1")
    images = calibration_for(model, calibration) if precision in getattr(cls, "calibrated", ()) else None
    model = Model(model.module, model.info)  # hashed anew: its weights may have been changed since
    recipe = Recipe(model, cls, precision, _resolve_device(device, cls), images)
    if issubclass(cls, CompiledEngine):
        with named_errors(artifacts_root()):
            return recipe.cached(threads or cores(), force)
    start = now()
    ready = cls(model, precision, device=recipe.device, threads=threads or cores())
    ready.card, ready.load_s = {"key": recipe.key, **recipe.ingredients}, now() - start
    return ready


@dataclass(frozen=True)
class Recipe:
    """What an artifact is made from."""

    model: Model
    cls: type[Engine]
    precision: str
    device: str
    calibration: Calibration | None

    @cached_property
    def ingredients(self) -> dict:
        """Everything that shapes the artifact, as JSON can hold it."""
        packages = ("torch", "torchvision", "timm", *self.cls.packages)
        return {
            "engine": self.cls.name,
            "precision": self.precision,
            "device": self.device,
            "model": self.model.info.to_dict(),
            "architecture": _architecture(self.model.module),
            "builder": _sha256("".join(map(inspect.getsource, (inspect.getmodule(self.cls), graph))).encode()),
            "calibration": self.calibration and self.calibration.fingerprint,
            "versions": {name: installed_version(name) for name in ("vitdemo", *packages)},
            "instruction_set": [name for name, has in sorted(torch.cpu.get_capabilities().items()) if has is True],
        }

    @cached_property
    def key(self) -> str:
        """sha256 of the ingredients."""
        return _sha256(json.dumps(self.ingredients, sort_keys=True).encode())

    def cached(self, threads: int, force: bool) -> Engine:
        """The engine from the cache, where it is built first if it is not there or ``force`` is given."""
        name = re.sub(r"[^\w.]+", "_", self.model.info.tag)
        folder = artifacts_root() / f"{name}-{self.cls.name}-{self.precision}-{self.key[:16]}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # the system takes it back from a holder that dies
            if folder.exists() and not force:
                try:
                    return self._load(folder, threads)
                except VitdemoError:  # what this machine lacks a new build would not put right
                    raise
                except Exception as error:  # whatever a runtime says of a damaged file, the cure is the same
                    reason = str(error).strip().split("\n")[0] or type(error).__name__
                    print(f"{folder}: cannot be used ({reason}); building it again", file=sys.stderr)
            self._build(folder)
            return self._load(folder, threads)

    def _build(self, folder: Path) -> None:
        partial = folder.with_name(folder.name + PART)
        shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed
        self._check_room(folder.parent)
        partial.mkdir()
        print(f"building {self.cls.name} {self.precision} of {self.model.info.tag}, once", file=sys.stderr)
        try:
            start = now()
            pixels = self.calibration.pixels if self.calibration else None
            self.cls.build(self.model, self.precision, partial, device=self.device, calibration=pixels)
            made = {"build_s": now() - start, "built": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}
            card = {"key": self.key, **made, "files": _files(partial), **self.ingredients}
            card["calibration"] = self.calibration and self.calibration.to_dict()
            (partial / CARD).write_text(json.dumps(card, indent=2), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            Path(f"{folder}{VERIFIED}").unlink(missing_ok=True)  # of what was there before
            partial.rename(folder)
        except (VitdemoError, OSError):
            raise
        except Exception as error:  # exporters and runtimes have a hundred types
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            what = f"{self.cls.name} {self.precision} of {self.model.info.tag}"
            raise VitdemoError(
                f"{what}: cannot be built ({reason}); see `vitdemo doctor`, or take another engine"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _check_room(self, folder: Path) -> None:
        """Asked before, as a disk that fills while torch writes ends the process."""
        weights = sum(tensor.nbytes for tensor in self.model.module.state_dict().values())
        needed = 3 * weights + (16 << 20)  # an exported copy beside the artifact, and what a runtime adds
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise VitdemoError(
                f"{folder}: a build may need {needed / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free; make room, "
                "or set VITDEMO_CACHE to another folder"
            )

    def _load(self, folder: Path, threads: int) -> Engine:
        """Raises anything when the artifact is damaged or another one."""
        start = now()
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if card["key"] != self.key:
            raise ValueError("its card is that of another artifact")
        if {name: file["bytes"] for name, file in card["files"].items()} != _sizes(folder):
            raise ValueError("its files have not the sizes of those that were built")
        with ThreadPoolExecutor(1) as pool:  # reading every byte takes as long as getting ready to run
            files = pool.submit(_files, folder)
            if self.cls.machine_code:
                _check_files(card, files.result())
            ready = self.cls(folder, self.model.info, self.precision, device=self.device, threads=threads)
            _check_files(card, files.result())
        ready.card, ready.load_s = card, now() - start
        return ready


def _check_files(card: dict, files: dict) -> None:
    if card["files"] != files:
        raise ValueError("its files are not those that were built")


def artifacts_root() -> Path:
    """The folder of the artifacts."""
    return cache_root() / "artifacts"


def cached_artifacts() -> pd.DataFrame:
    """What is in the cache, a row an artifact: model, weights, engine, precision, bytes, build_s, built, key."""
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
    """Remove every artifact but one that is being built just now; the bytes that became free.

    An engine that is loaded goes on running, but may no longer show its layers.
    """
    freed = 0
    with named_errors(artifacts_root()):
        for folder in [path for path in artifacts_root().glob("*") if path.is_dir()]:
            whole = str(folder).removesuffix(PART)
            with suppress(Timeout), FileLock(f"{whole}.lock", blocking=False):
                freed += _bytes_below(folder)
                shutil.rmtree(folder, ignore_errors=True)
                Path(f"{whole}{VERIFIED}").unlink(missing_ok=True)
    return freed  # the lock files stay, as somebody may be waiting for one


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


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


def _resolve_device(device: str, cls: type[Engine]) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() and cls.runs_on("cuda") else "cpu"
    if device not in ("cpu", "cuda"):
        raise VitdemoError(f"device {device!r}: there are auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise VitdemoError("device 'cuda': torch sees no CUDA device here; use cpu or auto")
    if not cls.runs_on(device):
        raise VitdemoError(f"device {device!r}: the {cls.name} engine does not run on it here; use cpu or auto")
    return device


def _architecture(module: nn.Module) -> str:
    """sha256 of what a module computes with its weights.

    That is its repr, its classes' source, and the plain values its parts hold: a LayerNorm's eps and the kind of a
    GELU are in no state dict.
    """
    digest = hashlib.sha256(repr(module).encode())
    own = {cls for part in module.modules() for cls in type(part).__mro__ if issubclass(cls, nn.Module)}
    for cls in sorted(own - {nn.Module}, key=lambda cls: (cls.__module__, cls.__qualname__)):
        digest.update(f"{cls.__module__}.{cls.__qualname__}\n{_source(cls)}".encode())
    for name, part in module.named_modules():
        held = {key: value for key, value in vars(part).items() if key not in OF_TORCH}
        plain = {key: value for key, value in held.items() if _is_plain(value)}
        calls = {key: _source(value) for key, value in held.items() if inspect.isroutine(value)}
        tensors = {key: _sha256(value.numpy(force=True).tobytes()) for key, value in held.items() if _is_tensor(value)}
        digest.update(f"{name} {sorted(plain.items())} {sorted(calls.items())} {sorted(tensors.items())}\n".encode())
    return digest.hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (int, float, str))


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype != torch.bfloat16  # which numpy does not know


def _source(thing) -> str:
    """The source of a class or a function; of one that has none, as a class typed into a notebook, its code."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        name = getattr(thing, "__qualname__", type(thing).__qualname__)
        held = [thing, *vars(thing).values()] if inspect.isclass(thing) else [thing]
        return name + "".join(_code(value.__code__) for value in held if inspect.isfunction(value))


def _code(code: CodeType) -> str:
    """A function's bytecode, names and constants, those of the functions in it included."""
    constants = [_code(value) if isinstance(value, CodeType) else _repr(value) for value in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _repr(value: object) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)  # whose order is by chance


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of an artifact, the card left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CARD)
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}


def _files(folder: Path) -> dict[str, dict]:
    """Size in bytes and sha256 of every file of an artifact, the card left out."""
    found = {}
    for name, size in _sizes(folder).items():
        with open(folder / name, "rb") as file:
            found[name] = {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
