"""Chooses the images on which ``onnx`` and ``openvino`` find the ranges of int8, by their runtimes' own tools."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from vitdemo.bundled import CALIBRATIONS
from vitdemo.dataset.decoding import Preprocessing, UnreadableImage, reference_crop
from vitdemo.dataset.imagenet import ImageNetTrain, ImageNetVal, Sample, UnreadableFile
from vitdemo.dataset.tars import IMAGE_LIMIT, index_tar
from vitdemo.dataset.trees import FOLDERS, find_tree
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.models.model import Model
from vitdemo.paths import data_path, user_path
from vitdemo.stats import spread

IMAGES, RANDOM_IMAGES = 256, 32  # more random ones would only repeat the same ranges


@dataclass(frozen=True)
class Calibration:
    """pixels: uint8[N, 3, H, W]. source: where they came from, for people.

    files: bytes and sha256 of each image file, in order; empty where pixels were given, as nobody knows their files.
    """

    pixels: torch.Tensor
    source: str
    files: tuple[tuple[int, str], ...] = ()

    @property
    def fingerprint(self) -> str:
        """sha256 of the pixels."""
        return hashlib.sha256(self.pixels.numpy()).hexdigest()

    def to_dict(self) -> dict:
        """What a card says of it."""
        found = {"source": self.source, "images": len(self.pixels), "fingerprint": self.fingerprint}
        return found | {"files": [list(file) for file in self.files]}


def calibration_for(model: Model, given: "Sequence[Sample] | torch.Tensor | Path | str | None" = None) -> Calibration:
    """Up to 256 images for ``model``, spread evenly over what is given.

    Args:
        model: whose crop they get.
        given: a data set, its path (a val set's, or a train set's with no val set beside it), a plain tar of JPEGs, or
            pixels, uint8[N, 3, H, W]. None takes the bundled ones for vit_shapes20, random pixels for random weights.

    Raises:
        VitdemoError: when there are none, or none that fit.
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
        return _from_files(_jpegs_at(user_path(given)), str(given), info.preprocessing)
    return _from_files(_spread(given), str(getattr(given, "path", "a data set")), info.preprocessing)


def _from_files(jpegs: Iterator[bytes], source: str, preprocessing: Preprocessing) -> Calibration:
    crops, files = [], []
    for jpeg in jpegs:
        try:
            crops.append(reference_crop(jpeg, preprocessing))
        except UnreadableImage:
            continue  # one less to calibrate on; extract and check-images are there to say which
        files.append((len(jpeg), hashlib.sha256(jpeg).hexdigest()))
    if not crops:
        raise VitdemoError(f"{source}: holds no image that can be read; give other images for the calibration")
    return Calibration(torch.stack(crops), source, tuple(files))


def _jpegs_at(path: Path) -> Iterator[bytes]:
    """The images of a data set, or of a plain tar of JPEGs that has no labels and needs none."""
    if path.is_file() and not path.name.endswith(("_img_val.tar", "_img_train.tar")):
        yield from _jpegs_in(path)
    else:
        with named_errors(path):
            found = [] if path.is_file() else [split for split in FOLDERS if find_tree(path, split) != path]
            split = ImageNetTrain if path.name.endswith("_img_train.tar") or found == ["train"] else ImageNetVal
        yield from _spread(split(path))


def _jpegs_in(tar: Path) -> Iterator[bytes]:
    members = sorted(member for member in index_tar(tar) if member.name.lower().endswith((".jpeg", ".jpg")))
    with named_errors(tar), open(tar, "rb") as file:
        for i in spread(len(members), IMAGES):
            if members[i].size > IMAGE_LIMIT:
                raise VitdemoError(f"{tar}: {members[i].name!r} is larger than {IMAGE_LIMIT >> 20} MiB; take it out")
            file.seek(members[i].offset)
            yield file.read(members[i].size)


def _spread(data: Sequence[Sample]) -> Iterator[bytes]:
    for i in spread(len(data), IMAGES):
        with suppress(UnreadableFile):  # one less to calibrate on
            yield data[i].jpeg
