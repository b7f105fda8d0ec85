"""From an image's bytes to what its header says, and to the uint8 crop that a model sees."""

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
CENTER_FLOOR = "center_floor"  # transformers' way to cut the centre out, nobody's choice: it comes with its processors
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
FAST_INTERPOLATIONS = ("bicubic", "bilinear")  # which torch does on bytes as PIL does
INPUT_PATHS = ("fast", "reference")

warnings.filterwarnings("ignore", message="Corrupt EXIF data", module="PIL")  # EXIF is ignored here
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is enormous is refused in words

UNREADABLE = "unreadable"
EXIF_WITHIN = 1 << 16  # bytes from the start, where cameras' JPEGs have it

ENORMOUS = 89_478_485  # pixels: above this PIL warns of a decompression bomb; the coefficients alone take 0.5 GB
ENORMOUS_WORK = 40 * ENORMOUS  # pixels times scans: seconds of decoding
SOI, SOS = b"\xff\xd8", b"\xff\xda"  # the first bytes of a JPEG, and of each of its scans

# PIL reports broken EXIF only as a Python warning, and catching warnings is not thread-safe: one thread at a time.
PIL_ALONE = threading.Lock()


class Header(NamedTuple):
    """What a file says of its image: size in pixels, PIL's mode, EXIF state (see ``image_facts``), PIL's format; or
    the error, where it is no image."""

    width: int = 0
    height: int = 0
    mode: str = UNREADABLE
    exif: str = ""
    format: str = ""
    error: str = ""


def image_facts(data: Sequence[Sample], limit: int | None = None) -> pd.DataFrame:
    """What the files' headers say of the images, without decoding them.

    Args:
        data: the samples.
        limit: look at the first so many only.

    Returns:
        One row per image: file; width, height in pixels; mode, PIL's or "unreadable"; bytes; exif: "" for none,
        "rotated" for an orientation other than upright, "broken" where it cannot be read, "present" otherwise.
    """
    rows = []
    for sample in islice(data, limit):
        header = read_header(sample.image)
        row = {"file": sample.file, "width": header.width, "height": header.height, "mode": header.mode}
        rows.append(row | {"bytes": len(sample.image), "exif": header.exif})
    return pd.DataFrame(rows)


def read_header(jpeg: bytes) -> Header:
    """The header as PIL reads it, without decoding; broken EXIF is no error."""
    try:
        with PIL_ALONE, warnings.catch_warnings(action="ignore"), open_image(jpeg) as image:
            return Header(*image.size, image.mode, _exif_state(image), image.format)
    except Exception as error:  # PIL raises a dozen types, and each means: this is no image
        return Header(error=one_line(error))


def open_image(jpeg: bytes) -> Image.Image:
    """PIL's image of the bytes. Raises what PIL raises."""
    return Image.open(io.BytesIO(jpeg), formats=formats())


def _exif_state(image: Image.Image) -> str:
    block = image.info.get("exif")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            if block is not None:
                Image.Exif().load(block)  # anew: opening may have read it already, and it warns once
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)  # XMP's, where EXIF has none
        except Exception:  # as in read_header
            return "broken"
    if warned:
        return "broken"
    return "rotated" if orientation != 1 else "present" if block is not None else ""


def is_rotated(image: bytes) -> bool:
    """Whether a file says that its picture is to be turned or mirrored. Few have the EXIF for which PIL is asked."""
    return b"Exif" in image[:EXIF_WITHIN] and read_header(image).exif == "rotated"


def upright(image: bytes) -> bytes:
    """A picture turned and mirrored as its EXIF says, as PNG; the same bytes where they say nothing."""
    if not is_rotated(image):
        return image
    with open_image(image) as picture:
        turned, png = ImageOps.exif_transpose(picture), io.BytesIO()
    turned.convert("RGB").save(png, "PNG")
    return png.getvalue()


def one_line(error: Exception) -> str:
    """A decoder's reason in one line, the same in every run: without the address of the buffer that PIL read from."""
    reason = " ".join(str(error).split("<_io")[0].split()) or "no reason given"
    return f"{type(error).__name__}: {reason}"


def refusal(width: int, height: int, jpeg: bytes) -> str:
    """Why an image must not be decoded, "" when it may: a few bytes can ask for gigabytes or minutes.

    Each scan of a progressive JPEG goes over the whole image, and one that changes nothing takes 11 bytes. To count
    them takes time, so it is done where there may be many.
    """
    pixels, scans = width * height, 1
    if pixels * len(jpeg) > 11 * ENORMOUS_WORK and jpeg.startswith(SOI):
        scans = jpeg.count(SOS)
    enormous = pixels > ENORMOUS or pixels * scans > ENORMOUS_WORK
    return f"not decoded: {width} x {height} pixels would take gigabytes or minutes" if enormous else ""


class UnreadableImage(Exception):
    """One image that cannot be decoded; the message is the decoder's reason."""


@dataclass(frozen=True)
class Preprocessing:
    """What a model's weights expect of an image, in timm's names (``timm.data.resolve_model_data_config``).

    Args:
        input_size: (3, H, W) in pixels.
        crop_pct: input side over resized side.
        crop_mode: "center" resizes the shorter side and cuts the centre out; "squash" resizes to H/crop_pct x
            W/crop_pct whatever the aspect ratio (Hugging Face's way for ViT, with crop_pct 1); "center_floor" is
            "center" where half a pixel rounds down, as in transformers, and not to even, as in torchvision.
        interpolation: one of PIL's, in lower case: "bicubic", "bilinear", "nearest", "lanczos", "box", "hamming".
        mean, std: per channel, of values in 0..1.

    Raises:
        VitdemoError: for an input_size of other than three channels, and an unknown crop_mode or interpolation.
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
    # With use_prefetcher timm ends in uint8 and leaves mean and std to the device, which is our contract too.
    options = asdict(preprocessing) | {"crop_mode": preprocessing.crop_mode.removesuffix("_floor")}
    transform = create_transform(**options, is_training=False, use_prefetcher=True)
    if preprocessing.crop_mode == CENTER_FLOOR:
        transform.transforms[1] = partial(_center_floor, sides=preprocessing.input_size[1:])
    return transform


def _center_floor(pixels: Image.Image | torch.Tensor, sides: Sequence[int]) -> Image.Image | torch.Tensor:
    """The centre of an image that is at least ``sides``, height and width, large."""
    _, height, width = get_dimensions(pixels)
    return crop(pixels, (height - sides[0]) // 2, (width - sides[1]) // 2, *sides)


def reference_crop(jpeg: bytes, preprocessing: Preprocessing) -> torch.Tensor:
    """Decode with PIL and apply timm's evaluation transform; EXIF orientation is ignored, as in timm.

    Args:
        jpeg: the file's bytes, of one of ``formats``.
        preprocessing: the crop that the model's weights expect.

    Returns:
        uint8[3, H, W], RGB.

    Raises:
        UnreadableImage: with the decoder's reason, for an enormous image too.
    """
    try:
        with open_image(jpeg) as image:
            if reason := _crop_refusal(*image.size, jpeg, preprocessing):
                raise UnreadableImage(reason)
            return torch.as_tensor(_timm_transform(preprocessing)(image.convert("RGB")))
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise a dozen types, and each means: this file cannot be read
        raise UnreadableImage(one_line(error)) from error


def fast_crop(jpeg: bytes, preprocessing: Preprocessing) -> torch.Tensor | None:
    """``reference_crop`` of a sound JPEG at several times its rate.

    TurboJPEG decodes to the very pixels that PIL does, and torch resizes them as the bytes they are, which rounds
    here and there to the next level.

    Args:
        jpeg: the file's bytes.
        preprocessing: the crop that the model's weights expect.

    Returns:
        uint8[3, H, W], or None for what is left to the reference: what is no JPEG in grey or colour, what the decoder
        has a word to say about, what is enormous, a center crop that is not square, and rare interpolations.
    """
    squash, sides = preprocessing.crop_mode == "squash", list(preprocessing.input_size[1:])
    if not squash and sides[0] != sides[1] or preprocessing.interpolation not in FAST_INTERPOLATIONS:
        return None
    try:
        import simplejpeg  # here, as without it the reference path is left

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
    """Height and width that an image is resized to, or, unless squashed, is to cover."""
    return [math.floor(side / preprocessing.crop_pct) for side in preprocessing.input_size[1:]]


def _crop_refusal(width: int, height: int, jpeg: bytes, preprocessing: Preprocessing) -> str:
    """Why an image must not be decoded or resized, "" when it may: in its ratio, a line becomes an enormous image."""
    to_height, to_width = _resized_sides(preprocessing)
    if preprocessing.crop_mode != "squash":
        scale = max(to_height / height, to_width / width)
        to_height, to_width = round(height * scale), round(width * scale)
    pixels = to_height * to_width
    resized = f"not decoded: {width} x {height} pixels, resized it would have {pixels:,}" if pixels > ENORMOUS else ""
    return refusal(width, height, jpeg) or resized


def crop_picture(name: str, content: bytes, preprocessing: Preprocessing) -> torch.Tensor:
    """``reference_crop``, uint8[3, H, W], of a picture from anywhere, perhaps from somebody who means harm.

    Args:
        name: the file's, for errors.
        content: its bytes; formats that PIL hands to other programs are not opened.
        preprocessing: the crop that the model's weights expect.

    Raises:
        VitdemoError: for what is no picture, is damaged, or would take gigabytes or minutes to decode.
    """
    try:
        return reference_crop(content, preprocessing)
    except UnreadableImage as reason:
        cure = "give a sound one of ordinary size"
        raise VitdemoError(f"{name!r} is no picture that can be read ({reason}); {cure}") from None
