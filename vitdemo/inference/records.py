"""The folder of a run: predictions.csv, metrics.json and run.json, written so that a killed run can be resumed."""

import csv
import io
import json
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TextIO

from vitdemo.dataset.imagenet import ImageNetVal
from vitdemo.errors import VitdemoError
from vitdemo.inference.loop import COLUMNS, PREDICTED
from vitdemo.measure.clock import machine_record
from vitdemo.paths import claim_folder, remove_leftovers, replacing

PREDICTIONS, METRICS, RUN = "predictions.csv", "metrics.json", "run.json"


def claim_run(out: Path, settings: dict, data: ImageNetVal, resume: bool) -> list[dict]:
    """Take ``out`` for a run of ``settings``; the rows that an interrupted run left there, in whole batches.

    Raises VitdemoError, and leaves ``out`` as it is, when it holds anything but such a run to resume.
    """
    settings = json.loads(json.dumps(settings))
    if out.is_dir():
        remove_leftovers(out, RUN, PREDICTIONS, METRICS)
    if not resume or not out.is_dir() or not any(out.iterdir()):
        claim_folder(out)
        rows = []
    else:
        try:
            before = dict(json.loads((out / RUN).read_text(encoding="utf-8"))["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            raise VitdemoError(f"{out / RUN}: no run to resume here; give another output folder") from None
        different = [key for key in settings if before.get(key) != settings[key]]
        if different:
            what = ", ".join(different)
            raise VitdemoError(f"{out}: was run with another {what}; give the same, or another output folder")
        rows = _read_rows(out / PREDICTIONS, data)
    if len(rows) < settings["images"]:
        # Whole batches only, so that the rest is cut at the same boundaries as in an undisturbed run.
        batch = settings["device_batch_size"]
        rows = rows[: len(rows) // batch * batch]
        (out / METRICS).unlink(missing_ok=True)  # of a run that broke
        write_json(out / RUN, {"settings": settings, "machine": machine_record()})
        _write_rows(out / PREDICTIONS, rows)
    return rows


def finished_metrics(out: Path) -> dict | None:
    """The metrics of a run that was finished before, so that resuming it keeps its rates."""
    try:
        metrics = json.loads((out / METRICS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return metrics if metrics.get("valid") else None


def _read_rows(path: Path, data: ImageNetVal) -> list[dict]:
    """The whole rows of an interrupted run; VitdemoError when they are not rows of ``data``, in order."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole_lines = text[: text.rfind("\n") + 1]  # the last one may be torn by the interruption
        rows = [_parsed(row) for row in csv.DictReader(io.StringIO(whole_lines))]
    except (ValueError, KeyError, TypeError, csv.Error):
        rows = None
    expected = zip(data.files, data.labels, strict=True)
    if rows is None or [(row["file"], row["label"]) for row in rows] != list(islice(expected, len(rows))):
        raise VitdemoError(f"{path}: not as the interrupted run left it; give another output folder")
    return rows


def appending(out: Path | None) -> AbstractContextManager[TextIO | None]:
    """predictions.csv, open for further rows; None where a run has no folder."""
    return open(out / PREDICTIONS, "a", encoding="utf-8", newline="") if out else nullcontext()


def _write_rows(path: Path, rows: list[dict]) -> None:
    with replacing(path) as file:
        file.write(",".join(COLUMNS) + "\n" + csv_lines(rows))


def csv_lines(rows: list[dict]) -> str:
    """The rows as predictions.csv has them, without its header."""
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _parsed(row: dict) -> dict:
    """A row of predictions.csv as ``predict`` made it."""
    integers = {name: int(row[name]) for name in ("label", "correct", *PREDICTED) if row[name]}
    return {name: value for name, value in row.items() if value or name == "error"} | integers


def write_json(path: Path, content: dict) -> None:
    """Write ``content`` whole or not at all."""
    with replacing(path) as file:
        json.dump(content, file, indent=2)
        file.write("\n")
