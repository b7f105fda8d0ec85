"""ILSVRC2012's validation set, or one of the same form, as samples in ascending file name, whatever the source."""

import csv
import hashlib
import itertools
import json
import os
import re
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from vitdemo.dataset.archives import PART, index_tar
from vitdemo.dataset.devkit import WNID, read_devkit
from vitdemo.errors import VitdemoError, named_errors

OFFICIAL_VAL = "ILSVRC2012_img_val.tar"

ARCHIVE_MD5 = {
    # ImageNet's own [pytorch/vision torchvision/datasets/imagenet.py]
    OFFICIAL_VAL: "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    # the bundled ones, printed by `python -m vitdemo.shapes20.draw`
    "shapes20_img_val.tar": "507739f1fc65b1a6fbeed3b998700df7",
    "shapes20_devkit.tar.gz": "138ba62ea185073dde2c13e19dacd442",
    "shapes20_calib.tar": "8bd55139a36e3827a412955a3e3ac07c",
}

VAL_NAME = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG", re.ASCII)
CLASSES_COLUMNS = ["label", "wnid", "ilsvrc_id", "name"]
EXPECTED = "expected <name>_img_val.tar with its devkit beside it, or val/ with one folder a class, named n01440764 …"


class Sample(NamedTuple):
    """One image: base name, the JPEG's bytes, wnid, and label, the wnid's index in the data set's ``classes``."""

    file: str
    jpeg: bytes
    wnid: str
    label: int


class ImageNetVal:
    """An ILSVRC2012 validation set, or one of the same form: samples in ascending file name, whatever the source.

    ``path`` is one of
    - a tar ``<name>_img_val.tar`` with ``<name>_devkit*.tar.gz`` beside it, or a folder with both,
    - what ``vitdemo extract`` wrote, or ``val/`` in it,
    - torchvision's or timm's tree (``val/<wnid>/*.JPEG``, ``validation/…``) or its val folder. Wnids of ImageNet
      get their index among its 1,000 however many are there; other wnids are numbered in lexicographic order.

    Attributes: ``path`` (the tar or the val folder), ``source`` ("tar" or "folder"), ``classes`` (wnids,
    lexicographic), ``class_names`` (synonyms in one string), and for each sample
    ``files``, ``sizes`` in bytes, ``labels``.
    Threads may read from one object at once; it can be pickled to a process that sees the same path.
    Raises VitdemoError when there is no data set, or an unfinished or damaged one.
    """

    def __init__(self, path: Path | str):
        path = Path(path).expanduser().absolute()
        with named_errors(path):
            path.stat()
            split = None if path.is_file() else _split_folder(path)
            if split:
                self._index_folder(split)
            else:
                self._index_tar(val_tar(path))

    def _index_tar(self, tar: Path) -> None:
        members = sorted(index_tar(tar))
        devkit_path = devkit_of(tar)
        devkit = read_devkit(devkit_path)
        _check_names([member.name for member in members], len(devkit.ground_truth), tar, devkit_path)
        self.path, self.source = tar, "tar"
        self.classes = [synset.wnid for synset in devkit.synsets]
        self.class_names = [synset.words for synset in devkit.synsets]
        self.files = [member.name for member in members]
        self.sizes = [member.size for member in members]
        self.labels = devkit.labels
        self._offsets = [member.offset for member in members]
        self._open()

    def _index_folder(self, folder: Path) -> None:
        wnids, found = _scan(folder)
        names = _class_names(folder, wnids)
        label = {wnid: position for position, wnid in enumerate(names)}
        self.path, self.source = folder, "folder"
        self.classes, self.class_names = list(names), list(names.values())
        self.files = [file for file, _, _ in found]
        self.sizes = [size for _, _, size in found]
        self.labels = [label[wnid] for _, wnid, _ in found]
        self._check_record()

    def _check_record(self) -> None:
        """Hold an extracted tree against what ``extract`` recorded of it."""
        record = read_record(self.path.parent) if self.path.name == "val" else None
        if record is None:
            return
        cure = "run the same vitdemo extract again"
        if len(self) != record.get("images"):
            raise VitdemoError(f"{self.path}: holds {len(self)} images, extracted were {record.get('images')}; {cure}")
        if self.fingerprint != record.get("fingerprint"):
            raise VitdemoError(f"{self.path}: names, sizes or labels differ from what was extracted; {cure}")

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_fd"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.source == "tar":
            with named_errors(self.path):
                self._open()

    def __repr__(self) -> str:
        return f"ImageNetVal({len(self):,} images, {len(self.classes):,} classes, {self.source} {self.path})"

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Sample:
        file, label = self.files[i], self.labels[i]
        wnid = self.classes[label]
        with named_errors(self.path):
            if self.source == "tar":  # pread: no file position that threads could share
                jpeg = os.pread(self._fd, self.sizes[i], self._offsets[i])
            else:
                jpeg = (self.path / wnid / file).read_bytes()
        if len(jpeg) != self.sizes[i]:
            raise VitdemoError(f"{self.path}: {file} changed since it was indexed; open the data set again")
        return Sample(file, jpeg, wnid, label)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over name, size and label of every sample: equal for a tar and for what was extracted from it."""
        digest = hashlib.sha256()
        for row in zip(self.files, self.sizes, self.labels, strict=True):
            digest.update("{}\t{}\t{}\n".format(*row).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def read_record(root: Path) -> dict | None:
    """What ``extract`` recorded in ``root``, or None."""
    path = root / "extraction.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise VitdemoError(f"{path}: not as vitdemo extract wrote it; extract to a new folder")
    return record


def val_tar(path: Path) -> Path:
    """``path`` if it is a val tar, or the one val tar in the folder ``path``."""
    with named_errors(path):
        found = [path] if path.is_file() else sorted(path.iterdir())
    tars = [tar for tar in found if tar.name.endswith("_img_val.tar")]
    if not tars:
        raise VitdemoError(f"{path}: no data set; {EXPECTED}")
    if len(tars) > 1:
        raise VitdemoError(f"{path}: holds {len(tars)} val tars ({', '.join(tar.name for tar in tars)}); name the one")
    return tars[0]


def devkit_of(tar: Path) -> Path:
    """The devkit beside a val tar; among several the one whose MD5 is known."""
    prefix = tar.name.removesuffix("img_val.tar") + "devkit"
    with named_errors(tar.parent):
        found = sorted(f for f in tar.parent.iterdir() if f.name.startswith(prefix) and f.name.endswith(".tar.gz"))
    known = [path for path in found if path.name in ARCHIVE_MD5]
    if not found:
        raise VitdemoError(
            f"{tar.parent / prefix}*.tar.gz: missing; without a devkit no image has a label: put it there"
        )
    if len(found) > 1 and len(known) != 1:
        raise VitdemoError(
            f"{tar.parent}: which devkit of {', '.join(f.name for f in found)}? leave one beside {tar.name}"
        )
    return (known or found)[0]


def _check_names(names: list[str], expected: int, tar: Path, devkit: Path) -> None:
    """``names``, in ascending order, must be those of images 1 to ``expected``."""
    for name in names:
        if not VAL_NAME.fullmatch(name):
            raise VitdemoError(
                f"{tar}: member {name!r} is not named like ILSVRC2012_val_00000001.JPEG; is this the val tar, "
                "or are archives swapped?"
            )
    if len(names) != expected:
        raise VitdemoError(
            f"{tar}: holds {len(names)} images, but the ground truth in {devkit.name} has {expected} lines; "
            "they do not belong together, get both again"
        )
    for number, name in enumerate(names, start=1):
        if name != f"ILSVRC2012_val_{number:08d}.JPEG":
            raise VitdemoError(f"{tar}: image number {number} is {name}: one is missing before it; get the tar again")


def _split_folder(path: Path) -> Path | None:
    """The folder with a folder a class in or at ``path``; None when ``path`` is a folder of archives."""
    if path.name.endswith(PART):
        raise VitdemoError(f"{path}: an unfinished extraction; run the same vitdemo extract again")
    for split in (path / "val", path / "validation"):
        if split.is_dir():
            return split
    if (path / ("val" + PART)).exists() or (path / "extraction.json").exists():
        raise VitdemoError(f"{path}: an unfinished extraction; run the same vitdemo extract again")
    return None if any(entry.name.endswith("_img_val.tar") for entry in path.iterdir()) else path


def _scan(folder: Path) -> tuple[list[str], list[tuple[str, str, int]]]:
    """The wnids that have a folder, and (file, wnid, size in bytes) of each JPEG, both in ascending order."""
    wnids, found = [], []
    for entry in os.scandir(folder):
        if _is_jpeg(entry.name):
            raise VitdemoError(
                f"{folder}: JPEGs lie flat in it ({entry.name}); read like this all would be one class. They belong "
                "in one folder a class: vitdemo extract sorts the original archives"
            )
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        if not WNID.fullmatch(entry.name):
            raise VitdemoError(
                f"{folder}: no data set: {entry.name!r} is no wnid, and numbers or words do not say a class's index "
                f"(as text, 10 comes before 2); {EXPECTED}"
            )
        wnids.append(entry.name)
        found += [(file.name, entry.name, file.stat().st_size) for file in os.scandir(entry) if _is_jpeg(file.name)]
    if not found:
        raise VitdemoError(f"{folder}: no data set, it holds no JPEGs by class; {EXPECTED}")
    unwritable = next((file for file, _, _ in found if not file.isprintable()), None)
    if unwritable is not None:  # a surrogate, where the name is not UTF-8, is not printable either
        raise VitdemoError(f"{folder}: the file name {unwritable!r} cannot be written to a table; rename the file")
    found.sort()
    for first, second in itertools.pairwise(found):
        if first[0] == second[0]:
            raise VitdemoError(
                f"{folder}: {first[0]} is in {first[1]}/ and in {second[1]}/; results go by file name: "
                "give each file its own"
            )
    return sorted(wnids), found


def _is_jpeg(name: str) -> bool:
    return name.lower().endswith((".jpeg", ".jpg")) and not name.startswith(".")


def _class_names(folder: Path, wnids: list[str]) -> dict[str, str]:
    """Names of all classes by wnid, lexicographic, for a tree with folders for ``wnids``.

    They come from ``classes.csv`` beside the tree; without it from ImageNet's 1,000 if the wnids are among them, as
    a subset keeps its indices; else the wnids are the classes.
    """
    path = folder.parent / "classes.csv"
    names = _read_classes(path) if path.exists() else _imagenet_classes()
    unknown = [wnid for wnid in wnids if wnid not in names]
    if path.exists() and unknown:
        raise VitdemoError(f"{path}: lacks {unknown[0]}, which has a folder in {folder}; extract to a new folder")
    if 0 < len(unknown) < len(wnids):
        raise VitdemoError(
            f"{folder}: {unknown[0]} is not among ImageNet's 1,000 classes and other folders are, so their indices are "
            "uncertain; move it away, or put a classes.csv beside the folder"
        )
    return {wnid: wnid for wnid in wnids} if unknown else names


def _read_classes(path: Path) -> dict[str, str]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            rows = [(int(row["label"]), row["wnid"], row["name"]) for row in reader]
        except (KeyError, TypeError, ValueError):
            rows = []
    wnids = [wnid for _, wnid, _ in rows]
    if not rows or wnids != sorted(set(wnids)) or [label for label, _, _ in rows] != list(range(len(rows))):
        raise VitdemoError(
            f"{path}: not a list of classes with columns {','.join(CLASSES_COLUMNS)}, label from 0, wnids ascending; "
            "extract to a new folder"
        )
    return {wnid: name for _, wnid, name in rows}


def _imagenet_classes() -> dict[str, str]:
    from timm.data import ImageNetInfo  # seconds to import, and only a tree without classes.csv needs it

    info = ImageNetInfo("imagenet-1k")
    return {wnid: info.label_name_to_description(wnid) for wnid in info.label_names()}
