"""Members of a tar written to a folder: safely, whole or not at all, and finished when it was interrupted.

What size can tell, and what not. A killed process, a full disk or Ctrl-C leaves each file whole or too short: its
bytes are handed to the system in order, and its size grows with them. So a file of the right size is kept, and any
other is written again. A power cut may take what the system had not yet put on the disk, and a file system that
records sizes before data (ext4 mounted with ``data=writeback``, FAT) can then show the right size over zeros; nothing
here waits for the disk, as ``tar`` does not. After one, delete the unfinished folder, or check the images.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from vitdemo.dataset.archives import Member
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.paths import PART

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

BUFFER, PIECE = 1 << 18, 1 << 24  # bytes read at once: of many small members, and at the most of a large one


def extract_members(tar: Path | str, targets: dict[str, Member], folder: Path | str, *, progress: bool = True) -> int:
    """Write members of a tar to ``folder/<target>``, a target being ``"<subfolder>/<file>"``; return how many.

    All is written into ``<folder>.part``, which takes its name when every file is there in its right size:
    ``folder`` exists whole or not at all, for one rename in all. A run that was interrupted is finished by the
    next one, which keeps the files of the right size and writes the others again; so is a ``folder`` that has
    lost files since. The tar is only read.

    Raises VitdemoError, and leaves everything as it is, when the folder holds anything but the targets, when the
    disk has too little room, and while another process extracts to the folder (where the file system locks folders:
    NFS does not).
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + PART)
    with named_errors(folder):
        place = folder if folder.exists() else partial
        if not place.exists():
            _check_room(folder.parent, targets)
            partial.mkdir(exist_ok=True)
        with _locked(place):
            if folder.exists() and partial.exists():
                raise VitdemoError(f"{partial}: lies beside {folder.name}/, which is finished; move one of them away")
            missing = _missing(place, targets)
            if folder.exists() and not missing:
                return 0
            _check_room(folder.parent, missing)
            if folder.exists():
                folder.rename(partial)
            _write(tar, missing, partial, progress)
            partial.rename(folder)
    return len(missing)


def entries(folder: Path) -> list[os.DirEntry]:
    """What a folder holds, but for what macOS adds: the Finder's file, and on foreign disks one beside each other's."""
    return [entry for entry in os.scandir(folder) if entry.name != ".DS_Store" and not entry.name.startswith("._")]


def _missing(folder: Path, targets: dict[str, Member]) -> dict[str, Member]:
    """The targets that are not in the folder in their right size. Raises VitdemoError for anything foreign in it."""
    missing = dict(targets)
    subfolders = _subfolders(targets)
    for subfolder in entries(folder):
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


def _write(tar: Path | str, members: dict[str, Member], folder: Path, progress: bool) -> None:
    """Write members to ``folder/<target>``, in the order in which they lie in the tar.

    Each goes under its own name at once, relative to the open folder, which spares the system to walk its path.
    """
    in_order = sorted(members.items(), key=lambda item: item[1].offset)
    bar = tqdm(in_order, desc=f"extract {Path(tar).name}", unit="file", disable=not progress)
    with open(tar, "rb", buffering=BUFFER) as source, _opened_folder(folder) as root:
        for subfolder in _subfolders(members) - set(os.listdir(root)):
            os.mkdir(subfolder, dir_fd=root)
        for target, (name, offset, size) in bar:
            file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666, dir_fd=root)
            try:
                while size:
                    source.seek(offset)
                    data = source.read(size if size < PIECE else PIECE)
                    if not data:
                        raise VitdemoError(f"{tar}: became shorter while {name} was read; run the same command again")
                    written = os.write(file, data)
                    offset, size = offset + written, size - written
            finally:
                os.close(file)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other extractions out of a folder. The lock goes with it to its new name, and with the process."""
    root = os.open(folder, os.O_RDONLY)
    try:
        if not _lock(root) or not folder.exists() or not os.path.samestat(os.fstat(root), os.stat(folder)):
            raise VitdemoError(f"{folder}: another extraction to it runs; wait for its end, or give another folder")
        yield
    finally:
        os.close(root)


def _lock(root: int) -> bool:
    """Whether nobody else holds the open folder; True also where there are no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(root, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network's file system may lock no folders
        pass
    return True


@contextmanager
def _opened_folder(folder: Path) -> Iterator[int]:
    root = os.open(folder, os.O_RDONLY)
    try:
        yield root
    except OSError as error:
        if isinstance(error.filename, str) and not os.path.isabs(error.filename):
            error.filename = f"{folder}/{error.filename}"
        raise
    finally:
        os.close(root)
