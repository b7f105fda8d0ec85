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
from vitdemo.inference.loop import COLUMNS, PREDICTED, PROBABILITY, batches_of
from vitdemo.machine import machine_record
from vitdemo.paths import claim_folder, remove_leftovers, replacing

PREDICTIONS, METRICS, RUN = "predictions.csv", "metrics.json", "run.json"
FLAGPERF = "flagperf.csv"
HEADER = ",".join(COLUMNS) + "\n"


def open_run_folder(out: Path, settings: dict, data: ImageNetVal, resume: bool) -> list[str]:
    """Take ``out`` for a run of ``settings``; one line per image, as an interrupted run left it, or "".

    What is kept are whole batches, so that the rest is cut at the same boundaries as in an undisturbed run.

    Raises VitdemoError, and leaves ``out`` as it is, when it holds anything but such a run to resume.
    """
    settings = json.loads(json.dumps(settings))
    if out.is_dir():
        remove_leftovers(out, RUN, PREDICTIONS, METRICS, FLAGPERF)
    if not resume or not out.is_dir() or not any(out.iterdir()):
        claim_folder(out)
        lines = [""] * settings["images"]
    else:
        try:
            before = dict(json.loads((out / RUN).read_text(encoding="utf-8"))["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            raise VitdemoError(f"{out / RUN}: no run to resume here; give another output folder") from None
        different = [key for key in settings if before.get(key) != settings[key]]
        if different:
            what = ", ".join(different)
            raise VitdemoError(f"{out}: was run with another {what}; give the same, or another output folder")
        lines = _read_lines(out / PREDICTIONS, data, settings["images"])
    if not all(lines):
        for batch in batches_of(range(len(lines)), settings["device_batch_size"]):
            if not all(lines[batch.start : batch.stop]):
                lines[batch.start : batch.stop] = [""] * len(batch)
        (out / METRICS).unlink(missing_ok=True)  # of a run that broke
        write_json(out / RUN, {"settings": settings, "machine": machine_record()})
        write_predictions(out, lines)
    return lines


def write_predictions(out: Path, lines: list[str]) -> None:
    """The whole file, in order."""
    with replacing(out / PREDICTIONS) as file:
        file.write(HEADER + "".join(lines))


def finished_metrics(out: Path) -> dict | None:
    """The metrics of a run that was finished before, so that resuming it keeps its rates."""
    try:
        metrics = json.loads((out / METRICS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return metrics if metrics.get("valid") else None


def _read_lines(path: Path, data: ImageNetVal, images: int) -> list[str]:
    """The whole lines of an interrupted run, which replicas left in any order, by image; "" where there is none.

    Raises VitdemoError when they are not rows of these images, at most one each.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1].decode()  # the last line may be torn, within a character too
        header, *lines = io.StringIO(whole).readlines() or [HEADER]
        rows = rows_frame("".join(lines).encode())
        numbers = {file: number for number, file in enumerate(data.files[:images])}
        order = [numbers.pop(file) for file in rows["file"]]  # each image at most once
        ours = header == HEADER and rows["label"].tolist() == [data.labels[number] for number in order]
    except (ValueError, KeyError):  # no UTF-8, no table of these columns, or an image that is not there
        ours = False
    if not ours:
        raise VitdemoError(f"{path}: not as the interrupted run left it; give another output folder")
    by_image = dict(zip(order, lines, strict=True))
    return [by_image.get(number, "") for number in range(images)]


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
    """The lines of predictions.csv, without its header, as a table, one row per image. Raises ValueError."""
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
