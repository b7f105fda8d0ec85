"""Small archives in the ILSVRC2012 format, made on the spot."""

import io
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

FIELDS = "ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images".split()
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def tiny_jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue() + bytes(seed % 7)  # sizes differ, as a swapped file must be seen


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def meta_mat(ids: dict[str, int]) -> bytes:
    """A ``meta.mat`` with the wnids of ``ids`` as leaves, and two ancestors that have none of the leaves' IDs."""
    leaves = [(id, wnid, f"{wnid} word, {wnid} synonym", "a gloss", 0, [], 0, 1300) for wnid, id in ids.items()]
    leaves.sort()
    top = len(leaves) + 1
    ancestors = [(top + i, f"n0000000{i}", "ancestor", "a gloss", 2, [1, 2], 1 + i, 0) for i in range(2)]
    synsets = np.array(leaves + ancestors, dtype=[(field, object) for field in FIELDS]).reshape(-1, 1)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets}, do_compression=True)
    return buffer.getvalue()


def write_devkit(path: Path, ids: dict[str, int], truth: list[int], **replaced: bytes | None) -> Path:
    """A devkit with IDs by wnid; ``replaced`` gives other bytes for a file in ``data/``, or None to leave it out."""
    lines = "".join(f"{id}\n" for id in truth).encode()
    files = {
        "ILSVRC2012_devkit_t12/readme.txt": b"made by a test",
        "ILSVRC2012_devkit_t12/data/meta.mat": replaced.get("meta_mat", meta_mat(ids)),
        f"ILSVRC2012_devkit_t12/data/{GROUND_TRUTH}": replaced.get("ground_truth", lines),
    }
    return write_tar(path, {name: content for name, content in files.items() if content is not None}, "w:gz")


class Archives:
    """A val tar of 12 images with its devkit: 4 invented classes, whose IDs run against their lexicographic order."""

    ids = {"n90000001": 4, "n90000002": 2, "n90000003": 3, "n90000004": 1}
    truth = [3, 1, 4, 1, 2, 2, 3, 4, 1, 2, 3, 4]
    labels = [2, 3, 0, 3, 1, 1, 2, 0, 3, 1, 2, 0]

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder = folder
        self.images = {val_name(i): tiny_jpeg(i) for i in range(1, 13)}
        self.tar = write_tar(folder / "mini_img_val.tar", self.images)
        self.devkit = write_devkit(folder / "mini_devkit_t12.tar.gz", self.ids, self.truth)


@pytest.fixture
def archives(tmp_path) -> Archives:
    return Archives(tmp_path / "archives")


class FullArchives:
    """ImageNet's names and 1,000 wnids, with the known IDs in their places and the known first truths."""

    first_truths = [490, 361, 171, 822, 297, 482, 13, 704, 599, 164]
    known_ids = {"n02119789": 1, "n01751748": 490}

    def __init__(self, folder: Path, images_per_class: int):
        from timm.data import ImageNetInfo

        self.folder = folder
        self.wnids = ImageNetInfo("imagenet-1k").label_names()
        shuffle = random.Random(0).shuffle
        others = [id for id in range(1, 1001) if id not in self.known_ids.values()]
        shuffle(others)
        self.ids = {wnid: self.known_ids.get(wnid) or others.pop() for wnid in self.wnids}
        truth = [id for id in self.ids.values() for _ in range(images_per_class)]
        for id in self.first_truths:
            truth.remove(id)
        shuffle(truth)
        self.truth = self.first_truths + truth
        self.tar = folder / "ILSVRC2012_img_val.tar"
        self.devkit = write_devkit(folder / "ILSVRC2012_devkit_t12.tar.gz", self.ids, self.truth)
        images = [tiny_jpeg(i) for i in range(7)]
        with open(self.tar, "wb") as file:  # tarfile's way of adding files would take several times as long
            for i in range(1, len(self.truth) + 1):
                info, image = tarfile.TarInfo(val_name(i)), images[i % 7]
                info.size = len(image)
                file.write(info.tobuf(tarfile.USTAR_FORMAT) + image + bytes(-len(image) % 512))
            file.write(bytes(1024))


@pytest.fixture(scope="session")
def full_archives(tmp_path_factory) -> FullArchives:
    return FullArchives(tmp_path_factory.mktemp("full"), images_per_class=50)


@pytest.fixture(scope="session")
def thin_archives(tmp_path_factory) -> FullArchives:
    """All classes, a fifth of the images: enough where every file is written or read."""
    return FullArchives(tmp_path_factory.mktemp("thin"), images_per_class=10)
