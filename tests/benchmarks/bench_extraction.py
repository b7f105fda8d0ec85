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
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from os import sync
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.dataset.conftest import val_name, write_devkit, write_tar
from vitdemo.dataset.extraction import extract, extract_members
from vitdemo.dataset.imagenet import ImageNetVal
from vitdemo.dataset.tars import Member, md5
from vitdemo.machine import describe_machine, machine_record, now

TARGET = 0.8
ROUNDS = 9
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


def extraction_arms(tar: Path) -> dict[str, Callable[[Path], object]]:
    """What writes the images to a new folder, by name."""
    data = ImageNetVal(tar)
    targets = {
        f"{data.classes[label]}/{file}": Member(file, offset, size)
        for file, offset, size, label in zip(data.files, data.offsets, data.sizes, data.labels, strict=True)
    }

    def tar_xf(folder: Path) -> None:
        folder.mkdir()
        subprocess.run(["tar", "xf", tar, "-C", folder], check=True)

    return {
        "tar xf": tar_xf,
        "write step": lambda folder: extract_members(tar, targets, folder, progress=False),
        "whole verb": lambda folder: extract(tar, folder, unverified=True, progress=False),
    }


def measure_extraction(tar: Path, folder: Path, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Images/s of each arm, one value per round; the round before them is not kept."""
    md5(tar, progress=False)  # into the page cache
    arms, rates = extraction_arms(tar), {}
    for number in range(rounds + 1):
        for name, run in list(arms.items())[:: -1 if number % 2 else 1]:
            out = folder / f"{number} {name}"
            sync()
            start = now()
            run(out)
            rates.setdefault(name, []).append(IMAGES / (now() - start))
        for out in folder.iterdir():  # no arm runs beside the removal of another's files
            shutil.rmtree(out)
    return {name: rates[name][1:] for name in arms}


def measure_checksum(tar: Path, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """MB/s of each arm, one value per round; the round before them is not kept."""
    arms = {
        "md5sum": lambda: subprocess.run(["md5sum", tar], check=True, stdout=subprocess.DEVNULL),
        "md5": lambda: md5(tar, progress=False),
    }
    rates = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, run in arms.items():
            start = now()
            run()
            rates[name].append(tar.stat().st_size / 1e6 / (now() - start))
    return {name: values[1:] for name, values in rates.items()}


def ratios(rates: dict[str, list[float]], name: str) -> list[float]:
    """An arm's rate over that of the first arm, one value per round."""
    return [ours / theirs for ours, theirs in zip(rates[name], next(iter(rates.values())), strict=True)]


def describe(title: str, unit: str, rates: dict[str, list[float]]) -> str:
    first, lines = next(iter(rates)), [f"{title}; {ROUNDS} rounds in turns, median (smallest to largest)"]
    for name, values in rates.items():
        line = f"  {name:10} {statistics.median(values):8,.0f} {unit} ({min(values):,.0f} to {max(values):,.0f})"
        if name != first:
            of = ratios(rates, name)
            line += f"; over {first} {statistics.median(of):.2f} ({min(of):.2f} to {max(of):.2f})"
        lines.append(line)
    return "\n".join(lines)


def file_system(folder: Path) -> str:
    mounts = [mount for mount in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype


def report(folder: Path) -> tuple[dict[str, list[float]], dict[str, list[float]], str]:
    tar = make_archives(folder / "archives")
    (folder / "out").mkdir()
    extraction, checksum = measure_extraction(tar, folder / "out"), measure_checksum(tar)
    sizes = ImageNetVal(tar).sizes
    title = (
        f"{IMAGES:,} JPEGs of {min(sizes):,} to {max(sizes):,} bytes (mean {statistics.mean(sizes):,.0f}) in "
        f"{CLASSES:,} classes to {file_system(folder)}"
    )
    tables = [
        describe(title, "images/s", extraction),
        describe(f"MD5 of {tar.stat().st_size / 1e6:,.0f} MB", "MB/s", checksum),
    ]
    return extraction, checksum, "\n".join([describe_machine(machine_record()), *tables])


@pytest.mark.soak
def test_extraction_and_checksum_keep_their_share_of_the_rate_of_tar_and_md5sum(tmp_path):
    extraction, checksum, text = report(tmp_path)
    print(f"\n{text}")
    assert statistics.median(ratios(extraction, "write step")) >= TARGET
    assert statistics.median(ratios(checksum, "md5")) >= TARGET


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as scratch:
        print(report(Path(scratch))[2])
