"""Classes in another order than that of the wnids: the usual mix-ups, and what lies beside a data set to tell them."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitdemo.dataset.devkit import Devkit, read_devkit
from vitdemo.dataset.imagenet import DEVKITS, OFFICIAL_VAL, ImageNetVal, devkit_of
from vitdemo.errors import VitdemoError, named_errors


@dataclass(frozen=True)
class Numbering:
    """The devkit's side of a data set.

    ids: int[classes], the ILSVRC2012_ID of each label. truth: file name -> label, by the devkit. ``missing`` says why
    where one of them is None.
    """

    ids: np.ndarray | None
    truth: dict[str, int] | None
    missing: str = ""


def read_numbering(data: ImageNetVal) -> Numbering:
    """From the devkit beside a tar or beside ``val/``; the IDs alone also from ``classes.csv`` beside ``val/``."""
    path = Path(data.path)
    try:
        devkit = read_devkit(devkit_of(path) if path.is_file() else _devkit_in(path.parent))
    except VitdemoError as error:
        return Numbering(_ids(_ids_of_extraction(path.parent), data.classes), None, f"it needs the devkit: {error}")
    ids = _ids({synset.wnid: synset.id for synset in devkit.synsets}, data.classes)
    if ids is None:
        return Numbering(None, None, "it needs the devkit, and the one here is of other classes")
    return Numbering(ids, _truth(devkit))


def _devkit_in(root: Path) -> Path:
    """The devkit beside ``val/``, of whatever name; ILSVRC2012's before others. Raises VitdemoError without one."""
    with named_errors(root):
        others = sorted(root.glob(DEVKITS))
    if len(others) != 1:  # none, or several, of which ILSVRC2012's may be one
        return devkit_of(root / OFFICIAL_VAL)
    return others[0]


def _ids_of_extraction(root: Path) -> dict[str, int]:
    """wnid -> ILSVRC2012_ID as ``extract`` wrote it down in ``root``, empty where it did not."""
    try:
        with open(root / "classes.csv", encoding="utf-8", newline="") as file:
            return {row["wnid"]: int(row["ilsvrc_id"]) for row in csv.DictReader(file)}
    except (OSError, KeyError, TypeError, ValueError):
        return {}


def _ids(by_wnid: dict[str, int], classes: Sequence[str]) -> np.ndarray | None:
    """The ID of each class, provided that they are 1 to the number of classes."""
    ids = [by_wnid.get(wnid, 0) for wnid in classes]
    return np.array(ids) if sorted(ids) == list(range(1, len(classes) + 1)) else None


def _truth(devkit: Devkit) -> dict[str, int]:
    return {f"ILSVRC2012_val_{number:08d}.JPEG": label for number, label in enumerate(devkit.labels, start=1)}


def other_orders(data: ImageNetVal, numbering: Numbering) -> dict[str, np.ndarray | None]:
    """The orders of the classes that get mistaken for the lexicographic one of the wnids.

    Name of the order -> int[classes], the rank of each label in it, or None where it cannot be known.
    """
    labels = range(len(data.classes))
    return {
        "ILSVRC order": None if numbering.ids is None else numbering.ids - 1,
        "the order of numbers as text": np.argsort(sorted(labels, key=str)),  # 0, 1, 10, 100, 101 …
        "the order of the class names": np.argsort(sorted(labels, key=data.class_names.__getitem__)),
    }
