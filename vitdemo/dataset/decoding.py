"""From an image's bytes to what its header says, and to the uint8 crop that a model sees."""

import io
import math
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

import pandas as pd
import simplejpeg
import torch
from PIL import ExifTags, Image
from timm.data import create_transform
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize

from vitdemo.dataset.imagenet import Sample
from vitdemo.dataset.tars import IMAGE_LIMIT
from vitdemo.errors import VitdemoError

CROP_MODES = ("center", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")
INPUT_PATHS = ("fast", "reference")

# EXIF is ignored here, so that a broken block is no news to somebody who evaluates 50,000 images.
warnings.filterwarnings("ignore", message="Corrupt EXIF data", module="PIL")

UNREADABLE = "unreadable"
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")  # PIL knows more, and starts Ghostscript for one of them

ENORMOUS = 89_478_485  # pixels: above this PIL warns of a decompression bomb; the coefficients alone take 0.5 GB
ENORMOUS_WORK = 40 * ENORMOUS  # pixels times scans: seconds of decoding

# PIL reports broken EXIF only as a Python warning, and catching warnings is not thread-safe: one thread at a time.
PIL_ALONE = threading.Lock()

SOI, SOS = b"\xff\xd8", b"\xff\xda"
MODES = {"Gray": "L", "YCbCr": "RGB", "RGB": "RGB", "CMYK": "CMYK", "YCCK": "CMYK"}  # PIL's, by TurboJPEG's


# ---- from bytes to what the header says: size, mode, EXIF


class Header(NamedTuple):
    """What a file says of its image: size in pixels, PIL's mode, EXIF state (see ``image_facts``), PIL's format."""

    width: int
    height: int
    mode: str
    exif: str
    format: str


def image_facts(data: Sequence[Sample], limit: int | None = None) -> pd.DataFrame:
    """What the files' headers say, without decoding: file, width and height in pixels, mode, bytes, EXIF.

    One row per image, for the first ``limit`` of them. ``exif``: "" for none, "rotated" where an orientation other
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
    if pixels * len(jpeg) < 11 * ENORMOUS_WORK or jpeg[:2] != SOI:
        return pixels > ENORMOUS
    return pixels > ENORMOUS or pixels * jpeg.count(SOS) > ENORMOUS_WORK


def not_decoded(width: int, height: int) -> str:
    """The reason to give for an image that ``is_enormous``."""
    return f"not decoded: {width} x {height} pixels would take gigabytes or minutes"


def plain_header(jpeg: bytes) -> Header | None:
    """The header of an ordinary JPEG as TurboJPEG reads it, many times as fast as PIL; None for one that PIL must see:
    with an APP1 segment (EXIF and XMP), or with anything that TurboJPEG has a word to say about."""
    if b"\xff\xe1" in jpeg:
        return None
    with suppress(ValueError, KeyError):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(jpeg)
        return Header(width, height, MODES[colours], "", "JPEG")
    return None


# ---- from bytes to the crop


class UnreadableImage(Exception):
    """One image that cannot be decoded; the message is the decoder's reason."""


@dataclass(frozen=True)
class Preprocessing:
    """What a model's weights expect of an image, in timm's names (``timm.data.resolve_model_data_config``).

    input_size: (3, H, W) in pixels. crop_pct: input side over resized side. crop_mode: "center" resizes
    the shorter side and cuts the centre out; "squash" resizes to H/crop_pct x W/crop_pct whatever the
    aspect ratio (Hugging Face's way for ViT, with crop_pct 1). mean, std: per channel, of values in 0..1.
    """

    input_size: tuple[int, int, int]
    crop_pct: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self):
        for field in ("input_size", "mean", "std"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for field, known in (("crop_mode", CROP_MODES), ("interpolation", INTERPOLATIONS)):
            if getattr(self, field) not in known:
                raise VitdemoError(f"preprocessing: {field} {getattr(self, field)!r} is not one of {', '.join(known)}")
        if len(self.input_size) != 3 or self.input_size[0] != 3:
            raise VitdemoError(f"preprocessing: input_size {self.input_size} is not (3, height, width)")

    def to_dict(self) -> dict:
        """A dict that JSON can hold."""
        return asdict(self)


@lru_cache(maxsize=8)
def _timm_transform(preprocessing: Preprocessing):
    # With use_prefetcher timm ends in uint8 and leaves mean and std to the device, which is our contract too.
    return create_transform(**asdict(preprocessing), is_training=False, use_prefetcher=True)


def reference_crop(jpeg: bytes, preprocessing: Preprocessing) -> torch.Tensor:
    """Decode with PIL and apply timm's evaluation transform: uint8[3, H, W], always RGB.

    EXIF orientation is ignored, as in timm. Raises UnreadableImage, for an enormous image too.
    """
    try:
        with open_image(jpeg) as image:
            if refusal := _refusal(*image.size, jpeg, preprocessing):
                raise UnreadableImage(refusal)
            return torch.as_tensor(_timm_transform(preprocessing)(image.convert("RGB")))
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise a dozen types, and each means: this file cannot be read
        raise UnreadableImage(one_line(error)) from error


def fast_crop(jpeg: bytes, preprocessing: Preprocessing) -> torch.Tensor | None:
    """``reference_crop`` of a sound JPEG at several times its rate; None for what it leaves to that.

    TurboJPEG decodes to the very pixels that PIL does, and torch resizes them as the bytes they are, which rounds
    here and there to the next level. Left to the reference: what is no JPEG in grey or colour, what the decoder has
    a word to say about, more pixels than PIL takes without a warning, what is enormous, and a center crop that is not
    square.
    """
    if preprocessing.crop_mode == "center" and len(set(preprocessing.input_size[1:])) != 1:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(jpeg)
        if colours not in ("Gray", "YCbCr", "RGB"):
            return None
        if height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        if _refusal(width, height, jpeg, preprocessing):
            return None
        decoded = simplejpeg.decode_jpeg(jpeg)
    except ValueError:
        return None
    pixels = torch.from_numpy(decoded).permute(2, 0, 1).unsqueeze(0)
    resized = resize(pixels, _resized_size(preprocessing), InterpolationMode(preprocessing.interpolation))
    return center_crop(resized, list(preprocessing.input_size[1:]))[0]


def _resized_size(preprocessing: Preprocessing) -> list[int]:
    """What torchvision's ``resize`` takes: both sides for "squash", the shorter one for "center"."""
    sides = _resized_sides(preprocessing)
    return sides if preprocessing.crop_mode == "squash" else sides[:1]


def _resized_sides(preprocessing: Preprocessing) -> list[int]:
    """Height and width that an image is resized to, or, for "center", is to cover."""
    return [math.floor(side / preprocessing.crop_pct) for side in preprocessing.input_size[1:]]


def _refusal(width: int, height: int, jpeg: bytes, preprocessing: Preprocessing) -> str:
    """Why an image must not be decoded or resized, "" when it may: a few bytes can ask for gigabytes or minutes."""
    if is_enormous(width, height, jpeg):
        return not_decoded(width, height)
    to_height, to_width = _resized_sides(preprocessing)
    if preprocessing.crop_mode == "center":
        scale = max(to_height / height, to_width / width)
        to_height, to_width = round(height * scale), round(width * scale)
    pixels = to_height * to_width
    return f"not decoded: {width} x {height} pixels, resized it would have {pixels:,}" if pixels > ENORMOUS else ""


# ---- a picture from anywhere, perhaps from somebody who means harm


def crop_picture(name: str, content: bytes, preprocessing: Preprocessing) -> torch.Tensor:
    """``reference_crop`` of a file's bytes, uint8[3, H, W]; ``name`` is the file's, for errors.

    Raises VitdemoError for what is no picture, is damaged, or would take gigabytes or minutes to decode.
    """
    try:
        if reason := _why_not_opened(content):
            raise UnreadableImage(reason)
        return reference_crop(content, preprocessing)
    except UnreadableImage as unreadable:
        raise VitdemoError(f"{name}: {unreadable}; give a sound picture of ordinary size") from None


def _why_not_opened(content: bytes) -> str:
    """Why the bytes must not be opened, "" when they may. Formats that PIL hands to other programs are refused."""
    if not content:
        return "is empty"
    if len(content) > IMAGE_LIMIT:
        return f"is larger than {IMAGE_LIMIT >> 20} MiB"
    try:
        header = read_header(content)
    except Exception as error:  # PIL raises a dozen types, and each means: this is no picture
        return f"is not a picture that can be read ({one_line(error)})"
    return not_decoded(header.width, header.height) if is_enormous(header.width, header.height, content) else ""
