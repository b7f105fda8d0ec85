"""A tar as something hostile: an index of offsets, and checksums.

The format is POSIX.1-1988 ustar with GNU's and pax's additions (``man 5 tar``): a 512-byte header a
member, then its data padded to 512 bytes, and a block of zeros at the end. The headers are read here, because
``tarfile`` takes a damaged one for the end of the archive and says nothing, and is several times slower.
"""

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from vitdemo.errors import VitdemoError, named_errors

PADDING_LIMIT = 1 << 20  # bytes of zeros at the end of a tar; tar's default is 10 KiB at the most
MEMBER_LIMIT = 1 << 21  # files in a tar; ImageNet's largest holds 1.28 million, an attack may hold billions
IMAGE_LIMIT = 1 << 28  # bytes of an image, which is read whole; far above any of ImageNet's

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
REGULAR_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE)
PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE)
PAX_OVERRIDES = (b" path=", b" size=", b" linkpath=", b" GNU.sparse.")
DATALESS_TYPES = (
    tarfile.DIRTYPE,
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
)


class Header(NamedTuple):
    """What a tar says of a member: name with folders, type (one of ``tarfile``'s), size of its data in bytes."""

    name: str
    type: bytes
    size: int


class Member(NamedTuple):
    """A regular file in a tar: its base name, and where its data lies, in bytes."""

    name: str
    offset: int
    size: int


def walk_headers(pread: Callable[[int, int], bytes], size: int, path: Path | str) -> Iterator[tuple[Header, int]]:
    """Yield each header of a tar with the offset of its data, down to the block of zeros that ends it.

    ``pread(n, offset)`` gives n bytes, fewer at the end; ``size`` is the tar's in bytes, ``path`` is for messages.
    Nothing is read but headers. Raises VitdemoError for a tar that is damaged or does not reach its end.
    """
    offset, last = 0, "nothing"
    while True:
        block = pread(tarfile.BLOCKSIZE, offset)
        if len(block) < tarfile.BLOCKSIZE:
            raise VitdemoError(f"{path}: truncated after {last}: its end is missing; get the archive again")
        if not any(block):
            break
        header = _parse_header(block)
        if header is None:
            what = "not a tar archive" if offset == 0 else f"damaged after {last}, at byte {offset}"
            raise VitdemoError(f"{path}: {what}; get the archive again, or check the name")
        data, last = offset + tarfile.BLOCKSIZE, repr(header.name)
        if data + header.size > size:
            raise VitdemoError(
                f"{path}: truncated within {last}: {data + header.size - size} bytes are missing; get it again"
            )
        yield header, data
        offset = data + -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if size - offset > PADDING_LIMIT:
        raise VitdemoError(
            f"{path}: truncated after {last}: {size - offset} bytes follow its last member, as of a download that "
            "has its place on the disk but not its end; get the archive again"
        )
    if pread(PADDING_LIMIT, offset).strip(b"\0"):  # a header wiped by damage looks like the end, but data follow it
        raise VitdemoError(f"{path}: damaged after {last}: data follow the end of the archive; get the archive again")


def _parse_header(block: bytes) -> Header | None:
    """The header in a block of 512 bytes; None when its checksum or its size is wrong."""
    try:  # the checksum counts its own field, bytes 148 to 156, as eight blanks
        valid = int(block[148:156].strip(b" \0"), 8) == sum(block) - sum(block[148:156]) + 8 * ord(" ")
        # octal, or binary after a byte 0x80: GNU's way to write 8 GiB and more
        size = int.from_bytes(block[125:136]) if block[124] == 0x80 else int(block[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    if not valid or size < 0:
        return None
    name, type = block[:100].split(b"\0")[0], block[156:157]
    if block[257:263] == b"ustar\0" and block[345]:  # POSIX splits long names, GNU keeps other things there
        name = block[345:500].split(b"\0")[0] + b"/" + name
    if type in REGULAR_TYPES and name.endswith(b"/"):  # a folder in the oldest format
        type = tarfile.DIRTYPE
    return Header(name.decode("utf-8", "surrogateescape"), type, 0 if type in DATALESS_TYPES else size)


def index_tar(path: Path | str, within: Member | None = None) -> list[Member]:
    """The regular files of a plain tar, in the tar's order; folders in it are passed over.

    ``within`` names a member that is a tar itself, whose files are listed instead, with their offsets in the file
    ``path``: a tar in a tar is read where it lies.

    Raises VitdemoError, naming the file and the member, for a file that cannot be read, is compressed or is
    no tar, that is damaged or truncated, and for what a data set never needs and an attack may use: links,
    devices and sparse files, absolute and ``..`` paths, extended headers that rename or resize a member,
    two members of one base name, and more than MEMBER_LIMIT files.
    """
    path = Path(path)
    where = f"{path}: {within.name!r}" if within else str(path)
    with named_errors(path), open(path, "rb", buffering=0) as file:
        start, size = (within.offset, within.size) if within else (0, os.fstat(file.fileno()).st_size)

        def pread(length: int, offset: int) -> bytes:
            return os.pread(file.fileno(), max(0, min(length, size - offset)), start + offset)

        _refuse_compressed(where, pread(8, 0))
        members: dict[str, Member] = {}
        for header, offset in walk_headers(pread, size, where):
            if header.name.startswith("/") or ".." in header.name.split("/"):
                raise VitdemoError(f"{where}: member {header.name!r} would lie outside its folder; refused")
            if header.type == tarfile.DIRTYPE:
                continue
            if header.type in PAX_TYPES:
                # pax headers carry harmless details (a finer mtime); one that moves a member is not ours
                if header.size > 1 << 16 or any(key in pread(header.size, offset) for key in PAX_OVERRIDES):
                    raise VitdemoError(f"{where}: extended header {header.name!r} is long, renames or resizes; refused")
                continue
            name = header.name.rpartition("/")[2]
            if header.type not in REGULAR_TYPES or name in ("", "."):
                raise VitdemoError(f"{where}: member {header.name!r} is not a plain file; refused")
            if name in members:
                raise VitdemoError(f"{where}: two members are named {name!r}; get the archive again")
            if len(members) == MEMBER_LIMIT:
                raise VitdemoError(f"{where}: more than {MEMBER_LIMIT:,} files, from {name!r} on; refused")
            members[name] = Member(name, start + offset, header.size)
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
