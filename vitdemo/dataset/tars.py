"""Reads tar archives without trusting them: the position of each image, and checksums."""

import gzip
import hashlib
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm.auto import tqdm

from vitdemo.errors import VitdemoError, named_errors, reason_of
from vitdemo.paths import cache_root, is_system, replacing

PADDING_LIMIT = 1 << 20  # bytes of zeros at the end of a tar; tar writes at most 10 KiB by default
IMAGE_LIMIT = 1 << 28  # bytes of an image file, which is read whole; far above the largest of ImageNet

TARS = "tars"  # the folder in the cache
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

ARCHIVE_MD5 = {
    # ImageNet's archives [pytorch/vision torchvision/datasets/imagenet.py]
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    # the bundled archives, as printed by `python -m data.shapes20.make.draw`
    "shapes20_img_val.tar": "507739f1fc65b1a6fbeed3b998700df7",
    "shapes20_devkit.tar.gz": "138ba62ea185073dde2c13e19dacd442",
    "shapes20_calib.tar": "8bd55139a36e3827a412955a3e3ac07c",
}


class Member(NamedTuple):
    """A regular file in a tar: its base name, and the offset and size of its data in bytes."""

    name: str
    offset: int
    size: int


def walk_tar(file: BinaryIO, start: int, size: int, where: Path | str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar as ``tarfile`` reads them, and check that the tar ends where it should.

    The check is needed because ``tarfile`` silently takes a damaged header for the end of the archive.

    Args:
        file: the file that holds the tar, open for reading.
        start: the offset in bytes at which the tar begins in the file.
        size: the tar's length in bytes.
        where: the tar's name, for messages.

    Raises:
        VitdemoError: for a tar that is damaged or truncated, and for sparse files.
    """
    end, last = start + size, ""
    file.seek(start)
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")
        while member := tar.next():
            last, lacking = f"after {member.name!r}", member.offset_data + member.size - end
            padded = member.offset_data - (-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            # an extended header may give another size; a negative one would lead back to members already read
            if member.size < 0 or member.issparse() or (member.isreg() and tar.offset != padded):
                raise VitdemoError(f"{where}: member {member.name!r} is not a plain file; refused")
            if tar.offset > end - tarfile.BLOCKSIZE:
                what = f"within {member.name!r}: {lacking} bytes are" if lacking > 0 else f"{last}: its end is"
                raise VitdemoError(f"{where}: truncated {what} missing; get the archive again")
            yield member
            tar.members.clear()  # tarfile keeps a kilobyte per member
        file.seek(tar.offset)
        rest = file.read(min(end - tar.offset, PADDING_LIMIT + 1))
        if rest.strip(b"\0"):  # a header wiped by damage looks like the end, but data follow it
            raise tarfile.ReadError("what follows is neither a member nor the archive's end")
    except (OSError, VitdemoError):
        raise
    except Exception as error:  # tarfile's own types, and a dozen others for a damaged extended header
        what = f"damaged {last}" if last else "not a tar archive"
        raise VitdemoError(f"{where}: {what} ({reason_of(error)}); get it again, or check the name") from None
    if len(rest) > PADDING_LIMIT:
        why = "as in an incomplete download; get the archive again"
        raise VitdemoError(f"{where}: truncated {last or 'at its start'}: {end - tar.offset} bytes follow, {why}")


def plain_tar(path: Path, progress: bool = True) -> Path:
    """A tar that can be read at any offset: ``path`` itself, or a ``.tar.gz`` decompressed into the cache once.

    Args:
        path: the tar.
        progress: show a bar while it is decompressed.

    Raises:
        VitdemoError: for a damaged archive, and where the cache cannot be written.
    """
    with named_errors(path), open(path, "rb") as file:
        if not file.read(2) == b"\x1f\x8b":
            return path
        status = os.fstat(file.fileno())
    name = f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"
    plain = cache_root() / TARS / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.tar"
    if not plain.exists():
        with named_errors(plain, "; VITDEMO_CACHE names another folder for decompressed archives"):
            plain.parent.mkdir(parents=True, exist_ok=True)
            with replacing(plain, "wb") as to, open(path, "rb") as file:
                bar = dict(total=status.st_size, desc=f"unpack {path.name} into the cache", disable=not progress)
                with tqdm.wrapattr(file, "read", **bar) as packed, gzip.open(packed) as content:
                    try:
                        shutil.copyfileobj(content, to, 1 << 20)
                    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                        raise VitdemoError(f"{path}: no whole gzip file ({error}); get the archive again") from None
    return plain


def index_tar(path: Path | str, within: Member | None = None, *, paths: bool = False) -> list[Member]:
    """The regular files of an uncompressed tar, in the tar's order, without folders and files that systems add.

    Args:
        path: the tar.
        within: a member that is itself a tar. Its files are listed instead, with their offsets in the file ``path``,
            so that a tar in a tar is read in place.
        paths: name the files by their paths in the tar; otherwise by their base names.

    Raises:
        VitdemoError: naming the file and the member, for a file that cannot be read, is compressed or is not a tar,
            for a tar that is damaged, truncated or empty, and for members that a data set never needs but an attack
            may use: links, devices, sparse files, absolute and ``..`` paths, and two members with the same name.
    """
    path = Path(path)
    where = f"{path}: {within.name!r}" if within else str(path)
    members: dict[str, Member] = {}
    with named_errors(path), open(path, "rb") as file:
        start, size = (within.offset, within.size) if within else (0, os.fstat(file.fileno()).st_size)
        file.seek(start)
        first = file.read(min(8, size))
        for magic, kind in COMPRESSIONS.items():
            if first.startswith(magic):
                raise VitdemoError(f"{where}: compressed ({kind}), not a plain tar; decompress it, or check the name")
        for member in walk_tar(file, start, size, where):
            if member.name.startswith("/") or ".." in member.name.split("/"):
                raise VitdemoError(f"{where}: member {member.name!r} would lie outside its folder; refused")
            if member.isdir() or member.name.endswith("/"):  # the oldest format marks a folder by this "/" alone
                continue
            steps = [step for step in member.name.split("/") if step not in ("", ".")]
            if any(map(is_system, steps)):
                continue
            name = "/".join(steps) if paths else member.name.rpartition("/")[2]
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or name in ("", "."):
                raise VitdemoError(f"{where}: member {member.name!r} is not a plain file; refused")
            if name in members:
                raise VitdemoError(f"{where}: two members are named {name!r}; get the archive again")
            members[name] = Member(name, member.offset_data, member.size)
    if not members:
        raise VitdemoError(f"{where}: holds no files; get the archive again")
    return list(members.values())


def md5(path: Path | str, progress: bool = True) -> str:
    """The MD5 of a file, which is read once.

    Args:
        path: the file.
        progress: show a progress bar in bytes.

    Returns:
        32 hex digits.

    Raises:
        VitdemoError: when the file cannot be read.
    """
    path = Path(path)
    digest = hashlib.md5(usedforsecurity=False)
    with named_errors(path), open(path, "rb", buffering=0) as file:
        bar = dict(total=os.fstat(file.fileno()).st_size, desc=f"MD5 {path.name}", disable=not progress)
        with tqdm.wrapattr(file, "read", **bar) as reader:
            while piece := reader.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
