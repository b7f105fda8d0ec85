"""The devkit of ILSVRC2012: the classes, and the class of every validation image.

Two numberings meet here. The devkit counts classes by ILSVRC2012_ID, from 1; models count them from 0 in the
lexicographic order of the wnids. ID 490 is n01751748, whose index is 65. Everything above this file speaks of the
index, and calls it ``label``. [``readme.txt`` of the devkit; pytorch/vision ``torchvision/datasets/imagenet.py``]
"""

import gzip
import re
import zlib
from pathlib import Path
from typing import NamedTuple

from vitdemo.dataset.archives import REGULAR_TYPES, walk_headers
from vitdemo.dataset.matfile import read_struct_array
from vitdemo.errors import VitdemoError, named_errors

WNID = re.compile(r"n\d{8}", re.ASCII)
DEVKIT_LIMIT = 64 << 20  # bytes unpacked; the real devkit is far below, a gzip bomb far above
FILE_LIMIT = 8 << 20  # bytes of a file in it; 1,860 synsets come to about 1.3 MB, 50,000 truths to 0.2
META_MAT, GROUND_TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"


class Synset(NamedTuple):
    """A class as the devkit has it: ILSVRC2012_ID (from 1), wnid, and its synonyms as one string."""

    id: int
    wnid: str
    words: str


class Devkit(NamedTuple):
    """``synsets``: the leaves, lexicographic by wnid, so that a synset's position is its label;
    ``ground_truth``: an ILSVRC2012_ID an image, in ascending file name."""

    synsets: list[Synset]
    ground_truth: list[int]

    @property
    def class_names(self) -> dict[str, str]:
        """Wnid -> synonyms as one string, in the order of the labels."""
        return {synset.wnid: synset.words for synset in self.synsets}

    @property
    def labels(self) -> list[int]:
        """The ground truth as labels, 0-based."""
        label = {synset.id: position for position, synset in enumerate(self.synsets)}
        return [label[id] for id in self.ground_truth]


def read_devkit(path: Path | str) -> Devkit:
    """Read a devkit ``.tar.gz`` without unpacking it to disk.

    Format: ``data/meta.mat`` with the struct array ``synsets``, of which the leaves (num_children 0) are the
    classes, and ``data/ILSVRC2012_validation_ground_truth.txt``, an ID a line. Raises VitdemoError for anything else.
    """
    path = Path(path)
    content = _gunzip(path)
    files = {}
    for header, offset in walk_headers(lambda length, at: content[at : at + length], len(content), path):
        name = "/".join(header.name.split("/")[-2:])
        if header.type not in REGULAR_TYPES or name not in (META_MAT, GROUND_TRUTH):
            continue
        if header.size > FILE_LIMIT:
            raise VitdemoError(f"{path}: {header.name!r} is larger than {FILE_LIMIT >> 20} MiB; refused")
        files[name] = content[offset : offset + header.size]
    for name in (META_MAT, GROUND_TRUTH):
        if name not in files:
            raise VitdemoError(f"{path}: holds no {name}, so it is no devkit of ILSVRC2012; get it again")
    synsets = _read_synsets(files[META_MAT], path)
    truth = _read_ground_truth(files[GROUND_TRUTH], path)
    unknown = set(truth) - {synset.id for synset in synsets}
    if unknown:
        raise VitdemoError(f"{path}: ground truth has ID {min(unknown)}, which no leaf of meta.mat has; get it again")
    return Devkit(synsets, truth)


def _gunzip(path: Path) -> bytes:
    with named_errors(path):
        try:
            with gzip.open(path) as file:
                content = file.read(DEVKIT_LIMIT + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise VitdemoError(f"{path}: no whole gzip file ({error}); is it the devkit? get it again") from None
    if len(content) > DEVKIT_LIMIT:
        raise VitdemoError(f"{path}: unpacks to more than {DEVKIT_LIMIT >> 20} MiB, so it is no devkit; refused")
    return content


def _read_synsets(meta_mat: bytes, path: Path) -> list[Synset]:
    try:
        leaves = [_leaf(row) for row in read_struct_array(meta_mat, "synsets") if row["num_children"] == 0]
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise VitdemoError(f"{path}: meta.mat cannot be read ({error}); get the devkit again") from None
    for synset in leaves:
        if not WNID.fullmatch(synset.wnid):  # wnids become names of folders
            raise VitdemoError(f"{path}: meta.mat has the wnid {synset.wnid!r}, not n and 8 digits; refused")
    if not leaves or any(len(set(column)) < len(leaves) for column in list(zip(*leaves, strict=True))[:2]):
        raise VitdemoError(f"{path}: meta.mat has no leaves, or the same ID or wnid twice; get the devkit again")
    return sorted(leaves, key=lambda synset: synset.wnid)


def _leaf(row: dict) -> Synset:
    synset = Synset(int(row["ILSVRC2012_ID"]), row["WNID"], row["words"])
    if not (isinstance(synset.wnid, str) and isinstance(synset.words, str)):
        raise ValueError(f"class {synset.id} has no wnid or no words")
    return synset


def _read_ground_truth(text: bytes, path: Path) -> list[int]:
    try:
        return [int(line) for line in text.split()]
    except ValueError:
        raise VitdemoError(f"{path}: the ground truth is not one number a line; get the devkit again") from None
