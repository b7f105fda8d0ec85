"""The devkit of ILSVRC2012: the classes, and the class of every validation image."""

import gzip
import io
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.io import loadmat

from vitdemo.dataset.tars import ARCHIVE_MD5, walk_tar
from vitdemo.dataset.trees import WNID
from vitdemo.errors import VitdemoError, named_errors, reason_of

DEVKIT_LIMIT = 64 << 20  # bytes unpacked; the real devkit is far below, a gzip bomb far above
FILE_LIMIT = 8 << 20  # bytes of a file in it; 1,860 synsets come to about 1.3 MB, 50,000 truths to 0.2
DEVKITS = "*devkit*.tar.gz"
META_MAT, GROUND_TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"


class Synset(NamedTuple):
    """A class as the devkit has it: ILSVRC2012_ID (from 1), wnid, and its synonyms as one string."""

    id: int
    wnid: str
    words: str


class Devkit(NamedTuple):
    """``synsets``: the leaves, lexicographic by wnid, so that a synset's position is its label;
    ``ground_truth``: one ILSVRC2012_ID per image, in ascending file name."""

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
    classes, and ``data/ILSVRC2012_validation_ground_truth.txt``, one ID per line.

    Args:
        path: the devkit; its MD5 is not looked at.

    Raises:
        VitdemoError: for others.
    """
    path = Path(path)
    content = _gunzip(path)
    files = {}
    for member in walk_tar(io.BytesIO(content), 0, len(content), path):
        name = "/".join(member.name.split("/")[-2:])
        if not member.isreg() or name not in (META_MAT, GROUND_TRUTH):
            continue
        if member.size > FILE_LIMIT:
            raise VitdemoError(f"{path}: {member.name!r} is larger than {FILE_LIMIT >> 20} MiB; refused")
        files[name] = content[member.offset_data : member.offset_data + member.size]
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
        rows = np.atleast_1d(loadmat(io.BytesIO(meta_mat), squeeze_me=True, variable_names=["synsets"])["synsets"])
        leaves = [
            Synset(int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"]))
            for row in rows
            if int(row["num_children"]) == 0
        ]
    except Exception as error:  # of a file that is no MAT-file scipy raises a dozen types
        raise VitdemoError(f"{path}: meta.mat cannot be read ({reason_of(error)}); get the devkit again") from None
    for synset in leaves:
        if not WNID.fullmatch(synset.wnid):  # wnids become names of folders
            raise VitdemoError(f"{path}: meta.mat has the wnid {synset.wnid!r}, not n and 8 digits; refused")
    if not leaves or any(len(set(column)) < len(leaves) for column in list(zip(*leaves, strict=True))[:2]):
        raise VitdemoError(f"{path}: meta.mat has no leaves, or the same ID or wnid twice; get the devkit again")
    return sorted(leaves, key=lambda synset: synset.wnid)


def _read_ground_truth(text: bytes, path: Path) -> list[int]:
    try:
        return [int(line) for line in text.split()]
    except ValueError:
        raise VitdemoError(f"{path}: the ground truth is not one number per line; get the devkit again") from None


# ---- the devkit beside a tar


def devkit_of(tar: Path) -> Path:
    """The devkit beside a tar of images; among several the one whose MD5 is known. Raises VitdemoError without one."""
    devkit = find_devkit(tar)
    if devkit is None:
        raise VitdemoError(
            f"{tar.parent / _devkit_prefix(tar)}*.tar.gz: missing; without a devkit no image has a label: put it there"
        )
    return devkit


def find_devkit(tar: Path) -> Path | None:
    """The devkit beside a tar of images, or None; among several the one whose MD5 is known."""
    prefix = _devkit_prefix(tar)
    with named_errors(tar.parent):
        found = sorted(f for f in tar.parent.iterdir() if f.name.startswith(prefix) and f.name.endswith(".tar.gz"))
    known = [path for path in found if path.name in ARCHIVE_MD5]
    if len(found) > 1 and len(known) != 1:
        raise VitdemoError(
            f"{tar.parent}: which devkit of {', '.join(f.name for f in found)}? leave one beside {tar.name}"
        )
    return next(iter(known or found), None)


def _devkit_prefix(tar: Path) -> str:
    return re.sub(r"img_(val|train)\.tar$", "", tar.name) + "devkit"
