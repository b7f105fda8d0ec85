"""Labels by where an image lies or what it is called: one folder per class, or a wnid at the file name's end."""

import itertools
import re

from vitdemo.dataset.imagenet import VAL_NAME
from vitdemo.dataset.listing import Listing, counted
from vitdemo.dataset.samples import Index, Item
from vitdemo.dataset.trees import FOLDERS, WNID, known_classes, wnid_classes
from vitdemo.errors import VitdemoError

WNID_AT_END = re.compile(r"_(n\d{8})\.\w+", re.ASCII)  # as the hub's ImageNet has it
WRAPPERS = 2  # folders around the data set that an archive may have


def of_split(listing: Listing, split: str) -> tuple[Listing, str]:
    """The part of a listing that is the split, and its path within; all of it where no folder is named like one.

    Raises VitdemoError where there are folders of other splits alone.
    """
    prefix = ""
    for _ in range(WRAPPERS + 1):
        tops = listing.folders
        if found := next((folder for folder in FOLDERS[split] if folder in tops), None):
            return listing.within(f"{found}/"), f"{prefix}{found}/"
        others = sorted(folder for folders in FOLDERS.values() for folder in folders if folder in tops)
        if others and len(tops) <= len(others):
            raise VitdemoError(f"{listing.path}: holds {others[0]}/ and no {split}/; give that folder as the data set")
        around = {name.count("/") for name in listing.images}
        if len(tops) != 1 or not around or min(around) < 2:
            break
        (top,) = tops
        listing, prefix = listing.within(f"{top}/"), f"{prefix}{top}/"
    return listing, prefix


def index_by_folder(listing: Listing) -> Index | None:
    """One folder per class, of any name, at the top of a listing; None where no image lies in a folder.

    An image goes by its path, such as ``cat/0.jpg``; ILSVRC2012's own go by their base names, as in its archives. A
    folder without images is a class too, as checkpoints count it.

    Raises:
        VitdemoError: for two images of one name, which results could not tell apart.
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
            own = VAL_NAME.fullmatch(rest) or re.fullmatch(rf"{class_id}_\d+\.JPEG", rest, re.ASCII)
            items.append(Item(rest if own and WNID.fullmatch(class_id) else name, class_id, *place))
    items.sort()
    for first, second in itertools.pairwise(items):
        if first.file == second.file:
            raise VitdemoError(
                f"{listing.path}: {first.file} is in {first.class_id}/ and in {second.class_id}/; give each file its "
                "own name"
            )
    return Index(listing.path, listing.tar, classes, items, tuple(notes), in_folders=True)


def index_by_name(listing: Listing) -> Index | None:
    """Files like ``ILSVRC2012_val_00000293_n01751748.JPEG``, whose class is at the end; None where one is not."""
    ends = {name: WNID_AT_END.search(name) for name in listing.images}
    if not ends or not all(end and end.end() == len(name) for name, end in ends.items()):
        return None
    items = [Item(name, ends[name][1], *place) for name, place in listing.images.items()]
    notes = ("labels from the wnids at the ends of the file names", *listing.notes())
    return Index(listing.path, listing.tar, known_classes([item.class_id for item in items]), items, notes)
