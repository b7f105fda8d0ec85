"""Reads an image's header, and decodes its bytes to the uint8 crop that a model sees."""

import io
import math
import threading
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import NamedTuple

import pandas as pd
import torch
from PIL import ExifTags, Image, ImageOps
from timm.data import create_transform
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, crop, get_dimensions, resize

from vitdemo.dataset.samples import Sample, formats
from vitdemo.errors import VitdemoError

CROP_MODES = ("center", "squash")
CENTER_FLOOR = "center_floor"  # the centre crop of transformers, set only by its processors, never by the user
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
FAST_INTERPOLATIONS = ("bicubic", "bilinear")  # for these torch resizes uint8 images as PIL does
INPUT_PATHS = ("fast", "reference")

warnings.filterwarnings("ignore", message="Corrupt EXIF data", module="PIL")  # EXIF is ignored here
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # enormous images are refused with a message

UNREADABLE = "unreadable"
EXIF_WITHIN = 1 << 16  # bytes from the start of the file, in which cameras write EXIF

ENORMOUS = 89_478_485  # pixels; above this PIL warns of a decompression bomb, and the coefficients alone take 0.5 GB
ENORMOUS_WORK = 40 * ENORMOUS  # pixels times scans, which take seconds to decode
SOI, SOS = b"\xff\xd8", b"\xff\xda"  # the first bytes of a JPEG, and of each of its scans

# PIL reports broken EXIF only as a Python warning. Catching warnings is not thread-safe, so a lock is needed.
PIL_ALONE = threading.Lock()


class Header(NamedTuple):
    """The facts in an image file's header: size in pixels, PIL's mode, EXIF state (see ``image_facts``), PIL's format.

    Where the file is not an image, ``error`` is the reason.
    """

    width: int = 0
    height: int = 0
    mode: str = UNREADABLE
    exif: str = ""
    format: str = ""
    error: str = ""


def image_facts(data: Sequence[Sample], limit: int | None = None) -> pd.DataFrame:
    """The facts in the headers of the image files, read without decoding the images.

    Args:
        data: the samples.
        limit: read only this many, from the first.

    Returns:
        One row per image: file; width and height in pixels; mode (PIL's, or "unreadable"); bytes; exif ("" for no
        EXIF, "rotated" for an orientation other than upright, "broken" if it cannot be read, "present" otherwise).
    """
    rows = []
    for sample in islice(data, limit):
        header = read_header(sample.image)
        row = {"file": sample.file, "width": header.width, "height": header.height, "mode": header.mode}
        rows.append(row | {"bytes": len(sample.image), "exif": header.exif})
    return pd.DataFrame(rows)


def read_header(jpeg: bytes) -> Header:
    """Read the header with PIL, without decoding the image; broken EXIF is not an error."""
    try:
        with PIL_ALONE, warnings.catch_warnings(action="ignore"), open_image(jpeg) as image:
            return Header(*image.size, image.mode, _exif_state(image), image.format)
    except Exception as error:  # PIL raises a dozen types, and each means that this is not an image
        return Header(error=one_line(error))


def open_image(jpeg: bytes) -> Image.Image:
    """Open the bytes with PIL. Raises PIL's exceptions."""
    return Image.open(io.BytesIO(jpeg), formats=formats())


def _exif_state(image: Image.Image) -> str:
    block = image.info.get("exif")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            if block is not None:
                Image.Exif().load(block)  # read again, because PIL warns once, perhaps already when it opened the file
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)  # from XMP where EXIF has none
        except Exception:  # as in read_header
            return "broken"
    if warned:
        return "broken"
    return "rotated" if orientation != 1 else "present" if block is not None else ""


def is_rotated(image: bytes) -> bool:
    """Whether the EXIF orientation rotates or mirrors the image. PIL is asked only about files that have EXIF."""
    head = image if image.startswith(b"RIFF") else image[:EXIF_WITHIN]  # WebP has it at the end
    return b"exif" in head.lower() and read_header(image).exif == "rotated"


def upright(image: bytes) -> bytes:
    """The image rotated and mirrored by its EXIF orientation, as PNG; the same bytes where it has none."""
    if not is_rotated(image):
        return image
    with open_image(image) as picture:
        turned, png = ImageOps.exif_transpose(picture), io.BytesIO()
    turned.convert("RGB").save(png, "PNG")
    return png.getvalue()


def one_line(error: Exception) -> str:
    """A decoder's reason in one line, without the buffer's memory address, so that it is the same in every run."""
    reason = " ".join(str(error).split("<_io")[0].split()) or "no reason given"
    return f"{type(error).__name__}: {reason}"


def refusal(width: int, height: int, jpeg: bytes, mode: str = "RGB") -> str:
    """Why an image must not be decoded, or "" if it may: a file of a few bytes can take gigabytes or minutes.

    Each scan of a progressive JPEG goes over the whole image, and a scan that changes nothing takes only 11 bytes.
    Counting the scans takes time, so they are counted only where there may be too many. Of PIL's modes, those with
    more than 8 bits per channel are refused, because ``convert`` would make everything above 255 white.
    """
    if mode[0] in "IF":
        return f"pixels of more than 8 bits (mode {mode}); convert the file to 8 bits"
    pixels, scans = width * height, 1
    if pixels * len(jpeg) > 11 * ENORMOUS_WORK and jpeg.startswith(SOI):
        scans = jpeg.count(SOS)
    enormous = pixels > ENORMOUS or pixels * scans > ENORMOUS_WORK
    return f"not decoded: {width} x {height} pixels would take gigabytes or minutes" if enormous else ""


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message is the decoder's reason."""


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing that a model's weights need, in timm's names (``timm.data.resolve_model_data_config``).

    Args:
        input_size: (3, H, W) in pixels.
        crop_pct: input side divided by resized side.
        crop_mode: "center" resizes the shorter side and cuts the centre out; "squash" resizes to H/crop_pct x
            W/crop_pct and ignores the aspect ratio (as Hugging Face does for ViT, with crop_pct 1); "center_floor" is
            "center" with half a pixel rounded down, as in transformers, and not to even, as in torchvision.
        interpolation: PIL's name in lower case: "bicubic", "bilinear", "nearest", "lanczos", "box" or "hamming".
        mean, std: one value per channel, for pixel values in 0..1.

    Raises:
        VitdemoError: for an input_size without three channels, and for an unknown crop_mode or interpolation.
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
        for field, known in (("crop_mode", (*CROP_MODES, CENTER_FLOOR)), ("interpolation", INTERPOLATIONS)):
            if getattr(self, field) not in known:
                raise VitdemoError(f"preprocessing: {field} {getattr(self, field)!r} is not one of {', '.join(known)}")
        if len(self.input_size) != 3 or self.input_size[0] != 3:
            raise VitdemoError(f"preprocessing: input_size {self.input_size} is not (3, height, width)")


@lru_cache(maxsize=8)
def _timm_transform(preprocessing: Preprocessing):
    # With use_prefetcher timm's transform returns uint8 and leaves mean and std to the device. Engines expect the same.
    options = asdict(preprocessing) | {"crop_mode": preprocessing.crop_mode.removesuffix("_floor")}
    transform = create_transform(**options, is_training=False, use_prefetcher=True)
    if preprocessing.crop_mode == CENTER_FLOOR:
        transform.transforms[1] = partial(_center_floor, sides=preprocessing.input_size[1:])
    return transform


def _center_floor(pixels: Image.Image | torch.Tensor, sides: Sequence[int]) -> Image.Image | torch.Tensor:
    """Cut out the centre of an image, of the height and width ``sides``; the image must be at least as large."""
    _, height, width = get_dimensions(pixels)
    return crop(pixels, (height - sides[0]) // 2, (width - sides[1]) // 2, *sides)


def reference_crop(jpeg: bytes, preprocessing: Preprocessing) -> torch.Tensor:
    """Decode with PIL and apply timm's evaluation transform; EXIF orientation is ignored, as in timm.

    Args:
        jpeg: the file's bytes, in one of ``formats``.
        preprocessing: the model's own preprocessing.

    Returns:
        uint8[3, H, W], RGB.

    Raises:
        UnreadableImage: with the decoder's reason; also for an enormous image.
    """
    try:
        with open_image(jpeg) as image:
            if reason := _crop_refusal(*image.size, jpeg, preprocessing, image.mode):
                raise UnreadableImage(reason)
            return torch.as_tensor(_timm_transform(preprocessing)(image.convert("RGB")))
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise a dozen types, and each means that this file cannot be read
        raise UnreadableImage(one_line(error)) from error


def fast_crop(jpeg: bytes, preprocessing: Preprocessing) -> torch.Tensor | None:
    """The crop of ``reference_crop`` for a sound JPEG, several times as fast.

    TurboJPEG decodes to exactly the same pixels as PIL. Torch then resizes them in uint8, so that a few values are
    rounded to the neighbouring grey level.

    Args:
        jpeg: the file's bytes.
        preprocessing: the model's own preprocessing.

    Returns:
        uint8[3, H, W], or None where the reference path must decode: for files other than grey or colour JPEGs, where
        the decoder warns, for enormous images, centre crops that are not square, and rare interpolations.
    """
    squash, sides = preprocessing.crop_mode == "squash", list(preprocessing.input_size[1:])
    if not squash and sides[0] != sides[1] or preprocessing.interpolation not in FAST_INTERPOLATIONS:
        return None
    try:
        import simplejpeg  # imported here, because without it the reference path still works

        height, width, colours, _ = simplejpeg.decode_jpeg_header(jpeg)
        if colours not in ("Gray", "YCbCr", "RGB") or _crop_refusal(width, height, jpeg, preprocessing):
            return None
        decoded = simplejpeg.decode_jpeg(jpeg)
    except (ImportError, ValueError):
        return None
    pixels, size = torch.from_numpy(decoded).permute(2, 0, 1).unsqueeze(0), _resized_sides(preprocessing)
    size = size if squash else size[:1]  # for one side torchvision takes the shorter one
    resized = resize(pixels, size, InterpolationMode(preprocessing.interpolation))
    return (_center_floor if preprocessing.crop_mode == CENTER_FLOOR else center_crop)(resized, sides)[0]


def _resized_sides(preprocessing: Preprocessing) -> list[int]:
    """The height and width to which "squash" resizes an image, and which the resized image covers otherwise."""
    return [math.floor(side / preprocessing.crop_pct) for side in preprocessing.input_size[1:]]


def _crop_refusal(width: int, height: int, jpeg: bytes, preprocessing: Preprocessing, mode: str = "RGB") -> str:
    """Why an image must not be decoded or resized, or "" if it may.

    Resizing keeps the aspect ratio, so that an image of one pixel's height becomes enormous.
    """
    to_height, to_width = _resized_sides(preprocessing)
    if preprocessing.crop_mode != "squash":
        scale = max(to_height / height, to_width / width)
        to_height, to_width = round(height * scale), round(width * scale)
    pixels = to_height * to_width
    resized = f"not decoded: {width} x {height} pixels, resized it would have {pixels:,}" if pixels > ENORMOUS else ""
    return refusal(width, height, jpeg, mode) or resized


def crop_picture(name: str, content: bytes, preprocessing: Preprocessing) -> torch.Tensor:
    """The ``reference_crop``, uint8[3, H, W], of an image from an untrusted source.

    Args:
        name: the file's name, for errors.
        content: the file's bytes; formats that PIL passes on to other programs are not opened.
        preprocessing: the model's own preprocessing.

    Raises:
        VitdemoError: for a file that is not an image, is damaged, or would take gigabytes or minutes to decode.
    """
    try:
        return reference_crop(content, preprocessing)
    except UnreadableImage as reason:
        cure = "give an undamaged one of ordinary size"
        raise VitdemoError(f"{name!r} is no picture that can be read ({reason}); {cure}") from None
