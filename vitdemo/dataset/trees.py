"""Where a split's folder or tar lies, what wnids are called, and what ``extract`` wrote beside a folder."""

import csv
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vitdemo.errors import VitdemoError, named_errors
from vitdemo.paths import PART

WNID = re.compile(r"n\d{8}", re.ASCII)

# Of a split's folders the first that is there is read; the first of all is ours and torchvision's.
FOLDERS = {"val": ("val", "validation", "test"), "train": ("train",)}
KAGGLE = "ILSVRC/Data/CLS-LOC"  # where ImageNet from Kaggle has its folders
RECORDS = {"val": "extraction.json", "train": "extraction_train.json"}
CLASSES, CLASSES_COLUMNS = "classes.csv", ["label", "wnid", "ilsvrc_id", "name"]
AGAIN = "run the same vitdemo extract again"


class Synset(NamedTuple):
    """A class: ILSVRC2012_ID (from 1; 0 where nobody says it), wnid, and its synonyms as one string."""

    id: int
    wnid: str
    words: str


def expected(split: str) -> str:
    """What a path to a split may be, for messages."""
    return (
        f"expected {split}/ with one folder per class, images with a table of their labels, parquet files, or "
        f"<name>_img_{split}.tar{' with its devkit beside it' if split == 'val' else ''}"
    )


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
    """The folder of the split's images in or at ``path``; None when ``path`` is a folder of archives."""
    if path.name.endswith(PART) or (path / (split + PART)).exists():
        raise VitdemoError(f"{path}: an unfinished extraction; {AGAIN}")
    for folder in (*FOLDERS[split], f"{KAGGLE}/{split}"):
        if (path / folder).is_dir():
            return path / folder
    if (path / RECORDS[split]).exists():
        raise VitdemoError(f"{path}: an unfinished extraction; {AGAIN}")
    return None if any(entry.name.endswith(f"_img_{split}.tar") for entry in path.iterdir()) else path


def wnid_classes(wnids: list[str], folder: Path) -> dict[str, str]:
    """Names of the classes by wnid, lexicographic: those of ``classes.csv`` beside ``folder``, else of what is known.

    Raises VitdemoError for a ``classes.csv`` without one of the wnids.
    """
    path = folder.parent / CLASSES
    if not path.exists():
        return known_classes(wnids)
    names = {synset.wnid: synset.words for synset in read_classes(path)}
    if lacking := sorted(set(wnids) - set(names)):
        raise VitdemoError(f"{path}: lacks {lacking[0]}, which has images in {folder}; extract to a new folder")
    return names


def known_classes(wnids: list[str]) -> dict[str, str]:
    """Names of the classes by wnid: of ImageNet's 1,000 if all wnids are among them, else the wnids there are."""
    from timm.data import ImageNetInfo  # seconds to import, and few sets need it

    info = ImageNetInfo("imagenet-1k")
    names = {wnid: info.label_name_to_description(wnid) for wnid in info.label_names()}
    return names if set(wnids) <= set(names) else {wnid: names.get(wnid, wnid) for wnid in sorted(wnids)}


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
