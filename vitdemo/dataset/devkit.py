"""The devkit of ILSVRC2012: the classes, and the class of every validation image."""

import gzip
import io
import re
import zlib
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.io import loadmat

from vitdemo.dataset.tars import ARCHIVE_MD5, walk_tar
from vitdemo.dataset.trees import WNID, Synset
from vitdemo.errors import VitdemoError, named_errors, reason_of

DEVKIT_LIMIT = 64 << 20  # bytes unpacked; the real devkit is far smaller, a gzip bomb far larger
FILE_LIMIT = 8 << 20  # bytes of a file in it; 1,860 synsets come to about 1.3 MB, 50,000 truths to 0.2
DEVKITS = "*devkit*.tar.gz"
META_MAT, GROUND_TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"


class Devkit(NamedTuple):
    """The contents of a devkit.

    ``synsets``: the leaf synsets in ascending order of wnid, so that a synset's position is its label.
    ``ground_truth``: one ILSVRC2012_ID per image, in ascending order of file names.
    """

    synsets: list[Synset]
    ground_truth: list[int]

    @property
    def class_names(self) -> dict[str, str]:
        """The names of the classes: wnid -> synonyms as one string, in the order of the labels."""
        return {synset.wnid: synset.words for synset in self.synsets}

    @property
    def labels(self) -> list[int]:
        """The ground truth as labels, 0-based."""
        label = {synset.id: position for position, synset in enumerate(self.synsets)}
        return [label[id] for id in self.ground_truth]


def read_devkit(path: Path | str) -> Devkit:
    """Read a devkit: a ``.tar.gz``, which is not unpacked to disk, or an unpacked folder.

    Format: ``data/meta.mat``, a MAT-file with the struct array ``synsets``, whose leaves (num_children 0) are the
    classes, and ``data/ILSVRC2012_validation_ground_truth.txt``, with one ID per line [the devkit's readme.txt].

    Args:
        path: the devkit, a file or a folder; its MD5 is not checked.

    Returns:
        The classes, and the ID of every validation image.

    Raises:
        VitdemoError: for a file in another format, and for classes that cannot be folder names.
    """
    path = Path(path)
    parsed, files = [], _files_in(path)
    for name, parse in ((META_MAT, _parse_synsets), (GROUND_TRUTH, lambda text: list(map(int, text.split())))):
        if name not in files:
            raise VitdemoError(f"{path}: holds no {name}, so it is no devkit of ILSVRC2012; get it again")
        if len(files[name]) > FILE_LIMIT:
            raise VitdemoError(f"{path}: {name!r} is larger than {FILE_LIMIT >> 20} MiB; refused")
        try:
            parsed.append(parse(files[name]))
        except Exception as error:  # scipy raises a dozen types for a file that is not a MAT-file
            raise VitdemoError(f"{path}: {name} cannot be read ({reason_of(error)}); get the devkit again") from None
    devkit = Devkit(*parsed)
    if unknown := set(devkit.ground_truth) - {synset.id for synset in devkit.synsets}:
        raise VitdemoError(f"{path}: ground truth has ID {min(unknown)}, which no leaf of meta.mat has; get it again")
    return devkit


def _files_in(path: Path) -> dict[str, bytes]:
    """The files of a devkit: the last two steps of each path -> the content."""
    with named_errors(path):
        if path.is_dir():
            return {name: (path / name).read_bytes() for name in (META_MAT, GROUND_TRUTH) if (path / name).is_file()}
        try:
            with gzip.open(path) as file:
                content = file.read(DEVKIT_LIMIT + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise VitdemoError(f"{path}: no whole gzip file ({error}); is it the devkit? get it again") from None
    if len(content) > DEVKIT_LIMIT:
        raise VitdemoError(f"{path}: unpacks to more than {DEVKIT_LIMIT >> 20} MiB, so it is no devkit; refused")
    members = [member for member in walk_tar(io.BytesIO(content), 0, len(content), path) if member.isreg()]
    return {"/".join(m.name.split("/")[-2:]): content[m.offset_data : m.offset_data + m.size] for m in members}


def _parse_synsets(meta_mat: bytes) -> list[Synset]:
    rows = np.atleast_1d(loadmat(io.BytesIO(meta_mat), squeeze_me=True, variable_names=["synsets"])["synsets"])
    leaves = [row for row in rows if int(row["num_children"]) == 0]
    synsets = [Synset(int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"])) for row in leaves]
    ids, wnids = {synset.id for synset in synsets}, {synset.wnid for synset in synsets}
    if not synsets or len(ids) < len(synsets) or len(wnids) < len(synsets):
        raise ValueError("it has no leaves, or the same ID or wnid twice")
    if other := [wnid for wnid in wnids if not WNID.fullmatch(wnid)]:  # wnids become names of folders
        raise ValueError(f"the wnid {other[0]!r} is not n and 8 digits")
    return sorted(synsets, key=lambda synset: synset.wnid)


# ---- the devkit next to a tar, or in a folder


def devkit_of(place: Path) -> Path:
    """The devkit that ``find_devkit`` finds for a tar of images or a folder.

    Raises:
        VitdemoError: when there is none, or more than one to choose from.
    """
    devkit = find_devkit(place)
    if devkit is None:
        folder, pattern = _where_devkits_lie(place)
        raise VitdemoError(f"{folder / pattern}: missing; without a devkit no image has a label: put it there")
    return devkit


def find_devkit(place: Path) -> Path | None:
    """The devkit next to a tar of images, with a matching name, or any devkit in a folder; None where there is none.

    Among several devkits the one whose MD5 is known is taken. A folder without a devkit archive may hold an unpacked
    one.

    Raises:
        VitdemoError: for several devkits, unless the MD5 of exactly one is known.
    """
    folder, pattern = _where_devkits_lie(place)
    with named_errors(folder):
        found = sorted(file for file in folder.iterdir() if fnmatch(file.name, pattern))
        unpacked = [file for file in folder.glob("*devkit*") if (file / META_MAT).is_file()]
    found = found or (unpacked if place.is_dir() else [])
    known = [path for path in found if path.name in ARCHIVE_MD5]
    if len(found) > 1 and len(known) != 1:
        raise VitdemoError(f"{folder}: which devkit of {', '.join(file.name for file in found)}? leave one there")
    return next(iter(known or found), None)


def _where_devkits_lie(place: Path) -> tuple[Path, str]:
    """The folder and the name pattern: ``<name>_devkit*.tar.gz`` next to ``<name>_img_val.tar``, or any in a folder."""
    if place.is_dir():
        return place, DEVKITS
    return place.parent, re.sub(r"img_(val|train)\.tar$", "", place.name) + DEVKITS[1:]
