"""What an image of a data set is; the images in a folder or in a tar by their paths, and what else lies there."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vitdemo.dataset.tars import index_tar
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.paths import is_system


class Sample(NamedTuple):
    """One image.

    file: its path within the data set, unique there. image: the encoded bytes. class_id: what the data set calls its
    class, "" where nobody said. label: the class's index in the data set's ``classes``, -1 where nobody said.
    """

    file: str
    image: bytes
    class_id: str
    label: int


class UnreadableFile(VitdemoError):
    """One image's file that the disk does not give, where the others may be sound; ``sample`` is it without bytes."""

    def __init__(self, reason: str, sample: Sample | None = None):
        super().__init__(reason)
        self.sample = sample


class Item(NamedTuple):
    """Where an image lies: its name in the data set, its class, its size in bytes, its place in bytes or as a row."""

    file: str
    class_id: str
    size: int
    offset: int = 0


@dataclass
class Index:
    """A data set without its images' bytes.

    path: the tar, the folder, or what holds the parquet files. tar: the plain tar that is read, if any. classes: id ->
    name, in the order of the labels. items: the images, ascending. notes: what a user should hear of it.
    in_folders: whether a file without "/" lies in the folder of its class's id. parquet: gives the images of rows.
    """

    path: Path
    tar: Path | None
    classes: dict[str, str]
    items: Sequence[Item]
    notes: tuple[str, ...] = ()
    in_folders: bool = False
    parquet: Any = None


# PIL knows more, and starts Ghostscript for one of them. Which of these it reads depends on how it was built.
FORMATS = "JPEG MPO PNG GIF BMP DIB WEBP TIFF AVIF PPM JPEG2000 TGA ICO PCX SGI QOI".split()
# Suffixes of photographs that PIL does not read, or not everywhere: told, not passed over like other files.
UNREAD = ".avif .heic .heif .hif .jxl .jp2 .svg .psd .dng .cr2 .cr3 .nef .arw .raf .raw".split()


class Listing(NamedTuple):
    """What lies in ``path``, a folder or a tar, by path within it with "/": (size in bytes, offset in the tar).

    tar: what is read for it, unpacked where ``path`` is compressed; None for a folder. images: in ascending order.
    others: files that are no images. unread: images of a format that PIL does not read here. folders: the topmost
    folders, those without images too.
    """

    path: Path
    tar: Path | None
    images: dict[str, tuple[int, int]]
    others: dict[str, tuple[int, int]]
    unread: list[str]
    folders: set[str]

    def within(self, prefix: str) -> "Listing":
        """What lies in one of its folders, as a listing of its own; ``prefix`` ends with "/"."""

        def cut(names: Iterable[str]) -> dict[str, str]:
            return {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}

        images = {short: self.images[name] for name, short in cut(self.images).items()}
        others = {short: self.others[name] for name, short in cut(self.others).items()}
        folders = {short.partition("/")[0] for short in [*images, *others] if "/" in short}
        path = self.path if self.tar else self.path / prefix
        return Listing(path, self.tar, images, others, [*cut(self.unread).values()], folders)

    def content(self, name: str) -> bytes:
        """The bytes of one of ``others``."""
        size, offset = self.others[name]
        with named_errors(self.path), open(self.tar or self.path / name, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def notes(self) -> list[str]:
        """What of it is left out, for people."""
        told = []
        if self.others:
            told.append(f"{counted(len(self.others), 'file')} that {'is' if len(self.others) == 1 else 'are'} no image")
        if self.unread:
            kinds = ", ".join(sorted(Counter(map(suffix_of, self.unread))))
            told.append(f"{counted(len(self.unread), 'image')} in a format that cannot be read here ({kinds})")
        return [f"left out: {' and '.join(told)}"] if told else []


def counted(number: int, what: str) -> str:
    """ "1 file", "1,200 files", "2 classes"."""
    return f"{number:,} {what}{('es' if what.endswith('s') else 's') if number != 1 else ''}"


def suffix_of(name: str) -> str:
    """The suffix with its dot, in lower case."""
    return os.path.splitext(name)[1].lower()


@cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that PIL reads here."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of the formats that are read here."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats()) | {".jfif"}


def list_folder(path: Path) -> Listing:
    """The files below a folder; what systems leave is passed over, and so is a link back to a folder above.

    Raises:
        VitdemoError: for a folder that cannot be read, and for a name that no table can hold.
    """
    found: list[tuple[str, int, int]] = []
    folders, seen = set(), set()

    def visit(folder: str, prefix: str) -> None:
        status = os.stat(folder)
        if (place := (status.st_dev, status.st_ino)) in seen:
            return
        seen.add(place)
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_system(entry.name):
                    continue
                if entry.is_dir():
                    if not prefix:
                        folders.add(entry.name)
                    visit(entry.path, f"{prefix}{entry.name}/")
                elif entry.is_file():
                    found.append((prefix + entry.name, entry.stat().st_size, 0))

    with named_errors(path):
        visit(str(path), "")
    return _sorted(path, None, found, folders)


def list_tar(path: Path, tar: Path) -> Listing:
    """The files in a plain tar.

    Args:
        path: what the user gave, for messages.
        tar: what is read for it, see ``plain_tar``.
    """
    found = [(member.name, member.size, member.offset) for member in index_tar(tar, paths=True)]
    return _sorted(path, tar, found, {name.partition("/")[0] for name, *_ in found if "/" in name})


def _sorted(path: Path, tar: Path | None, found: list[tuple[str, int, int]], folders: set[str]) -> Listing:
    listing = Listing(path, tar, {}, {}, [], folders)
    for name, *place in sorted(found):
        suffix = suffix_of(name)
        if suffix not in image_suffixes() and suffix in UNREAD:
            listing.unread.append(name)
        elif suffix not in image_suffixes():
            listing.others[name] = tuple(place)
        elif not name.isprintable():  # as a surrogate is not either, where the name is not UTF-8
            raise VitdemoError(f"{path}: the file name {name!r} cannot be written to a table; rename it")
        else:
            listing.images[name] = tuple(place)
    return listing
