"""How fast archives are extracted and checked, beside what everyone has: ``tar xf`` and ``md5sum``, in turns.

50,000 small JPEGs of 1,000 classes lie in one flat tar, which is read once before, so that it is in the page cache for
all. ``tar xf`` writes them to one folder; the write step writes them to one folder per class under their final names;
the whole verb also reads devkit and index, computes both MD5s, and reads the finished tree back to check it. Nobody
waits for the disk: what is dirty is written out between the arms, off the clock. Run it as

    python -m tests.benchmarks.bench_extraction [FOLDER]

for the disk that FOLDER lies on; ``make soak`` holds it to its targets.
"""

import io
import random
import shutil
import subprocess
import sys
import tempfile
from os import sync
from pathlib import Path
from statistics import mean

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.benchmarks.turns import Part, ratio, take_turns
from tests.dataset.conftest import val_name, write_devkit, write_tar
from vitdemo.dataset.dataset import ImageNetVal
from vitdemo.dataset.extraction import extract, extract_members
from vitdemo.dataset.tars import Member, md5
from vitdemo.machine import describe_machine, machine_record

TARGET = 0.8
IMAGES, CLASSES = 50_000, 1_000


def small_jpeg(rng: np.random.Generator) -> bytes:
    """A picture of 64 to 128 pixels a side: soft colours under noise."""
    side = int(rng.integers(64, 129))
    colours = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(colours) + rng.normal(0, 12, (side, side, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def make_archives(folder: Path, images: int = IMAGES) -> Path:
    """A val tar with its devkit; returns the tar."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    jpegs = [small_jpeg(rng) for _ in range(97)]
    truth = [1 + i % CLASSES for i in range(images)]
    random.Random(0).shuffle(truth)
    write_devkit(folder / "bench_devkit_t12.tar.gz", {f"n{90_000_000 + i}": 1 + i for i in range(CLASSES)}, truth)
    return write_tar(folder / "bench_img_val.tar", {val_name(1 + i): jpegs[i % 97] for i in range(images)})


def extraction(tar: Path, folder: Path) -> Part:
    """What writes the images to a new folder, in turns."""
    data = ImageNetVal(tar)
    targets = {
        f"{data.classes[label]}/{file}": Member(file, offset, size)
        for file, offset, size, label in zip(data.files, data.offsets, data.sizes, data.labels, strict=True)
    }

    def clear() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        sync()

    def tar_xf() -> None:
        folder.mkdir()
        subprocess.run(["tar", "xf", tar, "-C", folder], check=True)

    variants = {
        "tar xf": tar_xf,
        "write step": lambda: extract_members(tar, targets, folder, progress=False),
        "whole verb": lambda: extract(tar, folder, unverified=True, progress=False),
    }
    found = take_turns(variants, IMAGES, before=clear)
    title = (
        f"{IMAGES:,} JPEGs of {min(data.sizes):,} to {max(data.sizes):,} bytes (mean {mean(data.sizes):,.0f}) in "
        f"{CLASSES:,} classes to {file_system(folder.parent)}"
    )
    targets = {"write step": TARGET, "whole verb": None}
    lines = [(f"{name} / tar xf", ratio(found, name, "tar xf"), target) for name, target in targets.items()]
    return Part(title, found, lines)


def checksum(tar: Path) -> Part:
    size = tar.stat().st_size / 1e6
    variants = {
        "md5sum": lambda: subprocess.run(["md5sum", tar], check=True, stdout=subprocess.DEVNULL),
        "md5": lambda: md5(tar, progress=False),
    }
    found = take_turns(variants, size)
    return Part(f"MD5 of {size:,.0f} MB", found, [("md5 / md5sum", ratio(found, "md5", "md5sum"), TARGET)], "MB/s")


def file_system(folder: Path) -> str:
    mounts = [mount for mount in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype


def measure(folder: Path) -> list[Part]:
    tar = make_archives(folder / "archives")
    md5(tar, progress=False)  # into the page cache
    return [extraction(tar, folder / "out"), checksum(tar)]


@pytest.mark.soak
def test_extraction_and_checksum_keep_their_share_of_the_rate_of_tar_and_md5sum(tmp_path):
    parts = measure(tmp_path)
    print("", *parts, sep="\n")
    assert not [what for part in parts for what in part.missed]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as scratch:
        print(describe_machine(machine_record()), *measure(Path(scratch)), sep="\n")
