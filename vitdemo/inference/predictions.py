"""Reads and writes the files of a run, mainly ``predictions.csv``, so that a killed run can be resumed."""

import csv
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import pandas as pd

from vitdemo.dataset.dataset import Dataset
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.inference.loop import COLUMNS, PREDICTED, PROBABILITY, Row, batches_of
from vitdemo.machine import machine_record
from vitdemo.paths import claim_folder, remove_leftovers, replacing

PREDICTIONS, METRICS, RUN = "predictions.csv", "metrics.json", "run.json"
FLAGPERF = "flagperf.csv"


def open_run_folder(out: Path, settings: dict, data: Dataset, resume: bool) -> tuple[list, dict | None, dict]:
    """Prepare the folder ``out`` for a run.

    Only whole batches of an interrupted run are kept, so that the other batches have the same boundaries as in an
    uninterrupted run.

    Args:
        out: the run's folder.
        settings: everything on which the predictions depend.
        data: the labelled images.
        resume: whether to continue a run with the same settings in ``out``.

    Returns:
        For each image, its row from the interrupted run, or None; the metrics of a finished run, so that resuming it
        keeps its rates, or None; and the settings with which the run was begun, {} for a new run.

    Raises:
        VitdemoError: when ``out`` holds anything but such a run; it is then left unchanged.
    """
    settings = json.loads(json.dumps(settings))
    rows: list[Row | None] = [None] * settings["images"]
    before: dict = {}
    if out.is_dir():
        remove_leftovers(out, RUN, PREDICTIONS, METRICS, FLAGPERF)
    if not resume or not out.is_dir() or not any(out.iterdir()):
        if (out / RUN).exists():
            raise VitdemoError(f"{out}: holds a run; resume=True (--resume) goes on with it, or give another folder")
        claim_folder(out)
    else:
        try:
            before = dict(json.loads((out / RUN).read_text(encoding="utf-8"))["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            raise VitdemoError(f"{out / RUN}: no run to resume here; give another output folder") from None
        if different := ", ".join(key for key in settings if before.get(key) != settings[key]):
            raise VitdemoError(f"{out}: was run with another {different}; give the same, or another output folder")
        rows = _read_rows(out / PREDICTIONS, data, len(rows))
    if all(rows):
        return rows, _finished_metrics(out), before
    for batch in batches_of(range(len(rows)), settings["device_batch_size"]):
        if not all(rows[batch.start : batch.stop]):
            rows[batch.start : batch.stop] = [None] * len(batch)
    (out / METRICS).unlink(missing_ok=True)  # left by a run that broke
    write_settings(out, before | settings)
    _write_predictions(out, rows)
    return rows, None, before


def write_settings(out: Path, settings: dict) -> None:
    """Write run.json: the settings and the machine."""
    write_json(out / RUN, {"settings": settings, "machine": machine_record()})


def finish_run(out: Path | None, rows: list[Row | None], metrics: dict) -> None:
    """Write all rows in file order (replicas return them in any order), and metrics.json; nothing without a folder."""
    if out:
        with named_errors(out):
            _write_predictions(out, rows)
            write_json(out / METRICS, metrics)


def _write_predictions(out: Path, rows: list[Row | None]) -> None:
    with replacing(out / PREDICTIONS) as file:
        write_rows(file, [COLUMNS, *filter(None, rows)])


def write_rows(file: TextIO, rows: Iterable[Iterable]) -> None:
    """Append rows in the format of predictions.csv."""
    cells = ([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    csv.writer(file, lineterminator="\n").writerows(cells)


def _finished_metrics(out: Path) -> dict | None:
    try:
        metrics = json.loads((out / METRICS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return metrics if metrics.get("valid") else None


def _read_rows(path: Path, data: Dataset, images: int) -> list[Row | None]:
    """The complete rows of an interrupted run, for each image its row or None; the file may have them in any order.

    Raises VitdemoError when a row belongs to no image of ``data``, or an image has several rows.
    """
    numbers = {file: number for number, file in enumerate(data.files[:images])}
    rows: list[Row | None] = [None] * images
    try:
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1].decode()  # the last line may be incomplete, even in a character
        header, *lines = [*csv.reader(io.StringIO(whole, newline=""))] or [[*COLUMNS]]
        ours = header == [*COLUMNS]
        for line in lines:
            cells = zip(COLUMNS.values(), line, strict=True)
            row = Row(*(kind(cell) if cell or kind is str else None for kind, cell in cells))
            number = numbers.pop(row.file)  # an image has at most one row
            rows[number], correct = row, row.predicted_1 == row.label
            ours = ours and (row.label, row.correct) == (data.labels[number], correct)
    except (ValueError, KeyError, csv.Error):  # not UTF-8, other columns, or an unknown image
        ours = False
    if not ours:
        raise VitdemoError(f"{path}: not as the interrupted run left it; give another output folder")
    return rows


def appending(out: Path | None) -> TextIO:
    """Open predictions.csv for appending rows; for a run without a folder, open the null device."""
    return open(out / PREDICTIONS if out else os.devnull, "a", encoding="utf-8", newline="")


def rows_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """The rows as a table; an unreadable image has no predictions."""
    types = dict.fromkeys(["label", "correct", "correct_present"], "int64") | dict.fromkeys(PREDICTED, "Int64")
    return pd.DataFrame(rows, columns=[*COLUMNS], dtype=object).astype(types | dict.fromkeys(PROBABILITY, "float64"))


def write_json(path: Path, content: dict) -> None:
    """Write ``content`` whole or not at all."""
    with replacing(path) as file:
        json.dump(content, file, indent=2)
        file.write("\n")
