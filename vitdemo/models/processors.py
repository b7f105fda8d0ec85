"""Converts Hugging Face's preprocessor_config.json to Preprocessing.

Every step except the crop multiplies the pixels by a factor or adds an offset, so all steps together are one mean and
one std. Entries that a file leaves out have the defaults of its class in transformers.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from timm.data import constants

from vitdemo.dataset.decoding import CENTER_FLOOR, Preprocessing
from vitdemo.errors import VitdemoError
from vitdemo.models.loading import read_config

HALF = [0.5, 0.5, 0.5]
STEPS = {"do_resize": True, "do_center_crop": False, "do_pad": False, "do_flip_channel_order": False}
# A single number as the size means both sides, or the shorter side where the class has "shorter".
CROP = {"size": 224, "shorter": False, "crop_size": 224, "crop_pct": None, "resample": 3}
VALUES = {"do_rescale": True, "rescale_factor": 1 / 255, "rescale_offset": False, "include_top": False}
COMMON = STEPS | CROP | VALUES | {"do_normalize": True, "image_mean": HALF, "image_std": HALF}
IMAGENET = {"image_mean": constants.IMAGENET_DEFAULT_MEAN, "image_std": constants.IMAGENET_DEFAULT_STD}
SHORTER = {"shorter": True, "do_center_crop": True}
CLIP = SHORTER | {"image_mean": constants.OPENAI_CLIP_MEAN, "image_std": constants.OPENAI_CLIP_STD}
DEFAULTS = {  # by the name of the class without its ending
    "ViT": {"resample": 2},
    "DeiT": {"do_center_crop": True, "size": 256},
    "Beit": {},
    "Bit": CLIP,
    "CLIP": CLIP,
    "Siglip": {"size": {"height": 224, "width": 224}, "shorter": True},
    "ConvNext": {"size": 384, "shorter": True, "crop_pct": 224 / 256},
    "MobileViT": SHORTER | {"crop_size": 256, "do_flip_channel_order": True},
    "EfficientNet": {"size": 346, "crop_size": 289, "include_top": True},
    "Pvt": IMAGENET,
    "Segformer": IMAGENET | {"resample": 2, "size": 512},
    **dict.fromkeys(("MobileNetV1", "MobileNetV2"), SHORTER | {"resample": 2, "size": 256}),
    "Levit": SHORTER | IMAGENET,
    "PoolFormer": SHORTER | IMAGENET | {"crop_pct": 0.9},
}
ENDING = re.compile(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$")
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by PIL's numbers


def read_processor(config: Mapping, find: Callable[..., Path], usual: str | None = None) -> tuple[Preprocessing, bool]:
    """``preprocessing_of`` the file next to a config.json.

    Args:
        config: the content of the config.json.
        find: returns the path of a file in the same folder by its name.
        usual: the class to assume where the file names none.

    Raises:
        VitdemoError: as in ``preprocessing_of``, and where the file is missing, as in Trainer's checkpoints.
    """
    path = find("preprocessor_config.json")
    base = repr(config["_name_or_path"]) if config.get("_name_or_path") else "BASE"
    write = f"`AutoImageProcessor.from_pretrained({base}).save_pretrained({str(path.parent)!r})`"
    write += ", where BASE is the model that was fine-tuned" if base == "BASE" else ""
    return preprocessing_of(read_config(path, f"transformers writes it by {write}"), str(path), usual)


def preprocessing_of(processor: Mapping, source: str, usual: str | None = None) -> tuple[Preprocessing, bool]:
    """The preprocessing in a preprocessor_config.json.

    Args:
        processor: the file's content.
        source: the file's path, for errors.
        usual: the class to assume where the file names none.

    Returns:
        The preprocessing, and whether the channels must be reversed to blue, green, red.

    Raises:
        VitdemoError: with ``source`` and the first entry that ``Preprocessing`` cannot express.
    """
    named = processor.get("image_processor_type") or processor.get("feature_extractor_type") or usual
    kind = ENDING.sub("", str(named))
    refuse({"image_processor_type": kind in DEFAULTS}, {"image_processor_type": named}, source, ", ".join(DEFAULTS))
    values = COMMON | DEFAULTS[kind] | {key: value for key, value in processor.items() if value is not None}
    if kind == "MobileViT":
        values["do_normalize"] = False  # transformers ignores the file's entry
    factor, mean, std, pct = (values[key] for key in ("rescale_factor", "image_mean", "image_std", "crop_pct"))
    expressible = {
        "do_resize": values["do_resize"] is True,
        "do_pad": values["do_pad"] is False,
        "resample": values["resample"] in tuple(range(len(INTERPOLATIONS))),
        "rescale_factor": _are_numbers([factor], 1) and factor > 0,
        "image_mean": _are_numbers(mean, 3),
        "image_std": _are_numbers(std, 3) and min(std) > 0,
        "crop_pct": pct is None or (_are_numbers([pct], 1) and 0 < pct <= 1),
    }
    refuse(expressible, values, source, "a resize by resample 0 to 5, three means, and numbers above 0 for the others")
    cropped, interpolation = _crop(kind, values, source), INTERPOLATIONS[values["resample"]]
    mean, std = map(tuple, _normalisation(values))
    preprocessing = Preprocessing(**cropped, interpolation=interpolation, mean=mean, std=std)
    return preprocessing, bool(values["do_flip_channel_order"])


def _crop(kind: str, values: Mapping, source: str) -> dict:
    """The entries input_size, crop_pct and crop_mode."""
    shorter, resized = _sides("size", values["size"], source, values["shorter"])
    crop, entry, side = resized, "size", resized[0]
    if values["do_center_crop"]:
        entry, (_, crop) = "crop_size", _sides("crop_size", values["crop_size"], source, False)
    known = "the shorter side with do_center_crop, except for ConvNext"
    refuse({"size": not shorter or values["do_center_crop"] != (kind == "ConvNext")}, values, source, known)
    if kind == "ConvNext" and shorter and side >= 384:
        shorter = False  # for large sizes ConvNext squashes
    elif kind in ("ConvNext", "PoolFormer") and (shorter or side == resized[1]):
        shorter, resized = True, (int(side / values["crop_pct"]),) * 2
    elif kind == "Levit" and shorter:
        resized = (int(256 / 224 * side),) * 2
    sides = list(zip(crop, resized, strict=True))
    pct = min(inner / outer for inner, outer in sides)
    while any(math.floor(inner / pct) < outer for inner, outer in sides):
        pct = math.nextafter(pct, 0)  # timm rounds the quotient down
    exact = pct <= 1 and all(math.floor(inner / pct) == outer for inner, outer in sides)
    # After squashing, the same number of pixels is always cut off. Half of it must round down in torchvision, as in
    # transformers.
    exact = exact and (crop[0] == crop[1] if shorter else all((outer - inner) % 4 != 3 for inner, outer in sides))
    refuse({entry: exact}, values, source, f"a crop within {resized[0]} x {resized[1]}, in its ratio")
    return {"input_size": (3, *crop), "crop_pct": pct, "crop_mode": CENTER_FLOOR if shorter else "squash"}


def _sides(key: str, size: object, source: str, shorter: bool) -> tuple[bool, tuple[int, int]]:
    """Whether the size means the shorter side; and the height and width."""
    if isinstance(size, dict):
        shorter, entries = "shortest_edge" in size, sorted(size)
        sides = [size[entry] for entry in entries]
        known = entries in (["shortest_edge"], ["height", "width"])
    else:
        sides, known = size if isinstance(size, list) else [size], True
        shorter = shorter and len(sides) == 1
    known = known and len(sides) in (1, 2) and all(type(side) is int and side > 0 for side in sides)
    refuse({key: known}, {key: size}, source, "one number, height and width, or shortest_edge")
    return shorter, (sides[0], sides[-1])


def _normalisation(values: Mapping) -> tuple[list[float], list[float]]:
    """The mean and std, for pixels in 0..1, with which all steps together are (pixel - mean) / std."""
    mean, std = [0.0] * 3, [1.0] * 3
    if values["do_normalize"]:
        mean, std = values["image_mean"], values["image_std"]
    if values["include_top"]:  # EfficientNet's processor divides by the std once more
        std = [a * b for a, b in zip(std, values["image_std"], strict=True)]
    gain = 255 * values["rescale_factor"] if values["do_rescale"] else 255.0
    offset = 1.0 if values["rescale_offset"] and values["do_rescale"] else 0.0
    if math.isclose(gain, 1, rel_tol=1e-6) and not offset:  # the usual case: exactly the numbers in the file
        return mean, std
    return [(each + offset) / gain for each in mean], [each / gain for each in std]


def _are_numbers(values: object, count: int) -> bool:
    """Whether ``values`` is a list of ``count`` finite numbers; JSON's true is not a number."""
    known = isinstance(values, (list, tuple)) and all(type(x) in (int, float) and math.isfinite(x) for x in values)
    return known and len(values) == count


def refuse(expressible: Mapping[str, bool], values: Mapping, source: str, known: str) -> None:
    """Raise VitdemoError for the first entry of the file ``source`` that cannot be expressed.

    Args:
        expressible: name of an entry -> whether it can be expressed.
        values: the file's entries.
        source: the file's path.
        known: the values that can be expressed, for the error.
    """
    for key, possible in expressible.items():
        if not possible:
            raise VitdemoError(f"{source}: {key} {values[key]!r} cannot be expressed; known here: {known}")
