"""The verb ``extract``: from verified archives to ``val/<wnid>/``, whole or not at all."""

import csv
import json
from collections import Counter
from pathlib import Path

from vitdemo.dataset.archives import PART, Member, entries, extract_members, md5
from vitdemo.dataset.devkit import Devkit, read_devkit
from vitdemo.dataset.imagenet import (
    ARCHIVE_MD5,
    CLASSES_COLUMNS,
    OFFICIAL_VAL,
    ImageNetVal,
    devkit_of,
    read_record,
    val_tar,
)
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.paths import remove_leftovers, replacing

OFFICIAL_IMAGES, OFFICIAL_IMAGES_PER_CLASS = 50_000, 50


def extract(archives: Path | str, out: Path | str, *, unverified: bool = False, progress: bool = True) -> ImageNetVal:
    """Extract the val tar in the folder ``archives`` (or given itself) to ``out/val/<wnid>/``, verified and whole.

    MD5s are checked first; ``unverified`` lets archives pass whose MD5 is unknown or another. ``out`` also gets
    ``classes.csv`` (label, wnid, ilsvrc_id, name) and ``extraction.json`` (what was extracted, fingerprint). The name
    ``val/`` appears last and says that all is there; until then the files are in ``val.part/``. Run again, it finishes
    what was interrupted, and repairs or confirms what was finished. The archives are only read.

    Raises VitdemoError in one line for archives that are missing, damaged or unverified, for an ``out`` that holds
    anything else, and for a disk too small.
    """
    tar = val_tar(Path(archives).expanduser().absolute())
    source, devkit = ImageNetVal(tar), read_devkit(devkit_of(tar))
    _verify(devkit_of(tar), unverified, progress)
    digest = _verify(tar, unverified, progress)
    if digest == ARCHIVE_MD5[OFFICIAL_VAL]:
        _check_official(source)
    record = {
        "images": len(source),
        "classes": len(source.classes),
        "archive": tar.name,
        "md5": digest,
        "fingerprint": source.fingerprint,
    }
    out = Path(out).expanduser().absolute()
    with named_errors(out):
        _claim(out, record, devkit)
    targets = {
        f"{source.classes[label]}/{file}": Member(file, offset, size)
        for file, offset, size, label in zip(source.files, source._offsets, source.sizes, source.labels, strict=True)
    }
    written = extract_members(tar, targets, out / "val", progress=progress)
    extracted = ImageNetVal(out)  # which holds number, names, sizes and labels against the record
    if progress:
        verified = f"archives {'' if ARCHIVE_MD5.get(tar.name) == digest else 'not '}verified by MD5, files by size"
        counts = f"{len(source):,} images of {len(source.classes):,} classes"
        print(f"{out}: complete: {counts}, {written:,} written now, {verified}")
    return extracted


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


def _check_official(data: ImageNetVal) -> None:
    per_class = set(Counter(data.labels).values())
    if len(data) != OFFICIAL_IMAGES or per_class != {OFFICIAL_IMAGES_PER_CLASS}:
        raise VitdemoError(
            f"{data.path}: {len(data)} images, {min(per_class)} to {max(per_class)} a class; the real set has "
            f"{OFFICIAL_IMAGES}, {OFFICIAL_IMAGES_PER_CLASS} a class; get the tar and the devkit again"
        )


def _claim(out: Path, record: dict, devkit: Devkit) -> None:
    """Make ``out`` the place of this extraction; VitdemoError when it holds anything else."""
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out, "extraction.json", "classes.csv")
    names = {entry.name for entry in entries(out)}
    foreign = names - {"val", "val" + PART, "classes.csv", "extraction.json"}
    if foreign:
        raise VitdemoError(f"{out / min(foreign)}: not of this extraction; give an empty or new folder")
    if names and read_record(out) != record:
        raise VitdemoError(f"{out}: holds something other than an extraction of these archives; give a new folder")
    with replacing(out / "extraction.json") as file:
        json.dump(record, file, indent=2)
    with replacing(out / "classes.csv") as file:
        rows = [[label, synset.wnid, synset.id, synset.words] for label, synset in enumerate(devkit.synsets)]
        csv.writer(file).writerows([CLASSES_COLUMNS, *rows])
