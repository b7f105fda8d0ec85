"""The verb ``extract``: from verified archives to ``val/<wnid>/`` or ``train/<wnid>/``, whole or not at all."""

import csv
import io
import json
import os
import shutil
import stat
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from vitdemo.dataset.devkit import DEVKITS, devkit_of, find_devkit, read_devkit
from vitdemo.dataset.imagenet import ImageNetSplit, ImageNetTrain, ImageNetVal, split_tar
from vitdemo.dataset.tars import ARCHIVE_MD5, OFFICIAL_TRAIN, OFFICIAL_VAL, Member, md5
from vitdemo.dataset.trees import CLASSES, CLASSES_COLUMNS, RECORDS, read_classes, read_record
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.paths import PART, remove_leftovers, replacing, user_path

LOCK = ".lock"  # after the name of a split
BUFFER, PIECE = 1 << 18, 1 << 24  # bytes read at once: of many small members, and at the most of a large one
SPLITS = {"val": ImageNetVal, "train": ImageNetTrain}
TORCHVISIONS_DEVKIT = "meta.bin"
# the tar, its images, and the least and most of them per class [Russakovsky et al. 2015, table 2]
OFFICIAL = {"val": (OFFICIAL_VAL, 50_000, 50, 50), "train": (OFFICIAL_TRAIN, 1_281_167, 732, 1300)}


def extract(
    archives: Path | str, out: Path | str, *, split: str = "val", unverified: bool = False, progress: bool = True
) -> ImageNetSplit:
    """Extract the tar of a split in the folder ``archives`` (or given itself) to ``out/<split>/<wnid>/``.

    ``split`` is "val", with the devkit beside the tar, or "train", with or without; both may go to one ``out``.
    MD5s are checked before anything is written; ``unverified`` lets archives pass whose MD5 is unknown or another.
    ``out`` also gets ``classes.csv`` (label, wnid, ilsvrc_id, name) and ``extraction.json`` or
    ``extraction_train.json`` (what was extracted, fingerprint). The name ``<split>/`` appears last and says that all
    is there; until then the files are in ``<split>.part/``. Run again, it finishes what was interrupted, and repairs or
    confirms what was finished.
    The archives are only read.

    Raises VitdemoError in one line for archives that are missing, damaged or unverified, for an ``out`` that holds
    anything else, and for a disk too small.
    """
    if split not in SPLITS:
        raise VitdemoError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    tar = split_tar(user_path(archives).absolute(), split)
    devkit = devkit_of(tar) if split == "val" else find_devkit(tar)
    if devkit:
        _verify(devkit, unverified, progress)
    digest = _verify(tar, unverified, progress)
    source = SPLITS[split](tar, progress=progress)  # reads what is in them
    if digest == ARCHIVE_MD5[OFFICIAL[split][0]]:
        _check_official(source)
    record = {
        "images": len(source),
        "classes": len(source.classes),
        "archive": tar.name,
        "md5": digest,
        "fingerprint": source.fingerprint,
    }
    out = user_path(out).absolute()
    with named_errors(out):
        _claim(out, source, record)
        _write_classes(out, source, devkit)
    targets = {
        f"{source.classes[label]}/{file}": Member(file, offset, size)
        for file, offset, size, label in zip(source.files, source.offsets, source.sizes, source.labels, strict=True)
    }
    written = extract_members(tar, targets, out / split, progress=progress)
    extracted = SPLITS[split](out)  # which holds number, names, sizes and labels against the record
    if progress:
        verified = f"archives {'' if ARCHIVE_MD5.get(tar.name) == digest else 'not '}verified by MD5, files by size"
        counts = f"{len(source):,} images of {len(source.classes):,} classes"
        print(f"{out}: complete: {counts}, {written:,} written now, {verified}")
    return extracted


def check_folder(out: Path | str, split: str) -> Path:
    """Where the report of ``check_images`` on an extracted split belongs."""
    return user_path(out) / f"check_{split}"


def _verify(path: Path, unverified: bool, progress: bool) -> str:
    """The file's MD5, when it is the known one or need not be."""
    if path.name not in ARCHIVE_MD5 and not unverified:
        raise VitdemoError(
            f"{path}: no MD5 is known for this name, so it cannot be verified; --unverified takes it as is"
        )
    digest = md5(path, progress)
    if digest != ARCHIVE_MD5.get(path.name) and not unverified:
        raise VitdemoError(
            f"{path}: MD5 {digest} is not the published {ARCHIVE_MD5[path.name]}: damaged or altered; get it again "
            "(--unverified takes it as is)"
        )
    return digest


def _check_official(data: ImageNetSplit) -> None:
    """The published tar must have given the published counts, or it was indexed with a devkit of something else."""
    per_class, (_, images, least, most) = Counter(data.labels).values(), OFFICIAL[data.split]
    if (len(data), min(per_class), max(per_class)) != (images, least, most):
        raise VitdemoError(
            f"{data.path}: {len(data)} images, {min(per_class)} to {max(per_class)} a class; the real set has "
            f"{images}, {least} to {most} a class; get the tar and the devkit again"
        )


def _claim(out: Path, source: ImageNetSplit, record: dict) -> None:
    """Make ``out`` the place of this extraction; VitdemoError when it holds anything but this or another split."""
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out, CLASSES, *RECORDS.values())
    names = {entry.name for entry in entries(out) if not _belongs_beside(entry.name)}
    folders = {name for split in SPLITS for name in (split, split + PART, split + LOCK, check_folder(out, split).name)}
    foreign = names - {CLASSES, *folders, *RECORDS.values()}
    if foreign:
        raise VitdemoError(f"{out / min(foreign)}: not of this extraction; give an empty or new folder")
    records = {split: read_record(out, split) for split in SPLITS}
    unrecorded = any(records[split] is None and names & {split, split + PART} for split in SPLITS)
    if unrecorded or (names and not any(records.values())) or not _same(records[source.split], record):
        raise VitdemoError(f"{out}: holds something other than an extraction of these archives; give a new folder")
    others = [split for split in SPLITS if split != source.split and records[split]]
    if others and CLASSES in names and list(read_classes(out / CLASSES)) != source.classes:
        raise VitdemoError(
            f"{out / CLASSES}: {others[0]}/ has other classes than {source.path.name}; give a new folder, or put the "
            "same devkit beside both tars"
        )
    if not records[source.split]:
        with replacing(out / RECORDS[source.split]) as file:
            json.dump(record, file, indent=2)


def _same(before: dict | None, record: dict) -> bool:
    """Whether an extraction that was begun is of these archives, whatever the tar is called now."""
    return before is None or all(before.get(name) == record[name] for name in ("md5", "fingerprint"))


def _belongs_beside(name: str) -> bool:
    """Whether a file may lie beside the splits: a devkit, which a diagnosis asks for there, or torchvision's of it."""
    return fnmatch(name, DEVKITS) or name == TORCHVISIONS_DEVKIT


def _write_classes(out: Path, source: ImageNetSplit, devkit: Path | None) -> None:
    if (out / CLASSES).exists() and not devkit:  # the other split's, which may know the IDs
        return
    ids = {synset.wnid: synset.id for synset in read_devkit(devkit).synsets} if devkit else {}
    rows = [
        [label, wnid, ids.get(wnid, ""), name]
        for label, (wnid, name) in enumerate(zip(source.classes, source.class_names, strict=True))
    ]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([CLASSES_COLUMNS, *rows])
    path = out / CLASSES
    if (
        not path.exists() or path.read_bytes() != text.getvalue().encode()
    ):  # what is finished may lie on a read-only disk
        with replacing(path) as file:
            file.write(text.getvalue())


# ---- members of a tar to a folder: whole or not at all, and finished when it was interrupted


def extract_members(tar: Path | str, targets: dict[str, Member], folder: Path | str, *, progress: bool = True) -> int:
    """Write members of a tar to ``folder/<target>``, a target being ``"<subfolder>/<file>"``; return how many.

    All is written into ``<folder>.part``, which takes its name when every file is there in its right size:
    ``folder`` exists whole or not at all, for one rename in all. A run that was interrupted is finished by the
    next one, which keeps the files of the right size and writes the others again; so is a ``folder`` that has
    lost files since. The tar is only read. ``<folder>.lock`` keeps other extractions out meanwhile.

    Raises VitdemoError, and leaves everything as it is, when the folder holds anything but the targets, when the
    disk has too little room, and while another process extracts to the folder.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + PART)
    with named_errors(folder):
        if folder.exists() and not partial.exists() and not _missing(folder, targets):
            return 0  # without a lock, as what is finished may lie on a read-only disk
        if not folder.exists() and not partial.exists():
            _check_room(folder.parent, targets)
        try:
            with FileLock(f"{folder}{LOCK}", blocking=False) as lock:
                try:
                    return _finish(tar, targets, folder, partial, progress)
                finally:
                    Path(lock.lock_file).unlink(missing_ok=True)
        except Timeout:
            raise VitdemoError(
                f"{folder}: another extraction to it runs; wait for its end, or give another folder"
            ) from None


def _finish(tar: Path | str, targets: dict[str, Member], folder: Path, partial: Path, progress: bool) -> int:
    if folder.exists() and partial.exists():
        raise VitdemoError(f"{partial}: lies beside {folder.name}/, which is finished; move one of them away")
    if not folder.exists():
        partial.mkdir(exist_ok=True)
    missing = _missing(folder if folder.exists() else partial, targets)
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
    """Write members to ``folder/<target>``, in the order in which they lie in the tar."""
    for subfolder in _subfolders(members):
        (folder / subfolder).mkdir(exist_ok=True)
    in_order = sorted(members.items(), key=lambda item: item[1].offset)
    with open(tar, "rb", buffering=BUFFER) as source:
        for target, (name, offset, size) in tqdm(
            in_order, desc=f"extract {Path(tar).name}", unit="file", disable=not progress
        ):
            with open(f"{folder}/{target}", "wb") as file:
                source.seek(offset)
                while size:
                    data = source.read(min(size, PIECE))
                    if not data:
                        raise VitdemoError(f"{tar}: became shorter while {name} was read; run the same command again")
                    file.write(data)
                    size -= len(data)
