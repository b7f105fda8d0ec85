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

from vitdemo.dataset import trees
from vitdemo.dataset.devkit import devkit_of, find_devkit, read_devkit
from vitdemo.dataset.tars import IMAGE_LIMIT, Member, index_tar
from vitdemo.dataset.trees import AGAIN, WNID, Item
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.paths import user_path

# An image that is gone since it was indexed, or a process that has no more files or memory: no row of an evaluation.
NOT_THE_FILES_FAULT = {errno.ENOENT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
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

    Threads may read from one object at once; it can be pickled to a process that sees the same path.

    Args:
        path: where the set lies; which forms there are is said at the two classes.
        progress: show a bar when indexing takes longer than two seconds.

    Attributes:
        path: the tar, or the folder with one folder per class.
        source: "tar" or "folder".
        classes: the wnids, lexicographic.
        class_names: each class's synonyms in one string.
        files, sizes, labels: of each sample the base name, ascending; bytes; and the index into ``classes``.
        offsets: of each sample in the tar, in bytes; 0 in a folder.

    Raises:
        VitdemoError: when there is no data set, or an unfinished or damaged one.
    """

    split: str

    def __init__(self, path: Path | str, *, progress: bool = True):
        if "://" in str(path):
            raise VitdemoError(f"{path}: is an address; download what is there, and give the file or folder")
        path = user_path(path).absolute()
        with named_errors(path):
            path.stat()
            tree = None if path.is_file() else trees.find_tree(path, self.split)
            self.source = "folder" if tree else "tar"
            self.path = tree or trees.split_tar(path, self.split)
            names, items = trees.index_tree(tree, self.split) if tree else self._index_tar(progress)
            self.classes, self.class_names = list(names), list(names.values())
            self._take(items)
        record = trees.read_record(tree.parent, self.split) if tree and tree.name == self.split else None
        if record is not None and self.fingerprint != record.get("fingerprint"):
            counts = f"its {len(self)} images are not the {record.get('images')} that were extracted"
            raise VitdemoError(f"{self.path}: {counts}, names, sizes or labels differ; {AGAIN}")

    def _index_tar(self, progress: bool) -> tuple[dict[str, str], Iterable[Item]]:
        """The classes, wnid -> name, lexicographic, and the images in ascending file name."""
        raise NotImplementedError

    def _take(self, items: Iterable[Item]) -> None:
        label = {wnid: position for position, wnid in enumerate(self.classes)}
        self.files, self.sizes, self.labels, self.offsets = [], [], [], []
        for file, wnid, size, offset in items:
            if size > IMAGE_LIMIT:
                limit = f"{IMAGE_LIMIT >> 20} MiB, and no image is"
                raise VitdemoError(f"{self.path}: {file!r} is larger than {limit}; take it out")
            self.files.append(file)
            self.sizes.append(size)
            self.labels.append(label[wnid])
            self.offsets.append(offset)

    @cached_property
    def _tar(self) -> int:
        """The open tar; a process to which the data set was pickled opens its own."""
        with named_errors(self.path):
            descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_tar"}

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
        in_tar = self.source == "tar"
        place = self._tar if in_tar else self.path / wnid / file
        try:
            with named_errors(self.path):  # pread: no file position that threads could share
                jpeg = os.pread(place, self.sizes[i], self.offsets[i]) if in_tar else place.read_bytes()
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
        for number, member in enumerate(members, start=1):
            name = f"ILSVRC2012_val_{number:08d}.JPEG"
            if member.name != name:
                cure = "is one missing before it, is this the val tar, or are archives swapped?"
                raise VitdemoError(f"{self.path}: image number {number} is named {member.name!r}, not {name}; {cure}")
        if len(members) != len(devkit.ground_truth):
            raise VitdemoError(
                f"{self.path}: holds {len(members)} images, but the ground truth in {devkit_path.name} has "
                f"{len(devkit.ground_truth)} lines; they do not belong together, get both again"
            )
        wnids = [devkit.synsets[label].wnid for label in devkit.labels]
        items = (Item(name, wnid, size, at) for (name, at, size), wnid in zip(members, wnids, strict=True))
        return devkit.class_names, items


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
        tars = {tar.name.removesuffix(".tar"): tar for tar in sorted(index_tar(self.path))}
        devkit_path = find_devkit(self.path)
        if devkit_path:
            names = read_devkit(devkit_path).class_names
        else:
            names = trees.known_classes(list(tars), self.path, "put the devkit beside the tar")
        for wnid, tar in tars.items():
            if not WNID.fullmatch(wnid):
                cure = "is this the train tar, or are archives swapped?"
                raise VitdemoError(f"{self.path}: a member is named {tar.name!r}, not like n01440764.tar; {cure}")
            if wnid not in names:
                lacking = f"a class that {devkit_path.name} lacks; they do not belong together, get both again"
                raise VitdemoError(f"{self.path}: holds {tar.name}, {lacking}")
        bar = tqdm(tars.items(), desc=f"index {self.path.name}", unit="class", delay=2, disable=not progress)
        return names, (item for wnid, tar in bar for item in self._index_class(wnid, tar))

    def _index_class(self, wnid: str, tar: Member) -> list[Item]:
        items = [Item(name, wnid, size, offset) for name, offset, size in sorted(index_tar(self.path, tar))]
        for item in items:
            if not re.fullmatch(rf"{wnid}_\d+\.JPEG", item.file, re.ASCII):
                what = f"{tar.name}: a member is named {item.file!r}, not like {wnid}_1234.JPEG"
                raise VitdemoError(f"{self.path}: {what}; get the archive again")
        return items
