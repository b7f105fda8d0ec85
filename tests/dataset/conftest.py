"""Small archives in the ILSVRC2012 format, made on the spot."""

import gzip
import hashlib
import io
import os
import random
import resource
import shutil
import struct
import sys
import tarfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from vitdemo import ImageNetVal, VitdemoError, extract
from vitdemo.dataset.dataset import open_data

FIELDS = "ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images".split()
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = "chmod chown link mkdir remove rename rmdir symlink truncate utime".split()
_watchers: list[set] = []


def _audit(event: str, args: tuple) -> None:
    if _watchers and event == "open" and isinstance(args[2], int) and args[2] & WRITING:
        _watchers[-1].add(args[0])
    elif _watchers and event.partition(".")[0] == "os" and event.partition(".")[2] in CHANGES:
        _watchers[-1].update(path for path in args if isinstance(path, str | bytes | Path))


sys.addaudithook(_audit)


@contextmanager
def watched_writes():
    """The paths that Python opens for writing or changes in any way within the block, wherever they are."""
    _watchers.append(set())
    try:
        yield _watchers[-1]
    finally:
        _watchers.pop()


@contextmanager
def refused(*parts):
    """One line that has all the parts."""
    with pytest.raises(VitdemoError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and all(str(part) in message for part in parts), message


@contextmanager
def as_nobody():
    """Work as a user without rights, where the tests run as root, whom no permission stops."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def largest_file(size: int):
    """No file may grow over ``size`` bytes, as where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def md5_of(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def extracted(archives: Path, out: Path, split: str = "val"):
    """The data set that ``extract`` makes of archives whose MD5 nobody knows."""
    return extract(archives, out, split=split, unverified=True, progress=False)


def torchvisions_imagenet(out: Path, devkit: Path, split: str, monkeypatch):
    """torchvision's own reading of a tree, and of the devkit for its classes."""
    from torchvision.datasets import ImageNet, imagenet

    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", (devkit.name, md5_of(devkit)))
    shutil.copy(devkit, out)
    imagenet.parse_devkit_archive(out)
    return ImageNet(out, split=split)


def mutated(data: bytes, rng: random.Random, block: int = 1) -> bytes:
    """The bytes after one to four accidents, at multiples of ``block`` and about as long, many of them at the start."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(rng.choice((700, len(data) + 1))) % (len(data) + 1) // block * block
        end = at + max(block, rng.choice((1, 2, 16, 200)))
        match rng.choice(("bit", "noise", "zeros", "lost", "inserted", "truncated")):
            case "bit":
                data[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1])
            case "noise":
                data[at:end] = rng.randbytes(len(data[at:end]))
            case "zeros":
                data[at:end] = bytes(len(data[at:end]))
            case "lost":
                del data[at:end]
            case "inserted":
                data[at:at] = rng.randbytes(end - at)
            case "truncated":
                del data[max(at, 10) :]
    return bytes(data)


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def tiny_jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue() + bytes(seed % 7)  # sizes differ, as a swapped file must be seen


def enormous_jpeg(side: int = 20_000) -> bytes:
    """A valid grey JPEG of ``side`` x ``side`` pixels in 1.6 MB, made without its pixels: 400 MB, 1.2 GB as RGB.

    Baseline [ITU-T T.81], with Huffman tables of one code, "0": in a block of 8 x 8 pixels it says once that nothing
    differs from the block before, and once that nothing follows, so that all blocks are zeros, two bits each.
    """

    def segment(marker: int, content: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, 2 + len(content)) + content

    one_code = bytes([1] + [0] * 15) + b"\0"
    return b"".join(
        [
            b"\xff\xd8",
            segment(0xDB, b"\0" + bytes([1] * 64)),  # quantisation
            segment(0xC0, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0"),  # frame
            segment(0xC4, b"\x00" + one_code) + segment(0xC4, b"\x10" + one_code),
            segment(0xDA, b"\1\1\0\0\x3f\0"),  # scan
            bytes(-(-2 * (-(-side // 8)) ** 2 // 8)),
            b"\xff\xd9",
        ]
    )


def many_scans(scans: int) -> bytes:
    """A progressive JPEG of 1000 x 1000 px whose last scan comes again and again."""
    file = io.BytesIO()
    Image.new("L", (1000, 1000), 77).save(file, "JPEG", progressive=True)
    jpeg = file.getvalue()
    scan = jpeg[jpeg.rfind(b"\xff\xc4", 0, jpeg.rfind(b"\xff\xda")) : -2]
    return jpeg[:-2] + scan * scans + b"\xff\xd9"


def tar_member(name: str, content: bytes = b"", format: int = tarfile.USTAR_FORMAT, **fields) -> bytes:
    """A member as it lies in a tar; ``fields`` are TarInfo's."""
    info = tarfile.TarInfo(name)
    for field, value in {"size": len(content), **fields}.items():
        setattr(info, field, value)
    return info.tobuf(format) + content + bytes(-len(content) % 512)


def tar_bytes(files: dict[str, bytes]) -> bytes:
    return b"".join(tar_member(name, content) for name, content in files.items()) + bytes(1024)


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.write_bytes(tar_bytes(files))
    return path


@pytest.fixture
def tar(tmp_path) -> Path:
    return write_tar(tmp_path / "some.tar", {name: name.encode() * 300 for name in ("a.bin", "b.bin", "c.bin")})


def meta_mat(ids: dict[str, int], compress: bool = True) -> bytes:
    """A ``meta.mat`` with the wnids of ``ids`` as leaves, and two ancestors that have none of the leaves' IDs."""
    leaves = [(id, wnid, f"{wnid} word, {wnid} synonym", "a gloss", 0, [], 0, 1300) for wnid, id in ids.items()]
    leaves.sort()
    top = len(leaves) + 1
    ancestors = [(top + i, f"n0000000{i}", "ancestor", "a gloss", 2, [1, 2], 1 + i, 0) for i in range(2)]
    synsets = np.array(leaves + ancestors, dtype=[(field, object) for field in FIELDS]).reshape(-1, 1)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets}, do_compression=compress)
    return buffer.getvalue()


def write_devkit(path: Path, ids: dict[str, int], truth: list[int], **replaced: bytes | None) -> Path:
    """A devkit with IDs by wnid; ``replaced`` gives other bytes for a file in ``data/``, or None to leave it out."""
    lines = "".join(f"{id}\n" for id in truth).encode()
    files = {
        "ILSVRC2012_devkit_t12/readme.txt": b"made by a test",
        "ILSVRC2012_devkit_t12/data/meta.mat": replaced.get("meta_mat", meta_mat(ids)),
        f"ILSVRC2012_devkit_t12/data/{GROUND_TRUTH}": replaced.get("ground_truth", lines),
    }
    path.write_bytes(
        gzip.compress(tar_bytes({name: content for name, content in files.items() if content is not None}))
    )
    return path


class Archives:
    """A val tar of 12 images with its devkit: 4 invented classes, whose IDs run against their lexicographic order."""

    split, read, record = "val", staticmethod(ImageNetVal), "extraction.json"
    ids = {"n90000001": 4, "n90000002": 2, "n90000003": 3, "n90000004": 1}
    truth = [3, 1, 4, 1, 2, 2, 3, 4, 1, 2, 3, 4]
    labels = [2, 3, 0, 3, 1, 1, 2, 0, 3, 1, 2, 0]

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder = folder
        self.images = {val_name(i): tiny_jpeg(i) for i in range(1, 13)}
        self.samples = [(*image, label) for image, label in zip(self.images.items(), self.labels, strict=True)]
        self.tar = write_tar(folder / "mini_img_val.tar", self.images)
        self.devkit = write_devkit(folder / "mini_devkit_t12.tar.gz", self.ids, self.truth)


@pytest.fixture
def archives(tmp_path) -> Archives:
    return Archives(tmp_path / "archives")


class TrainArchives:
    """A train tar of 3 of the classes of ``Archives``, with its devkit: tars in a tar, neither in order."""

    split, read, record = "train", staticmethod(partial(open_data, split="train")), "extraction_train.json"

    def __init__(self, folder: Path):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.images = {
            wnid: {f"{wnid}_{number}.JPEG": tiny_jpeg(first + number) for number in (7, 18, 10026)}
            for first, wnid in enumerate(["n90000003", "n90000001", "n90000004"])
        }
        self.samples = sorted(
            (*image, sorted(Archives.ids).index(wnid))
            for wnid, images in self.images.items()
            for image in images.items()
        )
        self.tar = self.write({wnid: tar_bytes(images) for wnid, images in self.images.items()})
        self.devkit = write_devkit(folder / "mini_devkit_t12.tar.gz", Archives.ids, Archives.truth)

    def write(self, tars: dict[str, bytes]) -> Path:
        """The train tar of these tars by class."""
        return write_tar(self.folder / "mini_img_train.tar", {f"{wnid}.tar": tar for wnid, tar in tars.items()})


@pytest.fixture
def train_archives(tmp_path) -> TrainArchives:
    return TrainArchives(tmp_path / "archives")


@pytest.fixture(params=[Archives, TrainArchives], ids=["val", "train"])
def either(request, tmp_path) -> Archives | TrainArchives:
    return request.param(tmp_path / "archives")


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
        write_tar(self.tar, {val_name(i): images[i % 7] for i in range(1, len(self.truth) + 1)})


@pytest.fixture(scope="session")
def full_archives(tmp_path_factory) -> FullArchives:
    return FullArchives(tmp_path_factory.mktemp("full"), images_per_class=50)


@pytest.fixture(scope="session")
def thin_archives(tmp_path_factory) -> FullArchives:
    """All classes, a fifth of the images: enough where every file is written or read."""
    return FullArchives(tmp_path_factory.mktemp("thin"), images_per_class=10)
