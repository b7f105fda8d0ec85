"""What the files' headers say: size, mode, EXIF."""

import io
import struct
import threading
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
from PIL import ExifTags, Image

from vitdemo.dataset.imagenet import Sample

UNREADABLE = "unreadable"
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")  # PIL knows more, and starts Ghostscript for one of them

ENORMOUS = 89_478_485  # pixels: above this PIL warns of a decompression bomb; the coefficients alone take 0.5 GB
ENORMOUS_WORK = 40 * ENORMOUS  # pixels times scans: seconds of decoding

# PIL's only word on broken EXIF is a Python warning, and those can be caught for the whole process only.
PIL_ALONE = threading.Lock()

SOI, SOS, APP1 = 0xD8, 0xDA, 0xE1
SOF = (0xC0, 0xC1, 0xC2)  # baseline, extended sequential, progressive
PASSED_OVER = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)} - {APP1}  # tables, comments, application data
MODES = {1: "L", 3: "RGB", 4: "CMYK"}


class Header(NamedTuple):
    """What a file says of its image: size in pixels, PIL's mode, EXIF state (see ``image_facts``), PIL's format."""

    width: int
    height: int
    mode: str
    exif: str
    format: str


def image_facts(data: Sequence[Sample], limit: int | None = None) -> pd.DataFrame:
    """What the files' headers say, without decoding: file, width and height in pixels, mode, bytes, EXIF.

    A row an image, for the first ``limit`` of them. ``exif``: "" for none, "rotated" where an orientation other
    than upright is asked for, "broken" where it cannot be read, "present" otherwise; ``mode``: PIL's, or
    "unreadable".
    """
    rows = []
    for index in range(len(data) if limit is None else min(limit, len(data))):
        sample = data[index]
        try:
            header = read_header(sample.jpeg)
        except Exception:  # PIL raises a dozen types, and each means: this is no image
            header = Header(0, 0, UNREADABLE, "", "")
        row = {"file": sample.file, "width": header.width, "height": header.height, "mode": header.mode}
        rows.append(row | {"bytes": len(sample.jpeg), "exif": header.exif})
    return pd.DataFrame(rows)


def read_header(jpeg: bytes) -> Header:
    """The header as PIL reads it, without decoding. Raises what PIL raises; for broken EXIF nothing."""
    with PIL_ALONE, warnings.catch_warnings(action="ignore"), open_image(jpeg) as image:
        return Header(*image.size, image.mode, _exif_state(image), image.format)


def open_image(jpeg: bytes) -> Image.Image:
    """PIL's image of the bytes, of one of FORMATS. Raises what PIL raises."""
    return Image.open(io.BytesIO(jpeg), formats=FORMATS)


def _exif_state(image: Image.Image) -> str:
    block = image.info.get("exif")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            if block is not None:
                Image.Exif().load(block)  # anew: opening may have read it already, and it warns once
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)  # XMP's, where EXIF has none
        except Exception:  # as in image_facts
            return "broken"
    if warned:
        return "broken"
    return "rotated" if orientation != 1 else "present" if block is not None else ""


def one_line(error: Exception) -> str:
    """A decoder's reason in one line, the same in every run: without the address of the buffer that PIL read from."""
    reason = " ".join(str(error).split("<_io")[0].split()) or "no reason given"
    return f"{type(error).__name__}: {reason}"


def is_enormous(width: int, height: int, jpeg: bytes) -> bool:
    """Whether decoding would take gigabytes or minutes: each scan of a progressive JPEG goes over the whole image,
    and a scan that changes nothing takes 11 bytes. Counting them takes time, so it is done where there may be many."""
    pixels = width * height
    if pixels * len(jpeg) < 11 * ENORMOUS_WORK or jpeg[:2] != bytes([0xFF, SOI]):
        return pixels > ENORMOUS
    return pixels > ENORMOUS or pixels * jpeg.count(bytes([0xFF, SOS])) > ENORMOUS_WORK


def not_decoded(width: int, height: int) -> str:
    """The reason to give for an image that ``is_enormous``."""
    return f"not decoded: {width} x {height} pixels would take gigabytes or minutes"


def plain_header(jpeg: bytes) -> Header | None:
    """The header of an ordinary JPEG, 15 times as fast as PIL; None for one that PIL must see.

    That is one with an APP1 segment (EXIF and XMP), and one with anything out of the ordinary before its first scan.
    [ITU-T T.81, annex B: segments are 0xFF, a marker, and, but for SOI, a big-endian length that counts itself]
    """
    header, at = None, 2
    if jpeg[:2] != bytes([0xFF, SOI]):
        return None
    while at + 10 <= len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == SOS:
            return header
        if marker in SOF and header is None:
            bits, height, width, components = struct.unpack_from(">BHHB", jpeg, at + 4)
            if bits != 8 or not width or not height or components not in MODES:
                return None
            header = Header(width, height, MODES[components], "", "JPEG")
        elif marker not in PASSED_OVER:
            return None
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4])
    return None
