"""Trees ``<split>/<wnid>/<file>``: finding one, indexing it, naming its classes; and what ``extract`` wrote beside."""

import csv
import itertools
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vitdemo.errors import VitdemoError, named_errors
from vitdemo.paths import PART

WNID = re.compile(r"n\d{8}", re.ASCII)

FOLDERS = {"val": ("val", "validation"), "train": ("train",)}  # the first is ours and torchvision's
RECORDS = {"val": "extraction.json", "train": "extraction_train.json"}
CLASSES, CLASSES_COLUMNS = "classes.csv", ["label", "wnid", "ilsvrc_id", "name"]
AGAIN = "run the same vitdemo extract again"
OTHERS = (".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # that torchvision's ImageFolder reads as well


class Synset(NamedTuple):
    """A class: ILSVRC2012_ID (from 1; 0 where nobody says it), wnid, and its synonyms as one string."""

    id: int
    wnid: str
    words: str


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


def split_tar(path: Path, split: str = "val") -> Path:
    """The tar of a split.

    Args:
        path: the tar itself, or a folder that holds one of the split.
        split: "val" or "train".

    Raises:
        VitdemoError: for a file of another name, and for a folder with none or several.
    """
    with named_errors(path):
        found = [path] if path.is_file() else sorted(path.iterdir())
    tars = [tar for tar in found if tar.name.endswith(f"_img_{split}.tar") and not tar.name.startswith(".")]
    if not tars:
        raise VitdemoError(f"{path}: no data set; {expected(split)}")
    if len(tars) > 1:
        names = ", ".join(tar.name for tar in tars)
        raise VitdemoError(f"{path}: holds {len(tars)} {split} tars ({names}); name the one")
    return tars[0]


def find_tree(path: Path, split: str) -> Path | None:
    """The folder with one folder per class in or at ``path``; None when ``path`` is a folder of archives."""
    for folder in FOLDERS[split]:
        if (path / folder).is_dir():
            return path / folder
    if path.name.endswith(PART) or (path / (split + PART)).exists() or (path / RECORDS[split]).exists():
        raise VitdemoError(f"{path}: an unfinished extraction; {AGAIN}")
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
            if file.name.lower().endswith(OTHERS):  # torchvision and timm would count it
                raise VitdemoError(f"{folder}: {entry.name}/{file.name} is no JPEG, only those are read; take it out")
            if not _is_jpeg(file.name):
                continue
            if not file.name.isprintable():  # as a surrogate is not either, where the name is not UTF-8
                raise VitdemoError(f"{folder}: the file name {file.name!r} cannot be written to a table; rename it")
            items.append(Item(file.name, entry.name, file.stat().st_size))
    if not items:
        raise VitdemoError(f"{folder}: no data set, it holds no JPEGs by class; {expected(split)}")
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
    names = {synset.wnid: synset.words for synset in read_classes(path)}
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


def read_classes(path: Path) -> list[Synset]:
    """The classes in a ``classes.csv``, in the order of their labels.

    Format: CSV with a header and one row per class: label (from 0), wnid (ascending), ilsvrc_id (may be missing or
    empty), name. Raises VitdemoError for others.
    """
    with open(path, encoding="utf-8", newline="") as file, suppress(TypeError, KeyError, ValueError, csv.Error):
        rows = list(csv.DictReader(file))
        synsets = [Synset(int(row.get("ilsvrc_id") or 0), row["wnid"], row["name"]) for row in rows]
        labels, (_, wnids, names) = [int(row["label"]) for row in rows], zip(*synsets, strict=True)
        if labels == list(range(len(rows))) and list(wnids) == sorted(set(wnids)) and None not in names:
            return synsets
    raise VitdemoError(
        f"{path}: not a list of classes with columns {','.join(CLASSES_COLUMNS)}, label from 0, wnids ascending; "
        "extract to a new folder"
    )


def read_record(root: Path, split: str) -> dict | None:
    """What ``extract`` recorded of a split in ``root``, or None."""
    path = root / RECORDS[split]
    try:
        return dict(json.loads(path.read_bytes())) if path.exists() else None
    except (TypeError, ValueError):
        raise VitdemoError(f"{path}: not as vitdemo extract wrote it; extract to a new folder") from None
