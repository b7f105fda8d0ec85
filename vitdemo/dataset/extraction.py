"""The verb ``extract``: extracts verified archives to ``val/<wnid>/`` or ``train/<wnid>/``, whole or not at all."""

import json
import os
import shutil
import stat
from fnmatch import fnmatch
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from vitdemo.dataset.dataset import Dataset, open_data
from vitdemo.dataset.devkit import DEVKITS, devkit_of, find_devkit, read_devkit
from vitdemo.dataset.tars import ARCHIVE_MD5, Member, md5
from vitdemo.dataset.trees import CLASSES, CLASSES_COLUMNS, RECORDS, read_classes, read_record, split_tar
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.paths import PART, remove_leftovers, replacing, user_path

LOCK = ".lock"  # appended to the name of a split
BUFFER = 1 << 18  # bytes read at once, which hold many small members


def extract(
    archives: Path | str, out: Path | str, *, split: str = "val", unverified: bool = False, progress: bool = True
) -> Dataset:
    """Extract the tar of a split to ``out/<split>/<wnid>/<file>``; both splits may go to the same ``out``.

    The files are written to ``<split>.part/``, which is renamed to ``<split>/`` when all are there. A second call
    finishes an interrupted extraction, and repairs or confirms a finished one. The archives are only read.

    Args:
        archives: the folder of the tar, or the tar itself. The devkit lies next to it; a train tar may have none.
        out: a new folder, or the folder of an earlier extraction. It also receives ``classes.csv`` (label, wnid,
            ilsvrc_id, name) and ``extraction.json`` or ``extraction_train.json`` (a record, with the fingerprint).
        split: "val" or "train".
        unverified: accept archives whose MD5 is unknown or does not match. MD5s are checked before anything is read.
        progress: show progress bars, and print a line at the end.

    Returns:
        The extracted data set.

    Raises:
        VitdemoError: for archives that are missing, damaged or unverified, for an ``out`` that holds anything else, and
            for a disk that is too small.
    """
    if split not in RECORDS:
        raise VitdemoError(f"split: {split!r} is not one of {', '.join(RECORDS)}")
    tar = split_tar(user_path(archives).absolute(), split)
    devkit = devkit_of(tar) if split == "val" else find_devkit(tar)
    if devkit:
        _verify(devkit, unverified, progress)
    digest = _verify(tar, unverified, progress)
    source = open_data(tar, split=split, progress=progress)  # indexes the verified archives
    record = {"images": len(source), "classes": len(source.classes), "archive": tar.name, "md5": digest}
    out = user_path(out).absolute()
    with named_errors(out):
        _claim(out, split, source, record | {"fingerprint": source.fingerprint})
        _write_classes(out, source, devkit)
    samples = zip(source.files, source.offsets, source.sizes, source.labels, strict=True)
    targets = {f"{source.classes[label]}/{file}": Member(file, offset, size) for file, offset, size, label in samples}
    written = extract_members(tar, targets, out / split, progress=progress)
    extracted = open_data(out, split=split)  # compares number, names, sizes and labels with the record
    if progress:
        verified = f"archives {'' if ARCHIVE_MD5.get(tar.name) == digest else 'not '}verified by MD5, files by size"
        counts = f"{len(source):,} images of {len(source.classes):,} classes"
        print(f"{out}: complete: {counts}, {written:,} written now, {verified}")
    return extracted


def check_folder(out: Path | str, split: str) -> Path:
    """The folder for the report of ``check_images`` on an extracted split."""
    return user_path(out) / f"check_{split}"


def _verify(path: Path, unverified: bool, progress: bool) -> str:
    """The file's MD5. Raises VitdemoError where it is unknown or does not match, unless ``unverified``."""
    known, cure = ARCHIVE_MD5.get(path.name), "--unverified takes it as is"
    if not (known or unverified):
        raise VitdemoError(f"{path}: no MD5 is known for this name, so it cannot be verified; {cure}")
    digest = md5(path, progress)
    if digest != known and not unverified:
        wrong = f"MD5 {digest} is not the published {known}: damaged or altered"
        raise VitdemoError(f"{path}: {wrong}; get it again ({cure})")
    return digest


def _claim(out: Path, split: str, source: Dataset, record: dict) -> None:
    """Prepare ``out`` for this extraction. Raises VitdemoError when it holds anything but this or the other split."""
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out, CLASSES, *RECORDS.values())
    names = {entry.name for entry in entries(out) if not fnmatch(entry.name, DEVKITS)}  # a diagnosis may need a devkit
    folders = {name for each in RECORDS for name in (each, each + PART, each + LOCK, check_folder(out, each).name)}
    if foreign := names - {CLASSES, *folders, *RECORDS.values()}:
        raise VitdemoError(f"{out / min(foreign)}: not of this extraction; give an empty or new folder")
    records = {each: read_record(out, each) for each in RECORDS}
    unrecorded = any(records[each] is None and names & {each, each + PART} for each in RECORDS)
    before = records[split] or record  # compared by content, as the tar may have been renamed
    same = all(before.get(name) == record[name] for name in ("md5", "fingerprint"))
    if unrecorded or (names and not any(records.values())) or not same:
        raise VitdemoError(f"{out}: holds something other than an extraction of these archives; give a new folder")
    others = [other for other in RECORDS if other != split and records[other]]
    if others and CLASSES in names and [synset.wnid for synset in read_classes(out / CLASSES)] != source.classes:
        cure = "give a new folder, or put the same devkit next to both tars"
        raise VitdemoError(f"{out / CLASSES}: {others[0]}/ has other classes than {source.path.name}; {cure}")
    if not records[split]:
        with replacing(out / RECORDS[split]) as file:
            json.dump(record, file, indent=2)


def _write_classes(out: Path, source: Dataset, devkit: Path | None) -> None:
    if (out / CLASSES).exists() and not devkit:  # the other split wrote it, perhaps with IDs from a devkit
        return
    ids = {synset.wnid: synset.id for synset in read_devkit(devkit).synsets} if devkit else {}
    columns = range(len(source.classes)), source.classes, [ids.get(wnid) for wnid in source.classes], source.class_names
    table = pd.DataFrame(dict(zip(CLASSES_COLUMNS, columns, strict=True)), dtype=object)
    path, content = out / CLASSES, table.to_csv(index=False, lineterminator="\r\n").encode()
    if not path.exists() or path.read_bytes() != content:  # a finished extraction may lie on a read-only disk
        with replacing(path, "wb") as file:
            file.write(content)


# ---- from members of a tar to a folder, whole or not at all; an interrupted extraction can be finished


def extract_members(tar: Path | str, targets: dict[str, Member], folder: Path | str, *, progress: bool = True) -> int:
    """Write members of a tar to a folder, which exists whole or not at all.

    The files are written to ``<folder>.part``, which is renamed once all have their right sizes. The next call finishes
    an interrupted one, or a ``folder`` that has lost files: it keeps the files of the right size and writes the others.
    Meanwhile ``<folder>.lock`` keeps other extractions out.

    Args:
        tar: the tar, which is only read.
        targets: ``"<subfolder>/<file>"`` in the folder -> the member to write there.
        folder: the folder to write or to finish.
        progress: show a progress bar.

    Returns:
        The number of files written.

    Raises:
        VitdemoError: when the folder holds anything but the targets, when the disk has too little room, and while
            another process extracts to the folder. Nothing is changed then.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + PART)
    with named_errors(folder):
        if folder.exists() and not partial.exists() and not _missing(folder, targets):
            return 0  # without a lock, because a finished extraction may lie on a read-only disk
        try:
            with FileLock(f"{folder}{LOCK}", blocking=False) as lock:
                try:
                    return _finish(tar, targets, folder, partial, progress)
                finally:
                    Path(lock.lock_file).unlink(missing_ok=True)
        except Timeout:
            raise VitdemoError(f"{folder}: another extraction to it runs; wait for its end, or give another") from None


def _finish(tar: Path | str, targets: dict[str, Member], folder: Path, partial: Path, progress: bool) -> int:
    if folder.exists() and partial.exists():
        raise VitdemoError(f"{partial}: lies next to {folder.name}/, which is finished; move one of them away")
    begun = next((path for path in (folder, partial) if path.exists()), None)
    missing = _missing(begun, targets) if begun else targets
    if begun == folder and not missing:  # another process has just finished it
        return 0
    needed = sum(-(-member.size // 4096) * 4096 for member in missing.values())  # disks allocate whole blocks
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        sizes = f"needs {needed / 1e9:.3f} GB, has {free / 1e9:.3f} GB free"
        raise VitdemoError(f"{folder.parent}: {sizes}; make room, run again")
    if begun == folder:
        folder.rename(partial)
    partial.mkdir(exist_ok=True)
    _write(tar, missing, partial, progress)
    partial.rename(folder)
    return len(missing)


def entries(folder: Path) -> list[os.DirEntry]:
    """The entries of a folder, without the files that macOS adds: ``.DS_Store``, and ``._*`` on foreign disks."""
    return [entry for entry in os.scandir(folder) if entry.name != ".DS_Store" and not entry.name.startswith("._")]


def _missing(folder: Path, targets: dict[str, Member]) -> dict[str, Member]:
    """The targets that are missing or have the wrong size. Raises VitdemoError for any other file in the folder."""
    missing, subfolders = dict(targets), {target.partition("/")[0] for target in targets}
    cure = "not of this archive; move it away, or extract to another folder"
    for subfolder in entries(folder):
        if subfolder.name not in subfolders or not subfolder.is_dir(follow_symlinks=False):
            raise VitdemoError(f"{subfolder.path}: {cure}")
        for entry in entries(Path(subfolder.path)):
            member = targets.get(target := f"{subfolder.name}/{entry.name}")
            status = entry.stat(follow_symlinks=False)
            if member is None or not stat.S_ISREG(status.st_mode):
                raise VitdemoError(f"{entry.path}: {cure}")
            if status.st_size == member.size:
                del missing[target]
    return missing


def _write(tar: Path | str, members: dict[str, Member], folder: Path, progress: bool) -> None:
    """Write members to ``folder/<target>``, in their order in the tar."""
    for subfolder in {target.partition("/")[0] for target in members}:
        (folder / subfolder).mkdir(exist_ok=True)
    in_order = sorted(members.items(), key=lambda item: item[1].offset)
    with open(tar, "rb", buffering=BUFFER) as source:
        for target, member in tqdm(in_order, desc=f"extract {Path(tar).name}", unit="file", disable=not progress):
            source.seek(member.offset)
            content = source.read(member.size)
            if len(content) < member.size:
                raise VitdemoError(f"{tar}: became shorter while {member.name} was read; run the same command again")
            with open(f"{folder}/{target}", "wb") as file:
                file.write(content)
