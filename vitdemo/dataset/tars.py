"""Reads tar archives without trusting them: where each image lies, and checksums."""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm.auto import tqdm

from vitdemo.errors import VitdemoError, named_errors, reason_of

PADDING_LIMIT = 1 << 20  # bytes of zeros at the end of a tar; tar's default is 10 KiB at the most
MEMBER_LIMIT = 1 << 21  # files in a tar; ImageNet's largest holds 1.28 million, an attack may hold billions
IMAGE_LIMIT = 1 << 28  # bytes of an image, which is read whole; far above any of ImageNet's

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

OFFICIAL_VAL, OFFICIAL_TRAIN = "ILSVRC2012_img_val.tar", "ILSVRC2012_img_train.tar"
ARCHIVE_MD5 = {
    # ImageNet's own [pytorch/vision torchvision/datasets/imagenet.py]
    OFFICIAL_VAL: "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
    OFFICIAL_TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
    # the bundled ones, printed by `python -m data.shapes20.make.draw`
    "shapes20_img_val.tar": "507739f1fc65b1a6fbeed3b998700df7",
    "shapes20_devkit.tar.gz": "138ba62ea185073dde2c13e19dacd442",
    "shapes20_calib.tar": "8bd55139a36e3827a412955a3e3ac07c",
}


class Member(NamedTuple):
    """A regular file in a tar: its base name, and where its data lies, in bytes."""

    name: str
    offset: int
    size: int


def walk_tar(file: BinaryIO, start: int, size: int, where: Path | str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar as ``tarfile`` reads them, and check that its end is an end.

    ``tarfile`` takes a damaged header for the end of the archive and says nothing.

    Args:
        file: what holds the tar, open for reading.
        start, size: where the tar lies in the file, in bytes.
        where: the tar's name, for messages.

    Raises:
        VitdemoError: for a tar that is damaged or does not reach its end.
    """
    end, last = start + size, "nothing"
    if size < tarfile.BLOCKSIZE:
        raise VitdemoError(f"{where}: truncated after {last}: its end is missing; get the archive again")
    file.seek(start)
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")
    except tarfile.ReadError:
        raise VitdemoError(f"{where}: not a tar archive; get the archive again, or check the name") from None
    while member := _next_member(tar, where, last):
        if member.size < 0:
            raise VitdemoError(f"{where}: damaged after {last}: a size below zero; get the archive again")
        last = repr(member.name)
        data_end = member.offset_data + member.size
        padded = member.offset_data - (-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if member.issparse() or (member.isreg() and tar.offset != padded):  # an extended header may give another size
            raise VitdemoError(f"{where}: member {last} is not a plain file; refused")
        if tar.offset > end - tarfile.BLOCKSIZE:
            what = f"within {last}: {data_end - end} bytes are" if data_end > end else f"after {last}: its end is"
            raise VitdemoError(f"{where}: truncated {what} missing; get the archive again")
        yield member
        tar.members.clear()  # a kilobyte for each that was read
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        what = "not a tar archive" if tar.offset == start else f"damaged after {last}, at byte {tar.offset - start}"
        raise VitdemoError(f"{where}: {what}; get the archive again, or check the name")
    if end - tar.offset > PADDING_LIMIT:
        raise VitdemoError(
            f"{where}: truncated after {last}: {end - tar.offset} bytes follow its last member, as of a download that "
            "has its place on the disk but not its end; get the archive again"
        )
    if file.read(end - file.tell()).strip(b"\0"):  # a header wiped by damage looks like the end, but data follow it
        raise VitdemoError(f"{where}: damaged after {last}: data follow the end of the archive; get the archive again")


def _next_member(tar: tarfile.TarFile, where: Path | str, last: str) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except OSError:
        raise
    except Exception as error:  # of a damaged extended header, a dozen types
        raise VitdemoError(f"{where}: damaged after {last} ({reason_of(error)}); get the archive again") from None


def index_tar(path: Path | str, within: Member | None = None) -> list[Member]:
    """The regular files of a plain tar, in the tar's order; folders in it are passed over.

    Args:
        path: the tar.
        within: a member that is a tar itself, whose files are listed instead, with their offsets in the file
            ``path``: a tar in a tar is read where it lies.

    Raises:
        VitdemoError: naming the file and the member, for a file that cannot be read, is compressed or is no tar, that
            is damaged or truncated, and for what a data set never needs and an attack may use: links, devices and
            sparse files, absolute and ``..`` paths, two members of one base name, and more than MEMBER_LIMIT files.
    """
    path = Path(path)
    where = f"{path}: {within.name!r}" if within else str(path)
    members: dict[str, Member] = {}
    with named_errors(path), open(path, "rb") as file:
        start, size = (within.offset, within.size) if within else (0, os.fstat(file.fileno()).st_size)
        file.seek(start)
        _refuse_compressed(where, file.read(min(8, size)))
        for member in walk_tar(file, start, size, where):
            if member.name.startswith("/") or ".." in member.name.split("/"):
                raise VitdemoError(f"{where}: member {member.name!r} would lie outside its folder; refused")
            if member.isdir() or member.name.endswith("/"):  # a folder in the oldest format
                continue
            name = member.name.rpartition("/")[2]
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or name in ("", "."):
                raise VitdemoError(f"{where}: member {member.name!r} is not a plain file; refused")
            if name in members:
                raise VitdemoError(f"{where}: two members are named {name!r}; get the archive again")
            if len(members) == MEMBER_LIMIT:
                raise VitdemoError(f"{where}: more than {MEMBER_LIMIT:,} files, from {name!r} on; refused")
            members[name] = Member(name, member.offset_data, member.size)
    return list(members.values())


def _refuse_compressed(where: str, first: bytes) -> None:
    for magic, kind in COMPRESSIONS.items():
        if first.startswith(magic):
            raise VitdemoError(f"{where}: compressed ({kind}), not a plain tar; decompress it, or check the name")


def md5(path: Path | str, progress: bool = True) -> str:
    """The MD5 of a file as 32 hex digits, with a progress bar in bytes. Raises VitdemoError when it cannot be read."""
    path = Path(path)
    digest = hashlib.md5(usedforsecurity=False)
    buffer = memoryview(bytearray(1 << 20))
    with named_errors(path), open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"MD5 {path.name}", disable=not progress) as bar:
            while length := file.readinto(buffer):
                digest.update(buffer[:length])
                bar.update(length)
    return digest.hexdigest()
