"""Where artifacts are kept, a folder each; what is there, and how to clear it."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from vitdemo.errors import named_errors
from vitdemo.paths import PART, cache_root

CARD = "card.json"
VERIFIED = ".verified.json"  # after the artifact's name, as nothing is added to an artifact once it is built
CARD_COLUMNS = ["model", "weights", "engine", "precision", "bytes", "build_s", "built", "key"]


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
