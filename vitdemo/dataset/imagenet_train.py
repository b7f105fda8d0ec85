"""ILSVRC2012's training set, or one of the same form: a tar of a thousand tars, read where they lie."""

import re
from collections.abc import Iterable

from tqdm.auto import tqdm

from vitdemo.dataset.archives import Member, index_tar
from vitdemo.dataset.devkit import read_devkit
from vitdemo.dataset.imagenet import ImageNetSplit, find_devkit
from vitdemo.dataset.trees import Item, known_classes
from vitdemo.errors import VitdemoError

TRAIN_TAR = re.compile(r"n\d{8}\.tar", re.ASCII)
TRAIN_NAME = re.compile(r"(n\d{8})_\d+\.JPEG", re.ASCII)


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
