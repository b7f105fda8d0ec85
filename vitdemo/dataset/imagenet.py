"""ILSVRC2012's validation and training set, or others of that form, as samples in ascending file name."""

import errno
import hashlib
import os
import re
import weakref
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from vitdemo.dataset.devkit import devkit_of, find_devkit, read_devkit
from vitdemo.dataset.tars import IMAGE_LIMIT, MEMBER_LIMIT, Member, index_tar
from vitdemo.dataset.trees import AGAIN, FOLDERS, Item, expected, find_tree, index_tree, known_classes, read_record
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.paths import user_path

# An image that is gone since it was indexed, or a process that has no more files or memory: no row of an evaluation.
NOT_THE_FILES_FAULT = {errno.ENOENT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
TRAIN_TAR = re.compile(r"n\d{8}\.tar", re.ASCII)
TRAIN_NAME = re.compile(r"(n\d{8})_\d+\.JPEG", re.ASCII)
VAL_NAME = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG", re.ASCII)


class Sample(NamedTuple):
    """One image: base name, the JPEG's bytes, wnid, and label, the wnid's index in the data set's ``classes``."""

    file: str
    jpeg: bytes
    wnid: str
    label: int


class UnreadableFile(VitdemoError):
    """One image's file that the disk does not give, where the others may be sound; ``sample`` is it without bytes."""

    def __init__(self, reason: str, sample: Sample | None = None):
        super().__init__(reason)
        self.sample = sample


class ImageNetSplit:
    """What ``ImageNetVal`` and ``ImageNetTrain`` share: samples in ascending file name, whatever the source.

    Attributes: ``path`` (the tar, or the folder with one folder per class), ``source`` ("tar" or "folder"),
    ``classes`` (wnids, lexicographic), ``class_names`` (synonyms in one string), and for each sample
    ``files``, ``sizes`` in bytes, ``labels``, ``offsets`` in the tar in bytes (0 in a folder).
    Threads may read from one object at once; it can be pickled to a process that sees the same path.
    Raises VitdemoError when there is no data set, or an unfinished or damaged one.
    """

    split: str

    def __init__(self, path: Path | str, *, progress: bool = True):
        """``progress``: show a bar when indexing takes longer than two seconds."""
        path = user_path(path).absolute()
        with named_errors(path):
            path.stat()
            tree = None if path.is_file() else find_tree(path, self.split)
            self.source = "folder" if tree else "tar"
            self.path = tree or split_tar(path, self.split)
            names, items = index_tree(tree, self.split) if tree else self._index_tar(progress)
            self.classes, self.class_names = list(names), list(names.values())
            self._take(items)
            if tree:
                self._check_record()
            else:
                self._open()

    def _index_tar(self, progress: bool) -> tuple[dict[str, str], Iterable[Item]]:
        """The classes, wnid -> name, lexicographic, and the images in ascending file name."""
        raise NotImplementedError

    def _take(self, items: Iterable[Item]) -> None:
        label = {wnid: position for position, wnid in enumerate(self.classes)}
        self.files, self.sizes, self.labels, self.offsets = [], [], [], []
        for file, wnid, size, offset in items:
            if len(self.files) == MEMBER_LIMIT:
                raise VitdemoError(f"{self.path}: more than {MEMBER_LIMIT:,} images, from {file!r} on; refused")
            if size > IMAGE_LIMIT:
                raise VitdemoError(
                    f"{self.path}: {file!r} is larger than {IMAGE_LIMIT >> 20} MiB, and no image is; take it out"
                )
            self.files.append(file)
            self.sizes.append(size)
            self.labels.append(label[wnid])
            self.offsets.append(offset)

    def _check_record(self) -> None:
        """Hold an extracted tree against what ``extract`` recorded of it."""
        record = read_record(self.path.parent, self.split) if self.path.name == FOLDERS[self.split][0] else None
        if record is None:
            return
        if len(self) != record.get("images"):
            raise VitdemoError(f"{self.path}: holds {len(self)} images, extracted were {record.get('images')}; {AGAIN}")
        if self.fingerprint != record.get("fingerprint"):
            raise VitdemoError(f"{self.path}: names, sizes or labels differ from what was extracted; {AGAIN}")

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
        counts = f"{len(self):,} images, {len(self.classes):,} classes"
        return f"{type(self).__name__}({counts}, {self.source} {self.path})"

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Sample:
        file, label = self.files[i], self.labels[i]
        wnid = self.classes[label]
        try:
            with named_errors(self.path):
                if self.source == "tar":  # pread: no file position that threads could share
                    jpeg = os.pread(self._fd, self.sizes[i], self.offsets[i])
                else:
                    jpeg = (self.path / wnid / file).read_bytes()
        except VitdemoError as error:
            if getattr(error.__context__, "errno", None) in NOT_THE_FILES_FAULT:
                raise
            raise UnreadableFile(str(error), Sample(file, b"", wnid, label)) from None
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


class ImageNetVal(ImageNetSplit):
    """An ILSVRC2012 validation set, or one of the same form. What it shares with others: ``ImageNetSplit``.

    ``path`` is one of
    - a tar ``<name>_img_val.tar`` with ``<name>_devkit*.tar.gz`` beside it, or a folder with both,
    - what ``vitdemo extract`` wrote, or ``val/`` in it,
    - torchvision's or timm's tree (``val/<wnid>/*.JPEG``, ``validation/…``) or its val folder. Wnids of ImageNet
      get their index among its 1,000 however many are there; other wnids are numbered in lexicographic order.
    """

    split = "val"

    def _index_tar(self, progress: bool) -> tuple[dict[str, str], Iterable[Item]]:
        members = sorted(index_tar(self.path))
        devkit_path = devkit_of(self.path)
        devkit = read_devkit(devkit_path)
        _check_val_names([member.name for member in members], len(devkit.ground_truth), self.path, devkit_path)
        wnids = [devkit.synsets[label].wnid for label in devkit.labels]
        items = (Item(name, wnid, size, at) for (name, at, size), wnid in zip(members, wnids, strict=True))
        return devkit.class_names, items


def split_tar(path: Path, split: str) -> Path:
    """``path`` if it is a tar of the split, or the one tar of it in the folder ``path``."""
    with named_errors(path):
        found = [path] if path.is_file() else sorted(path.iterdir())
    tars = [tar for tar in found if tar.name.endswith(f"_img_{split}.tar") and not tar.name.startswith(".")]
    if not tars:
        raise VitdemoError(f"{path}: no data set; {expected(split)}")
    if len(tars) > 1:
        names = ", ".join(tar.name for tar in tars)
        raise VitdemoError(f"{path}: holds {len(tars)} {split} tars ({names}); name the one")
    return tars[0]


def val_tar(path: Path) -> Path:
    """``path`` if it is a val tar, or the one val tar in the folder ``path``."""
    return split_tar(path, "val")


def _check_val_names(names: list[str], expected: int, tar: Path, devkit: Path) -> None:
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


class ImageNetTrain(ImageNetSplit):
    """An ILSVRC2012 training set, or one of the same form. What it shares with others: ``ImageNetSplit``.

    ``path`` is one of
    - a tar ``<name>_img_train.tar`` of tars ``<wnid>.tar`` with files ``<wnid>_<number>.JPEG``, or a folder with it.
      The images are read where they lie, nothing is unpacked. A devkit ``<name>_devkit*.tar.gz`` beside it lists
      the classes; without one they are ImageNet's 1,000 if the wnids are among them, else the wnids there are,
    - what ``vitdemo extract --split train`` wrote, torchvision's or timm's tree, or ``train/`` in it.
    """

    split = "train"

    def _index_tar(self, progress: bool) -> tuple[dict[str, str], Iterable[Item]]:
        tars = sorted(index_tar(self.path))
        for tar in tars:
            if not TRAIN_TAR.fullmatch(tar.name):
                raise VitdemoError(
                    f"{self.path}: member {tar.name!r} is not named like n01440764.tar; is this the train tar, "
                    "or are archives swapped?"
                )
        names = self._classes_of([tar.name.removesuffix(".tar") for tar in tars])
        bar = tqdm(tars, desc=f"index {self.path.name}", unit="class", delay=2, disable=not progress)
        return names, (item for tar in bar for item in self._index_class(tar))

    def _classes_of(self, wnids: list[str]) -> dict[str, str]:
        if not wnids:
            raise VitdemoError(f"{self.path}: holds no classes; get the archive again")
        devkit_path = find_devkit(self.path)
        if devkit_path is None:
            return known_classes(wnids, self.path, "put the devkit beside the tar")
        names = read_devkit(devkit_path).class_names
        for wnid in wnids:
            if wnid not in names:
                raise VitdemoError(
                    f"{self.path}: holds {wnid}.tar, a class that {devkit_path.name} lacks; they do not belong "
                    "together, get both again"
                )
        return names

    def _index_class(self, tar: Member) -> list[Item]:
        wnid = tar.name.removesuffix(".tar")
        items = [Item(name, wnid, size, offset) for name, offset, size in sorted(index_tar(self.path, tar))]
        for item in items:
            match = TRAIN_NAME.fullmatch(item.file)
            if not match or match[1] != wnid:
                raise VitdemoError(
                    f"{self.path}: {tar.name}: member {item.file!r} is not named like {wnid}_1234.JPEG; "
                    "get the archive again"
                )
        if not items:
            raise VitdemoError(f"{self.path}: {tar.name} holds no images; get the archive again")
        return items
