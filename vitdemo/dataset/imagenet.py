"""Indexes ILSVRC2012's archives, or others in that format, without unpacking; and its images in a flat folder."""

import re
from pathlib import Path

from tqdm.auto import tqdm

from vitdemo.dataset.devkit import devkit_of, find_devkit, read_devkit
from vitdemo.dataset.samples import Index, Item, Listing
from vitdemo.dataset.tars import Member, index_tar
from vitdemo.dataset.trees import VAL_NAME, WNID, known_classes
from vitdemo.errors import VitdemoError


def index_val_tar(path: Path) -> Index:
    """Index a tar of ``ILSVRC2012_val_00000001.JPEG`` …, whose labels are in the devkit next to it.

    Raises:
        VitdemoError: for a missing devkit, and for a tar whose images do not match the devkit's labels.
    """
    members = sorted(index_tar(path))
    devkit = devkit_of(path)
    for number, member in enumerate(members, start=1):
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        if member.name != name:
            cure = "is one missing before it, is this the val tar, or are archives swapped?"
            raise VitdemoError(f"{path}: image number {number} is named {member.name!r}, not {name}; {cure}")
    images = {name: (size, offset) for name, offset, size in members}
    return Index(path, path, *_labelled(path, images, devkit, "they do not belong together, get both again"))


def index_by_devkit(listing: Listing) -> Index | None:
    """Index validation images that lie flat in a folder; their labels are in the devkit there or in the parent folder.

    Returns None where there is no devkit. Raises VitdemoError for a devkit with another number of images.
    """
    places = [listing.path, listing.path.parent] if not listing.tar else []
    found = next((devkit for place in places if (devkit := find_devkit(place))), None)
    if found is None or not all(map(VAL_NAME.fullmatch, listing.images)):
        return None
    why = "it tells the labels by the images' order, so all must be there"
    notes = f"labels from {found.name}", *listing.notes()
    return Index(listing.path, None, *_labelled(listing.path, listing.images, found, why), notes)


def _labelled(path: Path, images: dict[str, tuple[int, int]], devkit: Path, why: str) -> tuple[dict, list[Item]]:
    """The classes of a devkit, and the images in ascending order, each with its class from the ground truth.

    Args:
        path: the path of the images, for errors.
        images: the size and offset of each image, by its name.
        devkit: the devkit's file or folder.
        why: the reason, for errors, why the number of images must be that of the ground truth.
    """
    said = read_devkit(devkit)
    if len(images) != len(said.ground_truth):
        lines = f"the ground truth in {devkit.name} has {len(said.ground_truth)} lines"
        raise VitdemoError(f"{path}: holds {len(images)} images, but {lines}; {why}")
    labelled = zip(images.items(), said.labels, strict=True)
    return said.class_names, [Item(name, said.synsets[label].wnid, *place) for (name, place), label in labelled]


def index_train_tar(path: Path, progress: bool) -> Index:
    """Index a tar of tars ``<wnid>.tar`` with files ``<wnid>_<number>.JPEG``, which are read in place.

    A devkit next to it lists the classes. Without a devkit, the classes are all 1,000 of ImageNet if they include all
    the tar's wnids, and otherwise the tar's wnids.

    Raises:
        VitdemoError: for another kind of tar, and for a class that the devkit lacks.
    """
    tars = {tar.name.removesuffix(".tar"): tar for tar in sorted(index_tar(path))}
    devkit_path = find_devkit(path)
    names = read_devkit(devkit_path).class_names if devkit_path else known_classes(list(tars))
    for wnid, tar in tars.items():
        if not WNID.fullmatch(wnid):
            cure = "is this the train tar, or are archives swapped?"
            raise VitdemoError(f"{path}: a member is named {tar.name!r}, not like n01440764.tar; {cure}")
        if wnid not in names:
            lacking = f"a class that {devkit_path.name} lacks; they do not belong together, get both again"
            raise VitdemoError(f"{path}: holds {tar.name}, {lacking}")
    bar = tqdm(tars.items(), desc=f"index {path.name}", unit="class", delay=2, disable=not progress)
    return Index(path, path, names, sorted(item for wnid, tar in bar for item in _index_class(path, wnid, tar)))


def _index_class(path: Path, wnid: str, tar: Member) -> list[Item]:
    items = [Item(name, wnid, size, offset) for name, offset, size in sorted(index_tar(path, tar))]
    for item in items:
        if not re.fullmatch(rf"{wnid}_\d+\.JPEG", item.file, re.ASCII):
            what = f"{tar.name}: a member is named {item.file!r}, not like {wnid}_1234.JPEG"
            raise VitdemoError(f"{path}: {what}; get the archive again")
    return items
