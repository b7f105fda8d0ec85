"""A picture from anywhere, perhaps from somebody who means harm: its bytes to the crop that a model sees."""

import torch

from vitdemo.dataset.archives import IMAGE_LIMIT
from vitdemo.dataset.headers import is_enormous, not_decoded, one_line, read_header
from vitdemo.dataset.images import Preprocessing, UnreadableImage, reference_crop
from vitdemo.errors import VitdemoError


def crop_picture(name: str, content: bytes, preprocessing: Preprocessing) -> torch.Tensor:
    """``reference_crop`` of a file's bytes, uint8[3, H, W]; ``name`` is the file's, for errors.

    Raises VitdemoError for what is no picture, is damaged, or would take gigabytes or minutes to decode.
    """
    try:
        if reason := _refusal(content):
            raise UnreadableImage(reason)
        return reference_crop(content, preprocessing)
    except UnreadableImage as unreadable:
        raise VitdemoError(f"{_printable(name)}: {unreadable}; give a sound picture of ordinary size") from None


def _refusal(content: bytes) -> str:
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


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)[:80] or "the picture"
