"""The verb ``check_images``: decodes every file of a data set strictly, and reports damage and other facts.

libjpeg recovers from damage: it fills missing parts with grey, gives a warning, and continues. PIL drops these
warnings, and torchvision prints them to stderr without a file name, so most damage goes unnoticed in both: of 200
photographs with 4 KiB zeroed they refused 5. TurboJPEG passes each warning to its caller (``strict`` in simplejpeg)
and warned about 196, so the check decodes with TurboJPEG.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from vitdemo.dataset.dataset import Dataset
from vitdemo.dataset.decoding import PIL_ALONE, UNREADABLE, one_line, open_image, read_header, refusal
from vitdemo.errors import VitdemoError, at_least_1, named_errors
from vitdemo.machine import cores, installed_version, machine_record, now
from vitdemo.paths import remove_leftovers, replacing, user_path

IMAGES, SUMMARY = "images.csv", "images.json"
FACTS = ["width", "height", "mode", "exif", "error", "warning"]
COLUMNS = ["file", "label", "class_id", "bytes", *FACTS, "sha256"]

UNKNOWN_SUBSAMPLING = "Could not determine subsampling"  # part of TurboJPEG's message
CHUNK = 16  # images per task; decoding a single image takes hardly longer than passing it to a thread
SHOWN = 10  # damaged files named in a report's text


@dataclass
class ImageReport:
    """The report of ``check_images``.

    Attributes:
        rows: one row per image in the data set's order, with the columns of images.csv (see ``check_images``).
        summary: the content of images.json (see ``check_images``).
        class_names: each class's synonyms in one string, by label.
        out: the folder of both files, or None.
    """

    rows: pd.DataFrame
    summary: dict
    class_names: list[str]
    out: Path | None

    @property
    def damaged(self) -> pd.DataFrame:
        """The rows with an error or a warning; ``class`` is the first synonym of the class's name."""
        found = self.rows[(self.rows["error"] != "") | (self.rows["warning"] != "")]
        classes = [self.class_names[label].split(",")[0] if label >= 0 else "" for label in found["label"]]
        return found[["file", "class_id", "label", "error", "warning"]].assign(**{"class": classes})

    def __str__(self) -> str:
        s, counts = self.summary, {}
        for name in ("modes", "exif"):
            counts[name] = ", ".join(f"{count:,} {state}" for state, count in s[name].items()) or "none"
        lines = [
            f"{s['images']:,} images decoded: {s['errors']:,} unreadable, {s['warnings']:,} with a decoder's warning; "
            f"{counts['modes']}; EXIF: {counts['exif']}; {s['images_per_s']:,.0f} images/s, {s['threads']} threads",
            f"sha256 over the set: {s['sha256'] or 'none, as some files could not be read from the disk'}",
        ]
        damaged = self.damaged
        for row in damaged.head(SHOWN).to_dict("records"):
            lines.append(f"  {row['file']}  {row['class_id']} {row['class']}: {row['error'] or row['warning']}")
        if len(damaged) > SHOWN:
            lines.append(f"  … and {len(damaged) - SHOWN:,} more, in {IMAGES} and in the report's damaged")
        return "\n".join(lines)


def check_images(
    data: Dataset, out: Path | str | None = None, *, limit: int | None = None, progress: bool = True
) -> ImageReport:
    """Read, hash and strictly decode each image once.

    One thread per core decodes, without Python's lock. It computes all coefficients of an image, but its pixels only at
    1/8 of the size, because no step after the coefficients can fail. Each thread holds one image, which takes at most
    0.9 GB in addition to its file of at most 256 MiB.

    An interrupted check writes nothing, so a report always covers one complete pass over the files.

    No decoder can find pixels that damage has changed into other valid ones, as five of six flipped bits do in a
    photograph. Where only PIL can decode (CMYK with subsampled C, M and Y; other formats), damage that PIL ignores goes
    unnoticed too. The archive's MD5 and the ``sha256`` of the set find all of this. The latter is computed over the
    lines of ``sha256sum`` with base names, in ascending order of names, so that it is the same for a tar and for the
    files extracted from it. By hand:

        find val -iname '*.jp*g' -exec sha256sum {} + | sed 's|  .*/|  |' | LC_ALL=C sort -k2 | sha256sum

    Args:
        data: the images.
        out: a folder for the report, or None. An earlier report there is replaced.
            images.csv has one row per image, with file, label, class_id, bytes; width and height in pixels, mode and
            exif as in ``image_facts``; error (there is no image, because PIL, with which ``evaluate`` reads, cannot
            decode the file, or the file cannot be read, or the image is enormous and was not decoded); warning (there
            is an image, but it may be wrong, because libjpeg warned of damage, or a file named as a JPEG has another
            format); sha256.
            images.json is the summary: the numbers of modes, EXIF states, errors and warnings; damaged images per
            class; min, median and max of width, height and bytes; sha256 of the set; rate and machine.
        limit: check only this many images, from the first.
        progress: show a progress bar.

    Returns:
        The report, with one row per image.

    Raises:
        VitdemoError: for a bad ``limit`` and for a folder that cannot be written.
    """
    at_least_1(limit=limit)
    out = user_path(out) if out is not None else None
    images = len(data) if limit is None else min(limit, len(data))
    if out:
        with named_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            remove_leftovers(out, IMAGES, SUMMARY)
    rows, start = [], now()
    bar = tqdm(total=images, unit="image", desc="check images", disable=not progress)
    with bar, closing(_checked(data, images)) as chunks:
        for some in chunks:
            rows += some
            bar.update(len(some))
    table = pd.DataFrame(rows, columns=COLUMNS)
    report = ImageReport(table, _summarise(table, data, now() - start), data.class_names, out)
    if out:
        with named_errors(out), replacing(out / SUMMARY) as summary, replacing(out / IMAGES) as csv:
            table.to_csv(csv, index=False, lineterminator="\n")
            json.dump(report.summary, summary, indent=2)
    return report


def _checked(data: Dataset, images: int) -> Iterator[list[tuple]]:
    """Yield the rows of the first ``images`` samples in order, in chunks. Closing the iterator stops the threads."""
    chunks = (range(start, min(start + CHUNK, images)) for start in range(0, images, CHUNK))
    pool = ThreadPoolExecutor(cores(), thread_name_prefix="check")
    try:
        yield from pool.map(lambda chunk: [_row(data, index) for index in chunk], chunks)
    finally:
        pool.shutdown(cancel_futures=True)


def _row(data: Dataset, index: int) -> tuple:
    label, own = data.labels[index], data.own_labels[index]
    what = data.files[index], label, data.own_classes[own] if own >= 0 else ""
    try:
        jpeg = data[index].image
    except VitdemoError as error:  # a file that cannot be read from the disk counts as damaged
        return *what, data.sizes[index], 0, 0, UNREADABLE, "", str(error), "", ""
    return *what, len(jpeg), *examine(jpeg, data.files[index]), hashlib.sha256(jpeg).hexdigest()


def examine(jpeg: bytes, name: str) -> tuple[int, int, str, str, str, str]:
    """The width, height, mode, EXIF state, error and warning of one file, as in ``check_images``."""
    header = read_header(jpeg)
    error = header.error or refusal(header.width, header.height, jpeg, header.mode)
    if error:
        return *header[:4], error, ""
    warning = ""
    import simplejpeg  # imported here, because only this check needs it

    try:
        simplejpeg.decode_jpeg(jpeg, "GRAY", min_height=1, min_width=1)  # at 1/8, the smallest scale
    except ValueError as complaint:  # raised for TurboJPEG's errors and warnings alike
        warning = str(complaint)
        try:
            with PIL_ALONE, warnings.catch_warnings(action="ignore"), open_image(jpeg) as image:
                image.load()
        except Exception as damage:  # as in read_header
            error = one_line(damage)
        if header.format not in ("JPEG", "MPO"):
            warning = f"{header.format}, not JPEG" if name.lower().endswith((".jpg", ".jpeg")) else ""
        # TurboJPEG cannot decode CMYK with subsampled C, M and Y, as in some sound files of other encoders
        elif header.mode == "CMYK" and UNKNOWN_SUBSAMPLING in warning:
            warning = ""
    return *header[:4], error, "" if error else warning


def _summarise(table: pd.DataFrame, data: Dataset, wall_s: float) -> dict:
    damaged = table[(table["error"] != "") | (table["warning"] != "")]
    seen = table[table["mode"] != UNREADABLE]
    digest = hashlib.sha256()
    for sha256, file in zip(table["sha256"], table["file"], strict=True):
        digest.update(f"{sha256}  {file}\n".encode())
    return {
        "data": str(data.path),
        "images": len(table),
        "errors": int((table["error"] != "").sum()),
        "warnings": int((table["warning"] != "").sum()),
        "damaged_by_class": dict(Counter(damaged["class_id"])),
        "modes": dict(Counter(table["mode"]).most_common()),
        "exif": dict(Counter(state for state in table["exif"] if state).most_common()),
        "width": _spread(seen["width"]),
        "height": _spread(seen["height"]),
        "bytes": _spread(table["bytes"]) | {"total": int(table["bytes"].sum())},
        "sha256": digest.hexdigest() if all(table["sha256"]) else None,
        "finished": datetime.now().isoformat(timespec="seconds"),
        "decoder": f"simplejpeg {installed_version('simplejpeg')}",
        "threads": cores(),
        "wall_s": wall_s,
        "images_per_s": len(table) / wall_s,
        "machine": machine_record(),
    }


def _spread(values: pd.Series) -> dict:
    """The smallest, median and largest value; an empty dict for no values."""
    if values.empty:
        return {}
    return {"min": int(values.min()), "median": float(values.median()), "max": int(values.max())}
