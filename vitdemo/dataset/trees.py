"""Labels from folder names or file names; finds a split's folder, and the files that ``extract`` wrote next to it."""

import csv
import itertools
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vitdemo.dataset.samples import Index, Item, Listing, counted
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.paths import PART

VAL_NAME = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG", re.ASCII)
WNID = re.compile(r"n\d{8}", re.ASCII)

# The first folder of a split that exists is read, in upper or lower case; the first name is ours and torchvision's.
FOLDERS = {"val": ("val", "valid", "validation", "test", "testing"), "train": ("train", "training")}
KAGGLE = "ILSVRC/Data/CLS-LOC"  # the parent of the splits' folders in ImageNet from Kaggle
RECORDS = {"val": "extraction.json", "train": "extraction_train.json"}
CLASSES, CLASSES_COLUMNS = "classes.csv", ["label", "wnid", "ilsvrc_id", "name"]
AGAIN = "run the same vitdemo extract again"


class Synset(NamedTuple):
    """A class: its ILSVRC2012_ID (from 1; 0 where it is unknown), its wnid, and its synonyms as one string."""

    id: int
    wnid: str
    words: str


def expected(split: str) -> str:
    """The forms that a path to a split may have, for messages."""
    archive = f"<name>_img_{split}.tar{' with its devkit next to it' if split == 'val' else ''}"
    forms = "one folder per class, images with a table of their labels, parquet files"
    return f"expected {split}/ with {forms}, or {archive}"


def split_tar(path: Path, split: str = "val") -> Path:
    """The tar of a split.

    Args:
        path: the tar itself, or a folder that holds one such tar.
        split: "val" or "train".

    Raises:
        VitdemoError: for a file with another name, and for a folder with no such tar or several.
    """
    with named_errors(path):
        found = [path] if path.is_file() else sorted(path.iterdir())
    tars = [tar for tar in found if tar.name.endswith(f"_img_{split}.tar") and not tar.name.startswith(".")]
    if not tars:
        raise VitdemoError(f"{path}: no data set; {expected(split)}")
    if len(tars) > 1:
        names = ", ".join(tar.name for tar in tars)
        raise VitdemoError(f"{path}: holds {len(tars)} {split} tars ({names}); name one of them")
    return tars[0]


def folder_of_split(folders: Iterable[str], split: str) -> str | None:
    """The one of ``folders`` that holds the split; None where none has such a name."""
    named = {folder.casefold(): folder for folder in sorted(folders)}
    return next((named[name] for name in FOLDERS[split] if name in named), None)


def find_tree(path: Path, split: str) -> Path | None:
    """The folder with the split's images, ``path`` or below it; None when ``path`` is a folder of archives."""
    if path.name.endswith(PART) or (path / (split + PART)).exists():
        raise VitdemoError(f"{path}: an unfinished extraction; {AGAIN}")
    if folder := folder_of_split((entry.name for entry in path.iterdir() if entry.is_dir()), split):
        return path / folder
    if (path / KAGGLE / split).is_dir():
        return path / KAGGLE / split
    if (path / RECORDS[split]).exists():
        raise VitdemoError(f"{path}: an unfinished extraction; {AGAIN}")
    return None if any(entry.name.endswith(f"_img_{split}.tar") for entry in path.iterdir()) else path


def wnid_classes(wnids: list[str], folder: Path) -> dict[str, str]:
    """The names of the classes by wnid, in ascending order: from ``classes.csv`` next to ``folder``, or known names.

    Raises VitdemoError for a ``classes.csv`` that lacks one of the wnids.
    """
    names = {synset.wnid: synset.words for synset in listed_classes(folder)}
    if names and (lacking := sorted(set(wnids) - set(names))):
        path = folder.parent / CLASSES
        raise VitdemoError(f"{path}: lacks {lacking[0]}, which has images in {folder}; extract to a new folder")
    return names or known_classes(wnids)


def listed_classes(folder: Path) -> list[Synset]:
    """The classes in ``classes.csv`` next to ``folder``; none where there is no such file, or a table of the user's."""
    path = folder.parent / CLASSES
    header = path.read_bytes().partition(b"\n")[0] if path.exists() else b"none"
    return [] if header and b"label,wnid" not in header else read_classes(path)


def known_classes(wnids: list[str]) -> dict[str, str]:
    """The names of the classes by wnid: of all 1,000 of ImageNet if they include all ``wnids``, else of ``wnids``."""
    from timm.data import ImageNetInfo  # imported here: the import takes seconds, and few data sets need it

    info = ImageNetInfo("imagenet-1k")
    names = {wnid: info.label_name_to_description(wnid) for wnid in info.label_names()}
    return names if set(wnids) <= set(names) else {wnid: names.get(wnid, wnid) for wnid in sorted(wnids)}


def read_classes(path: Path) -> list[Synset]:
    """Read the classes in a ``classes.csv``, in the order of their labels.

    Format: CSV with a header and one row per class: label (from 0), wnid (ascending), ilsvrc_id (may be missing or
    empty), name. Raises VitdemoError for a file in another format.
    """
    with open(path, encoding="utf-8", newline="") as file, suppress(TypeError, KeyError, ValueError, csv.Error):
        rows = list(csv.DictReader(file))
        synsets = [Synset(int(row.get("ilsvrc_id") or 0), row["wnid"], row["name"]) for row in rows]
        labels, (_, wnids, names) = [int(row["label"]) for row in rows], zip(*synsets, strict=True)
        if labels == list(range(len(rows))) and list(wnids) == sorted(set(wnids)) and None not in names:
            return synsets
    form = f"columns {','.join(CLASSES_COLUMNS)}, label from 0, wnids ascending"
    raise VitdemoError(f"{path}: not a list of classes with {form}; extract to a new folder")


def read_record(root: Path, split: str) -> dict | None:
    """The record of a split that ``extract`` wrote to ``root``, or None."""
    path = root / RECORDS[split]
    try:
        return dict(json.loads(path.read_bytes())) if path.exists() else None
    except (TypeError, ValueError):
        raise VitdemoError(f"{path}: not as vitdemo extract wrote it; extract to a new folder") from None


WNID_AT_END = re.compile(r"_(n\d{8})\.\w+", re.ASCII)  # as in the ImageNet of the Hugging Face hub
WRAPPERS = 2  # the largest number of folders that an archive may have around the data set


def of_split(listing: Listing, split: str) -> tuple[Listing, str]:
    """The part of a listing that is the split, and its path; the whole listing where no folder has a split's name.

    Raises VitdemoError where only folders of other splits exist.
    """
    prefix = ""
    for _ in range(WRAPPERS + 1):
        tops = listing.folders
        if found := folder_of_split(tops, split):
            return listing.within(f"{found}/"), f"{prefix}{found}/"
        others = sorted(top for top in tops if any(top.casefold() in names for names in FOLDERS.values()))
        around = min((name.count("/") for name in listing.images), default=0)
        if others and (len(tops) <= len(others) or around >= 2):  # with folders in each, they are splits
            raise VitdemoError(f"{listing.path}: holds {others[0]}/ and no {split}/; give that folder as the data set")
        if len(tops) != 1 or around < 2:
            break
        (top,) = tops
        listing, prefix = listing.within(f"{top}/"), f"{prefix}{top}/"
    return listing, prefix


def index_by_folder(listing: Listing) -> Index | None:
    """The index of a listing with one folder per class, with any names; None where no image lies in a folder.

    An image is named by its path, such as ``cat/0.jpg``; ILSVRC2012's images are named by their base names, as in its
    archives. A folder without images is a class too, because checkpoints count it.

    Raises:
        VitdemoError: for two images with the same name, which results could not tell apart.
    """
    ids = sorted({name.partition("/")[0] for name in listing.images if "/" in name})
    if not ids:
        return None
    notes, empty = listing.notes(), sorted(listing.folders - set(ids))
    loose = [name for name in listing.images if "/" not in name]
    if loose:
        notes.append(f"left out: {counted(len(loose), 'image')} outside the classes' folders, such as {loose[0]}")
    if all(map(WNID.fullmatch, ids)):
        classes = wnid_classes(ids, listing.path)
    else:
        classes = {name: name for name in sorted([*ids, *empty])}
        if empty:
            are = "have" if len(empty) > 1 else "has"
            notes.append(f"{counted(len(empty), 'class')} {are} no images, such as {empty[0]}")
    items = []
    for name, place in listing.images.items():
        class_id, slash, rest = name.partition("/")
        if slash:
            own = VAL_NAME.fullmatch(rest) or re.fullmatch(rf"{re.escape(class_id)}_\d+\.JPEG", rest, re.ASCII)
            items.append(Item(rest if own and WNID.fullmatch(class_id) else name, class_id, *place))
    items.sort()
    for first, second in itertools.pairwise(items):
        if first.file == second.file:
            both = f"{first.class_id}/ and in {second.class_id}/"
            raise VitdemoError(f"{listing.path}: {first.file} is in {both}; give each file its own name")
    return Index(listing.path, listing.tar, classes, items, tuple(notes), in_folders=True)


def index_by_name(listing: Listing) -> Index | None:
    """The index of files like ``ILSVRC2012_val_00000293_n01751748.JPEG``, which end with the class; None for others."""
    ends = {name: WNID_AT_END.search(name) for name in listing.images}
    if not ends or not all(end and end.end() == len(name) for name, end in ends.items()):
        return None
    items = [Item(name, ends[name][1], *place) for name, place in listing.images.items()]
    notes = ("labels from the wnids at the ends of the file names", *listing.notes())
    return Index(listing.path, listing.tar, known_classes([item.class_id for item in items]), items, notes)
