"""The files in a run's folder, written so that a killed run can be resumed."""

import csv
import io
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TextIO

import pandas as pd

from vitdemo.dataset.imagenet import ImageNetVal
from vitdemo.errors import VitdemoError
from vitdemo.inference.loop import COLUMNS, PREDICTED, PROBABILITY
from vitdemo.measure.clock import machine_record
from vitdemo.paths import claim_folder, remove_leftovers, replacing

PREDICTIONS, METRICS, RUN = "predictions.csv", "metrics.json", "run.json"
FLAGPERF = "flagperf.csv"
HEADER = ",".join(COLUMNS) + "\n"


def claim_run(out: Path, settings: dict, data: ImageNetVal, resume: bool) -> list[str]:
    """Take ``out`` for a run of ``settings``; the lines that an interrupted run left there, of whole batches.

    Raises VitdemoError, and leaves ``out`` as it is, when it holds anything but such a run to resume.
    """
    settings = json.loads(json.dumps(settings))
    if out.is_dir():
        remove_leftovers(out, RUN, PREDICTIONS, METRICS, FLAGPERF)
    if not resume or not out.is_dir() or not any(out.iterdir()):
        claim_folder(out)
        lines = []
    else:
        try:
            before = dict(json.loads((out / RUN).read_text(encoding="utf-8"))["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            raise VitdemoError(f"{out / RUN}: no run to resume here; give another output folder") from None
        different = [key for key in settings if before.get(key) != settings[key]]
        if different:
            what = ", ".join(different)
            raise VitdemoError(f"{out}: was run with another {what}; give the same, or another output folder")
        lines = _read_lines(out / PREDICTIONS, data)
    if len(lines) < settings["images"]:
        # Whole batches only, so that the rest is cut at the same boundaries as in an undisturbed run.
        batch = settings["device_batch_size"]
        lines = lines[: len(lines) // batch * batch]
        (out / METRICS).unlink(missing_ok=True)  # of a run that broke
        write_json(out / RUN, {"settings": settings, "machine": machine_record()})
        with replacing(out / PREDICTIONS) as file:
            file.write(HEADER + "".join(lines))
    return lines


def finished_metrics(out: Path) -> dict | None:
    """The metrics of a run that was finished before, so that resuming it keeps its rates."""
    try:
        metrics = json.loads((out / METRICS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return metrics if metrics.get("valid") else None


def _read_lines(path: Path, data: ImageNetVal) -> list[str]:
    """The whole lines of an interrupted run; VitdemoError when they are not rows of ``data``, in order."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may be torn by the interruption
        header, *lines = io.StringIO(whole).readlines() or [HEADER]
        rows = rows_frame("".join(lines).encode())
        found = header, rows["file"].tolist(), rows["label"].tolist()
        ours = found == (HEADER, data.files[: len(lines)], data.labels[: len(lines)])
    except ValueError:  # no UTF-8, or no table of these columns
        ours = False
    if not ours:
        raise VitdemoError(f"{path}: not as the interrupted run left it; give another output folder")
    return lines


def appending(out: Path | None) -> AbstractContextManager[TextIO | None]:
    """predictions.csv, open for further rows; None where a run has no folder."""
    return open(out / PREDICTIONS, "a", encoding="utf-8", newline="") if out else nullcontext()


def csv_lines(rows: list[dict]) -> list[str]:
    """The rows as predictions.csv has them, a line each."""
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n").writerows(rows)
    text.seek(0)
    return text.readlines()  # not splitlines, which knows more ends of lines than this file has


def rows_frame(text: bytes) -> pd.DataFrame:
    """The lines of predictions.csv, without its header, as a table, a row an image. ValueError where they are none."""
    types = {"label": "int64", "correct": "int64"} | dict.fromkeys(PREDICTED, "Int64")
    types |= dict.fromkeys(PROBABILITY, "float64") | dict.fromkeys(("file", "wnid", "error"), "object")
    numbers = [*PREDICTED, *PROBABILITY]  # an unreadable image has none
    return pd.read_csv(
        io.BytesIO(text),
        names=COLUMNS,
        dtype=types,
        na_values=dict.fromkeys(numbers, [""]),
        keep_default_na=False,
        index_col=False,
    )


def write_json(path: Path, content: dict) -> None:
    """Write ``content`` whole or not at all."""
    with replacing(path) as file:
        json.dump(content, file, indent=2)
        file.write("\n")
