"""Chooses the calibration images, on which the tools of ``onnx`` and ``openvino`` find the ranges for int8."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from vitdemo.dataset.dataset import Dataset, open_data, open_images
from vitdemo.dataset.decoding import UnreadableImage, reference_crop
from vitdemo.dataset.samples import Sample, UnreadableFile
from vitdemo.dataset.trees import FOLDERS
from vitdemo.errors import VitdemoError
from vitdemo.models.model import Model
from vitdemo.paths import CALIBRATIONS, data_path, user_path
from vitdemo.stats import spread

CalibrationImages = Sequence[Sample] | torch.Tensor | Path | str | None  # see ``calibration_for``
IMAGES, RANDOM_IMAGES = 256, 32  # more random images would only give the same ranges again


@dataclass(frozen=True)
class Calibration:
    """The calibration images of an artifact.

    pixels: uint8[N, 3, H, W]. source: the origin of the images, for people. files: bytes and sha256 of each image file,
    in order; empty where the caller gave pixels, whose files are unknown.
    """

    pixels: torch.Tensor
    source: str
    files: tuple[tuple[int, str], ...] = ()

    @property
    def fingerprint(self) -> str:
        """The sha256 of the pixels."""
        return hashlib.sha256(self.pixels.numpy()).hexdigest()

    def to_dict(self) -> dict:
        """The entry in an artifact's card."""
        found = {"source": self.source, "images": len(self.pixels), "fingerprint": self.fingerprint}
        return found | {"files": [list(file) for file in self.files]}


def calibration_for(model: Model, given: CalibrationImages = None) -> Calibration:
    """Up to 256 images for ``model``, evenly spread over the given ones.

    Args:
        model: the model whose preprocessing is applied.
        given: a data set, or the path of a data set or of images without labels, see ``open_data`` and ``open_images``;
            or pixels, uint8[N, 3, H, W]. None takes the bundled images for vit_shapes20, and random pixels for random
            weights.

    Raises:
        VitdemoError: when there are no images, or none that fit.
    """
    info = model.info
    if given is None:
        if info.weights == "random":
            return Calibration(info.random_pixels(RANDOM_IMAGES), "random pixels")
        if info.tag not in CALIBRATIONS or info.weights != "pretrained":
            raise VitdemoError(
                f"{info.tag}: int8 needs images for its calibration; give calibration (--calibration PATH in a shell), "
                "images like those it will see but not those it is scored on (some of ImageNet's train set, say)"
            )
        given = data_path(CALIBRATIONS[info.tag])
    if isinstance(given, torch.Tensor):
        size = info.preprocessing.input_size
        if given.dtype != torch.uint8 or given.ndim != 4 or given.shape[1:] != size or len(given) == 0:
            raise VitdemoError(
                f"calibration: pixels are uint8[N >= 1, {', '.join(map(str, size))}], not "
                f"{str(given.dtype).removeprefix('torch.')}{list(given.shape)}"
            )
        return Calibration(given.cpu().contiguous(), "pixels given by the caller")
    if isinstance(given, (str, Path)):
        given = _images_at(user_path(given))
    crops, files = [], []
    for i in spread(len(given), IMAGES):
        try:
            image = given[i].image
            crops.append(reference_crop(image, info.preprocessing))
        except (UnreadableFile, UnreadableImage):
            continue  # calibrate on one image less; extract with --check-images reports the unreadable ones
        files.append((len(image), hashlib.sha256(image).hexdigest()))
    source = str(getattr(given, "path", "a data set"))
    if not crops:
        raise VitdemoError(f"{source}: holds no image that can be read; give other images for the calibration")
    return Calibration(torch.stack(crops), source, tuple(files))


def _images_at(path: Path) -> Dataset:
    """A data set of either split, or images without labels, because calibration needs no labels."""
    for split in FOLDERS:
        with suppress(VitdemoError):
            return open_data(path, split=split)
    return open_images([path])
