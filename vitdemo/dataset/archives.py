"""A tar as something hostile: an index of offsets, checksums, safe and resumable extraction.

The format is POSIX.1-1988 ustar with GNU's and pax's additions (``man 5 tar``): a 512-byte header a
member, then its data padded to 512 bytes, and a block of zeros at the end. The headers are read here, because
``tarfile`` takes a damaged one for the end of the archive and says nothing, and is several times slower.
"""

import hashlib
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from vitdemo.errors import VitdemoError, named_errors

PART = ".part"  # the suffix of a folder that is not whole yet

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


def walk_headers(pread: Callable[[int, int], bytes], size: int, path: Path) -> Iterator[tuple[Header, int]]:
    """Yield each header of a tar with the offset of its data, down to the block of zeros that ends it.

    ``pread(n, offset)`` gives n bytes, ``size`` is the tar's in bytes, ``path`` is for messages. Nothing is
    read but headers. Raises VitdemoError for a tar that is damaged or does not reach its end.
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
    if pread(1 << 20, offset).strip(b"\0"):  # a header wiped by damage looks like the end, but data follow it
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


def index_tar(path: Path | str) -> list[Member]:
    """The regular files of a plain tar, in the tar's order; folders in it are passed over.

    Raises VitdemoError, naming the file and the member, for a file that cannot be read, is compressed or is
    no tar, that is damaged or truncated, and for what a data set never needs and an attack may use: links,
    devices and sparse files, absolute and ``..`` paths, extended headers that rename or resize a member, and
    two members of one base name.
    """
    path = Path(path)
    with named_errors(path), open(path, "rb", buffering=0) as file:
        _refuse_compressed(path, os.pread(file.fileno(), 8, 0))

        def pread(length: int, offset: int) -> bytes:
            return os.pread(file.fileno(), length, offset)

        members: dict[str, Member] = {}
        for header, offset in walk_headers(pread, os.fstat(file.fileno()).st_size, path):
            if header.name.startswith("/") or ".." in header.name.split("/"):
                raise VitdemoError(f"{path}: member {header.name!r} would lie outside its folder; refused")
            if header.type == tarfile.DIRTYPE:
                continue
            if header.type in PAX_TYPES:
                # pax headers carry harmless details (a finer mtime); one that moves a member is not ours
                if header.size > 1 << 16 or any(key in pread(header.size, offset) for key in PAX_OVERRIDES):
                    raise VitdemoError(f"{path}: extended header {header.name!r} is long, renames or resizes; refused")
                continue
            name = header.name.rpartition("/")[2]
            if header.type not in REGULAR_TYPES or name in ("", "."):
                raise VitdemoError(f"{path}: member {header.name!r} is not a plain file; refused")
            if name in members:
                raise VitdemoError(f"{path}: two members are named {name!r}; get the archive again")
            members[name] = Member(name, offset, header.size)
    return list(members.values())


def _refuse_compressed(path: Path, start: bytes) -> None:
    for magic, kind in COMPRESSIONS.items():
        if start.startswith(magic):
            raise VitdemoError(f"{path}: compressed ({kind}), not a plain tar; decompress it, or check the name")


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


def extract_members(tar: Path | str, targets: dict[str, Member], folder: Path | str, *, progress: bool = True) -> int:
    """Write members of a tar to ``folder/<target>``, a target being ``"<subfolder>/<file>"``; return how many.

    All is written into ``<folder>.part``, which takes its name when every file is there in its right size:
    ``folder`` exists whole or not at all, for one rename in all. A run that was interrupted is finished by the
    next one, which keeps the files of the right size and writes the others again; so is a ``folder`` that has
    lost files since. The tar is only read.

    Raises VitdemoError, and leaves everything as it is, when the folder holds anything but the targets or when
    the disk has too little room.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + PART)
    with named_errors(folder):
        if folder.exists() and partial.exists():
            raise VitdemoError(f"{partial}: lies beside {folder.name}/, which is finished; move one of them away")
        missing = _missing(folder if folder.exists() else partial, targets)
        if folder.exists() and not missing:
            return 0
        _check_room(folder.parent, missing)
        if folder.exists():
            folder.rename(partial)
        for subfolder in _subfolders(targets):
            (partial / subfolder).mkdir(parents=True, exist_ok=True)
        with open(tar, "rb", buffering=0) as file:
            in_order = sorted(missing.items(), key=lambda item: item[1].offset)
            for target, member in tqdm(in_order, desc=f"extract {Path(tar).name}", unit="file", disable=not progress):
                _copy(file.fileno(), member, f"{partial}/{target}", tar)
        if lost := _missing(partial, targets):
            raise VitdemoError(f"{partial / min(lost)}: gone or changed while extracting; run the same command again")
        partial.rename(folder)
    return len(missing)


def entries(folder: Path) -> list[os.DirEntry]:
    """What a folder holds, but for the file that macOS's Finder puts into every folder it shows."""
    return [entry for entry in os.scandir(folder) if entry.name != ".DS_Store"]


def _missing(folder: Path, targets: dict[str, Member]) -> dict[str, Member]:
    """The targets that are not in the folder in their right size. Raises VitdemoError for anything foreign in it."""
    missing = dict(targets)
    subfolders = _subfolders(targets)
    for subfolder in entries(folder) if folder.exists() else ():
        if subfolder.name not in subfolders or not subfolder.is_dir(follow_symlinks=False):
            raise VitdemoError(f"{subfolder.path}: not of this archive; move it away, or extract to another folder")
        for entry in entries(Path(subfolder.path)):
            member = targets.get(target := f"{subfolder.name}/{entry.name}")
            status = entry.stat(follow_symlinks=False)
            if member is None or not stat.S_ISREG(status.st_mode):
                raise VitdemoError(f"{entry.path}: not of this archive; move it away, or extract to another folder")
            if status.st_size == member.size:
                del missing[target]
    return missing


def _subfolders(targets: dict[str, Member]) -> set[str]:
    return {target.partition("/")[0] for target in targets}


def _check_room(folder: Path, members: dict[str, Member]) -> None:
    needed = sum(-(-member.size // 4096) * 4096 for member in members.values())  # whole blocks, as disks give them
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise VitdemoError(f"{folder}: needs {needed / 1e9:.3f} GB, has {free / 1e9:.3f} GB free; make room, run again")


def _copy(source: int, member: Member, path: str, tar: Path | str) -> None:
    """Write one member to ``path``. Its size tells the next run whether it is whole, so no rename a file is needed."""
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
    try:
        done = 0
        while done < member.size:
            data = os.pread(source, min(member.size - done, 1 << 24), member.offset + done)
            if not data:
                raise VitdemoError(f"{tar}: became shorter while {member.name} was read; run the same command again")
            done += os.write(target, data)
    finally:
        os.close(target)
