"""Reads and writes the files of a run, ``predictions.csv`` above all, so that a killed run can be resumed."""

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
    """Take ``out`` for a run.

    What is kept are whole batches, so that the rest is cut at the same boundaries as in an undisturbed run.

    Args:
        out: the run's folder.
        settings: all that shapes its predictions.
        data: the labelled images.
        resume: whether to go on with a run of the same settings that is there.

    Returns:
        A row for each image, as an interrupted run left it, or None; the metrics of a run that was finished, so that
        resuming it keeps its rates; and the settings that it was begun with, {} for a new one.

    Raises:
        VitdemoError: when ``out`` holds anything but such a run to resume; it is left as it is.
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
    (out / METRICS).unlink(missing_ok=True)  # of a run that broke
    write_settings(out, before | settings)
    _write_predictions(out, rows)
    return rows, None, before


def write_settings(out: Path, settings: dict) -> None:
    """run.json."""
    write_json(out / RUN, {"settings": settings, "machine": machine_record()})


def finish_run(out: Path | None, rows: list[Row | None], metrics: dict) -> None:
    """All rows in file order, as replicas brought them in any, and metrics.json; nothing where a run has no folder."""
    if out:
        with named_errors(out):
            _write_predictions(out, rows)
            write_json(out / METRICS, metrics)


def _write_predictions(out: Path, rows: list[Row | None]) -> None:
    with replacing(out / PREDICTIONS) as file:
        write_rows(file, [COLUMNS, *filter(None, rows)])


def write_rows(file: TextIO, rows: Iterable[Iterable]) -> None:
    """Add rows as predictions.csv has them."""
    cells = ([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    csv.writer(file, lineterminator="\n").writerows(cells)


def _finished_metrics(out: Path) -> dict | None:
    try:
        metrics = json.loads((out / METRICS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return metrics if metrics.get("valid") else None


def _read_rows(path: Path, data: Dataset, images: int) -> list[Row | None]:
    """The whole rows of an interrupted run, which replicas left in any order, by image; None where there is none.

    Raises VitdemoError when they are not rows of these images, at most one each.
    """
    numbers = {file: number for number, file in enumerate(data.files[:images])}
    rows: list[Row | None] = [None] * images
    try:
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1].decode()  # the last line may be torn, within a character too
        header, *lines = [*csv.reader(io.StringIO(whole, newline=""))] or [[*COLUMNS]]
        ours = header == [*COLUMNS]
        for line in lines:
            row = Row(*(_read(kind, cell) for kind, cell in zip(COLUMNS.values(), line, strict=True)))
            number = numbers.pop(row.file)  # each image at most once
            rows[number], correct = row, row.predicted_1 == row.label
            ours = ours and (row.label, row.correct) == (data.labels[number], correct)
    except (ValueError, KeyError, csv.Error):  # no UTF-8, no table of these columns, or an image that is not there
        ours = False
    if not ours:
        raise VitdemoError(f"{path}: not as the interrupted run left it; give another output folder")
    return rows


def _read(kind: type, cell: str) -> str | int | float | None:
    return kind(cell) if cell or kind is str else None


def appending(out: Path | None) -> TextIO:
    """predictions.csv, open for further rows; where a run has no folder they go nowhere."""
    return open(out / PREDICTIONS if out else os.devnull, "a", encoding="utf-8", newline="")


def rows_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """The rows as a table; an unreadable image has no numbers."""
    types = dict.fromkeys(["label", "correct", "correct_present"], "int64") | dict.fromkeys(PREDICTED, "Int64")
    return pd.DataFrame(rows, columns=[*COLUMNS], dtype=object).astype(types | dict.fromkeys(PROBABILITY, "float64"))


def write_json(path: Path, content: dict) -> None:
    """Write ``content`` whole or not at all."""
    with replacing(path) as file:
        json.dump(content, file, indent=2)
        file.write("\n")
