"""What an image of a data set is, and what is known of a set before any image is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vitdemo.errors import VitdemoError


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
