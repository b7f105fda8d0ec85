"""The files of sweeps: writes one CSV per sweep with a record of its machine, reads them, and joins them by column."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pandas as pd

from vitdemo.benchmarking.rows import COLUMNS
from vitdemo.engines.contract import precisions_here
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.inference.predictions import write_json
from vitdemo.machine import cores, machine_record
from vitdemo.paths import remove_leftovers, replacing, user_path

PATTERN = "perf_*.csv"
# The columns without which a row is useless.
NEEDED = "model engine precision device_batch_size batch status images_per_s machine commit".split()
HASHES = ("commit", "artifact")  # read as text, because a hash of digits, perhaps with an e, looks like a number


@dataclass
class Sweep:
    """The file of one sweep, rewritten after every batch size. settings: the arguments of the sweep."""

    path: Path
    settings: dict
    rows: pd.DataFrame

    def add(self, rows: pd.DataFrame) -> None:
        """Add ``rows`` in their order, and write the file."""
        both = [rows] if self.rows.empty else [self.rows, rows.astype(object)]
        table = pd.concat(both, ignore_index=True)
        place = (table["engine"] + ":" + table["precision"]).map(self.settings["pairs"].index)
        table = table.assign(place=place).sort_values(["device_batch_size", "place"], ignore_index=True)
        self.rows = table.drop(columns="place")
        with named_errors(self.path), replacing(self.path) as file:
            self.rows.to_csv(file, index=False)


@contextmanager
def open_sweep(out: Path, settings: dict) -> Iterator[Sweep]:
    """Open a new file ``perf_<model>_<setting>_<time>.csv``.

    Args:
        out: the folder, which is created if needed.
        settings: the settings of the sweep for its record ``….json``, which also says whether the sweep was finished.
    """
    settings = json.loads(json.dumps(settings))
    with named_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        model, weights = (re.sub(r"[^\w.]+", "_", name) for name in (settings["tag"], Path(settings["weights"]).name))
        shared = f"-{settings['replicas']}-replicas" if settings["replicas"] else ""
        path = out / f"perf_{model}_{weights}-{cores()}-cores{shared}_{datetime.now():%Y-%m-%d_%H%M%S_%f}.csv"
        remove_leftovers(out, path.name, path.with_suffix(".json").name)
        machine = machine_record() | {"engines": precisions_here()}
        record = {"settings": settings, "machine": machine, "finished": False}
        write_json(path.with_suffix(".json"), record)
        yield Sweep(path, settings, pd.DataFrame(columns=COLUMNS))
        write_json(path.with_suffix(".json"), record | {"finished": True})


def read_perf(path: Path) -> pd.DataFrame:
    """Read the rows of one sweep's file.

    Raises:
        VitdemoError: for a file that is not a sweep's, or whose rows have more values than the header has names.
    """
    with named_errors(path):
        try:
            table = pd.read_csv(path, dtype=dict.fromkeys((*HASHES, "model"), "str"))
        except ValueError:  # the type of pandas' errors, and of errors in decoding text
            raise VitdemoError(f"{path}: not a table of vitdemo's; take it out of the folder") from None
    if missing := [name for name in NEEDED if name not in table]:
        raise VitdemoError(f"{path}: not a table of vitdemo's, the column {missing[0]!r} is missing; take it out")
    if not isinstance(table.index, pd.RangeIndex):  # pandas has taken the first values for the names of the rows
        raise VitdemoError(f"{path}: its rows have more values than its header has names; correct it, or take it out")
    return table


def merge(places: Iterable[Path | str]) -> pd.DataFrame:
    """Join the rows of several sweeps by column name.

    A column that a file lacks is empty in its rows. Each row keeps its machine and its commit, and gets a column
    ``file`` with the name of its file.

    Args:
        places: files, and folders in which every ``perf_*.csv`` is read.

    Raises:
        VitdemoError: where there are no such files, or a file is not a sweep's.
    """
    files: dict[Path, None] = {}
    for place in map(user_path, places):
        found = sorted(place.glob(PATTERN)) if place.is_dir() else [place]
        if not found:
            raise VitdemoError(f"{place}: holds no {PATTERN}; run `vitdemo benchmark … --out {place}` first")
        files |= dict.fromkeys(path.resolve() for path in found)
    tables = [read_perf(path).assign(file=path.name) for path in files]
    if not tables:
        raise VitdemoError("merge: no folder was given; give those of `vitdemo benchmark`")
    joined = pd.concat([table.astype(object) for table in tables], ignore_index=True)
    ours = [name for name in COLUMNS if name in joined]
    joined = joined[[*ours, *(name for name in joined if name not in ours)]].infer_objects()
    for name in {"first_run_s", "compile_s"} & set(joined):  # numbers, and the word "warm"
        numbers = pd.to_numeric(joined[name], errors="coerce")
        joined[name] = numbers.astype(object).where(numbers.notna(), joined[name]).infer_objects()
    return joined
