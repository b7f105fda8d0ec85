"""``Sample``, one image of a data set; listings of the images and the other files in a folder or a tar."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import category

from PIL import Image

from vitdemo.dataset.tars import index_tar
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.paths import is_system


class Sample(NamedTuple):
    """One image.

    file: its path within the data set, unique there. image: the encoded bytes. class_id: the data set's own name for
    its class, "" where it is unknown. label: the class's index in the data set's ``classes``, -1 where it is unknown.
    """

    file: str
    image: bytes
    class_id: str
    label: int


class UnreadableFile(VitdemoError):
    """One image file that cannot be read from the disk, while the others may be sound.

    ``sample`` is its Sample, without bytes.
    """

    def __init__(self, reason: str, sample: Sample | None = None):
        super().__init__(reason)
        self.sample = sample


class Item(NamedTuple):
    """The position of an image: its name in the data set, its class, its size in bytes, its offset or its row."""

    file: str
    class_id: str
    size: int
    offset: int = 0


@dataclass
class Index:
    """A data set without its images' bytes.

    path: the tar, the folder, or the folder or file of parquet data. tar: the uncompressed tar that is read, if any.
    classes: id -> name, in the order of the labels. items: the images, in order. notes: remarks for the user.
    in_folders: whether a file without "/" lies in a folder named by its class's id. parquet: the ``Rows`` with the
    images, if any.
    """

    path: Path
    tar: Path | None
    classes: dict[str, str]
    items: Sequence[Item]
    notes: tuple[str, ...] = ()
    in_folders: bool = False
    parquet: Any = None


# PIL knows more formats, and starts Ghostscript for one of them. Which of these it can read depends on its build.
FORMATS = "JPEG MPO PNG GIF BMP DIB WEBP TIFF AVIF PPM JPEG2000 TGA ICO PCX SGI QOI".split()
# Suffixes of photographs that PIL cannot read, or not in every build: they are reported, unlike other files.
UNREAD = ".avif .heic .heif .hif .jxl .jp2 .svg .psd .dng .cr2 .cr3 .nef .arw .raf .raw".split()


UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, bytes that are not UTF-8, separators of lines


class Listing(NamedTuple):
    """The files in ``path``, a folder or a tar: path within it, with "/" -> (size in bytes, offset in the tar).

    tar: the tar that is read, decompressed where ``path`` is compressed; None for a folder. images: in ascending
    order. others: files that are not images. unread: images in a format that PIL cannot read here. folders: the
    topmost folders, also empty ones, except in a listing from ``within``. broken: links to files that do not exist.
    """

    path: Path
    tar: Path | None
    images: dict[str, tuple[int, int]]
    others: dict[str, tuple[int, int]]
    unread: list[str]
    folders: set[str]
    broken: list[str]

    def within(self, prefix: str) -> "Listing":
        """The listing of one of its folders; ``prefix`` ends with "/"."""
        cut = len(prefix)
        files = ({k[cut:]: v for k, v in of.items() if k.startswith(prefix)} for of in (self.images, self.others))
        names = ([k[cut:] for k in of if k.startswith(prefix)] for of in (self.unread, self.broken))
        (images, others), (unread, broken) = files, names
        folders = {name.partition("/")[0] for name in (*images, *others, *unread, *broken) if "/" in name}
        path = self.path if self.tar else self.path / prefix
        return Listing(path, self.tar, images, others, unread, folders, broken)

    def content(self, name: str) -> bytes:
        """The bytes of one of ``others``."""
        size, offset = self.others[name]
        with named_errors(self.path), open(self.tar or self.path / name, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def notes(self) -> list[str]:
        """The remarks for the user about files that are left out."""
        told = []
        if self.others:
            told.append(f"{counted(len(self.others), 'file')} that {'is' if len(self.others) == 1 else 'are'} no image")
        if self.unread:
            kinds = ", ".join(sorted(Counter(map(suffix_of, self.unread))))
            told.append(f"{counted(len(self.unread), 'image')} in a format that cannot be read here ({kinds})")
        if self.broken:
            told.append(f"{counted(len(self.broken), 'link')} to files that do not exist, such as {self.broken[0]}")
        return [f"left out: {' and '.join(told)}"] if told else []


def counted(number: int, what: str) -> str:
    """The number and the noun, in the plural where needed: "1 file", "1,200 files", "2 classes"."""
    return f"{number:,} {what}{('es' if what.endswith('s') else 's') if number != 1 else ''}"


def suffix_of(name: str) -> str:
    """The suffix with its dot, in lower case."""
    return os.path.splitext(name)[1].lower()


@cache
def formats() -> tuple[str, ...]:
    """The names in FORMATS that PIL can read here."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of the formats that can be read here."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats()) | {".jfif"}


def list_folder(path: Path, places: Sequence[Path] = ()) -> Listing:
    """List the files below a folder, without files that systems add, and without following links to parent folders.

    Args:
        path: the folder.
        places: list only these files and folders, which are in ``path``.

    Raises:
        VitdemoError: for a folder that cannot be read, and for a file name that cannot be written to a table.
    """
    found: set[tuple[str, int, int]] = set()
    folders, broken = set(), set()

    def add(place: "Path | os.DirEntry", name: str, above: tuple = ()) -> None:
        if place.is_dir():
            status = place.stat()
            if name and "/" not in name:
                folders.add(name)
            if (identity := (status.st_dev, status.st_ino)) not in above:
                with os.scandir(place) as entries:
                    for entry in entries:
                        if not is_system(entry.name):
                            add(entry, f"{name}/{entry.name}" if name else entry.name, (*above, identity))
        elif place.is_file():
            found.add((name, place.stat().st_size, 0))
        elif place.is_symlink():
            broken.add(name)

    with named_errors(path):
        for place in places or [path]:
            add(place, "" if place == path else os.path.relpath(place, path))
    return _sorted(path, None, found, folders, broken)


def list_tar(path: Path, tar: Path) -> Listing:
    """List the files in an uncompressed tar.

    Args:
        path: the user's path, for messages.
        tar: the tar that is read, see ``plain_tar``.
    """
    found = [(member.name, member.size, member.offset) for member in index_tar(tar, paths=True)]
    return _sorted(path, tar, found, {name.partition("/")[0] for name, *_ in found if "/" in name})


def _sorted(
    path: Path, tar: Path | None, found: Iterable[tuple[str, int, int]], folders: set[str], broken: Iterable[str] = ()
) -> Listing:
    listing = Listing(path, tar, {}, {}, [], folders, sorted(broken))
    for name, *place in sorted(found):
        suffix = suffix_of(name)
        if suffix not in image_suffixes() and suffix in UNREAD:
            listing.unread.append(name)
        elif suffix not in image_suffixes():
            listing.others[name] = tuple(place)
        elif not name.isprintable() and any(category(character) in UNWRITABLE for character in name):
            raise VitdemoError(f"{path}: the file name {name!r} cannot be written to a table; rename it")
        else:
            listing.images[name] = tuple(place)
    return listing
