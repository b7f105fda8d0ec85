"""Trees ``<split>/<wnid>/<file>``: finding one, indexing it, naming its classes; and what ``extract`` wrote beside."""

import csv
import itertools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from vitdemo.errors import VitdemoError
from vitdemo.paths import PART

WNID = re.compile(r"n\d{8}", re.ASCII)


FOLDERS = {"val": ("val", "validation"), "train": ("train",)}  # the first is ours and torchvision's
RECORDS = {"val": "extraction.json", "train": "extraction_train.json"}
CLASSES, CLASSES_COLUMNS = "classes.csv", ["label", "wnid", "ilsvrc_id", "name"]
AGAIN = "run the same vitdemo extract again"
OTHERS = (".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # that torchvision's ImageFolder reads as well


class Item(NamedTuple):
    """Where an image lies: base name, wnid, size in bytes, and offset in its tar in bytes."""

    file: str
    wnid: str
    size: int
    offset: int = 0


def expected(split: str) -> str:
    """What a path to a split may be, for messages."""
    devkit = " with its devkit beside it" if split == "val" else ""
    return f"expected <name>_img_{split}.tar{devkit}, or {split}/ with one folder per class, named n01440764 …"


def find_tree(path: Path, split: str) -> Path | None:
    """The folder with one folder per class in or at ``path``; None when ``path`` is a folder of archives."""
    unfinished = VitdemoError(f"{path}: an unfinished extraction; {AGAIN}")
    if path.name.endswith(PART):
        raise unfinished
    for folder in FOLDERS[split]:
        if (path / folder).is_dir():
            return path / folder
    if (path / (split + PART)).exists() or (path / RECORDS[split]).exists():
        raise unfinished
    return None if any(entry.name.endswith(f"_img_{split}.tar") for entry in path.iterdir()) else path


def index_tree(folder: Path, split: str) -> tuple[dict[str, str], list[Item]]:
    """The classes of a tree, wnid -> name, lexicographic, and its JPEGs in ascending file name.

    Raises VitdemoError for what is no tree, and for files that results could not tell apart.
    """
    wnids, items = [], []
    for entry in os.scandir(folder):
        if _is_jpeg(entry.name):
            raise VitdemoError(
                f"{folder}: JPEGs lie flat in it ({entry.name}); read like this all would be one class. They belong "
                "in one folder per class: vitdemo extract sorts the original archives"
            )
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        if not WNID.fullmatch(entry.name):
            raise VitdemoError(
                f"{folder}: no data set: {entry.name!r} is no wnid, and numbers or words do not say a class's index "
                f"(as text, 10 comes before 2); {expected(split)}"
            )
        wnids.append(entry.name)
        for file in os.scandir(entry):
            if _is_jpeg(file.name):
                items.append(Item(file.name, entry.name, file.stat().st_size))
            elif file.name.lower().endswith(OTHERS):  # torchvision and timm would count it
                raise VitdemoError(
                    f"{folder}: {entry.name}/{file.name} is no JPEG, and only those are read; take it out"
                )
    if not items:
        raise VitdemoError(f"{folder}: no data set, it holds no JPEGs by class; {expected(split)}")
    unwritable = next((item.file for item in items if not item.file.isprintable()), None)
    if unwritable is not None:  # a surrogate, where the name is not UTF-8, is not printable either
        raise VitdemoError(f"{folder}: the file name {unwritable!r} cannot be written to a table; rename the file")
    items.sort()
    for first, second in itertools.pairwise(items):
        if first.file == second.file:
            raise VitdemoError(
                f"{folder}: {first.file} is in {first.wnid}/ and in {second.wnid}/; results go by file name: "
                "give each file its own"
            )
    return _tree_classes(folder, sorted(wnids)), items


def _is_jpeg(name: str) -> bool:
    return name.lower().endswith((".jpeg", ".jpg")) and not name.startswith(".")


def _tree_classes(folder: Path, wnids: list[str]) -> dict[str, str]:
    """The classes in ``classes.csv`` beside the tree; without it those that ``known_classes`` knows."""
    path = folder.parent / CLASSES
    if not path.exists():
        return known_classes(wnids, folder, f"move it away, or put a {CLASSES} beside the folder")
    names = read_classes(path)
    for wnid in wnids:
        if wnid not in names:
            raise VitdemoError(f"{path}: lacks {wnid}, which has a folder in {folder}; extract to a new folder")
    return names


def known_classes(wnids: list[str], place: Path, cure: str) -> dict[str, str]:
    """Names of all classes by wnid, lexicographic, where only some wnids are known.

    ImageNet's 1,000 if the wnids are among them, as a subset keeps its indices; else the wnids are the classes.
    Raises VitdemoError with ``place`` and ``cure`` when only some of them are ImageNet's.
    """
    from timm.data import ImageNetInfo  # seconds to import, and few sets need it

    info = ImageNetInfo("imagenet-1k")
    names = {wnid: info.label_name_to_description(wnid) for wnid in info.label_names()}
    unknown = [wnid for wnid in wnids if wnid not in names]
    if 0 < len(unknown) < len(wnids):
        raise VitdemoError(
            f"{place}: {unknown[0]} is not among ImageNet's 1,000 classes and others are, so their indices are "
            f"uncertain; {cure}"
        )
    return {wnid: wnid for wnid in wnids} if unknown else names


def read_classes(path: Path) -> dict[str, str]:
    """Wnid -> name from a ``classes.csv``, in the order of the labels."""
    with open(path, encoding="utf-8", newline="") as file:
        try:
            rows = [(int(row["label"]), row["wnid"], row["name"]) for row in csv.DictReader(file)]
            if any(None in row for row in rows):  # the file ends within a line
                rows = []
        except (KeyError, TypeError, ValueError, csv.Error):
            rows = []
    wnids = [wnid for _, wnid, _ in rows]
    if not rows or wnids != sorted(set(wnids)) or [label for label, _, _ in rows] != list(range(len(rows))):
        raise VitdemoError(
            f"{path}: not a list of classes with columns {','.join(CLASSES_COLUMNS)}, label from 0, wnids ascending; "
            "extract to a new folder"
        )
    return {wnid: name for _, wnid, name in rows}


def read_record(root: Path, split: str) -> dict | None:
    """What ``extract`` recorded of a split in ``root``, or None."""
    path = root / RECORDS[split]
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise VitdemoError(f"{path}: not as vitdemo extract wrote it; extract to a new folder")
    return record
