"""How much of the rate of bare decoding ``check_images`` keeps: the two in turns over the same files and threads.

"Bare" is a ThreadPoolExecutor's map that reads each file and decodes it to RGB pixels, and nothing else: no hash,
header, row or progress, and no word of damage from torchvision. The check computes pixels at an eighth of the size,
which gains it more than all of these cost; how much they cost is the ratio to "the check's own call". Run it as

    python -m tests.benchmarks.bench_checking

``make soak`` holds it to its target.
"""

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import simplejpeg
import torch
from torchvision.io import decode_jpeg

from tests.benchmarks.turns import Part, ratio, take_turns
from vitdemo import ImageNetVal, data_path
from vitdemo.dataset.checking import check_images
from vitdemo.machine import cores, describe_machine, machine_record
from vitdemo.paths import REPOSITORY

TARGETS = {"bare simplejpeg, RGB": 0.9, "bare torchvision, RGB": 0.9}
REPEATS = 5  # of the 200 photographs

DECODERS: dict[str, Callable[[bytes], object]] = {
    "simplejpeg, RGB": simplejpeg.decode_jpeg,
    "torchvision, RGB": lambda jpeg: decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)),
    "the check's own call": lambda jpeg: simplejpeg.decode_jpeg(jpeg, "GRAY", min_height=1, min_width=1),
}


def photograph_tree(photos: list[Path], folder: Path) -> ImageNetVal:
    """The photographs, whose names begin with their wnid, REPEATS times as ``val/<wnid>/``."""
    for photo in photos:
        target = folder / "val" / photo.name.split("_")[0]
        target.mkdir(parents=True, exist_ok=True)
        for copy in range(REPEATS):
            shutil.copyfile(photo, target / f"{copy}_{photo.name}")
    return ImageNetVal(folder)


def bare(data: ImageNetVal, decode: Callable[[bytes], object]) -> int:
    """Read and decode everything; returns how many files could not be decoded."""

    def failed(index: int) -> bool:
        try:
            decode(data[index].image)
        except (RuntimeError, ValueError):
            return True
        return False

    with ThreadPoolExecutor(cores()) as pool:
        return sum(pool.map(failed, range(len(data))))


def measure(title: str, data: ImageNetVal) -> Part:
    """The check and each bare decoder, in turns."""
    variants = {f"bare {name}": lambda decode=decode: bare(data, decode) for name, decode in DECODERS.items()}
    found = take_turns({"check_images": lambda: check_images(data, progress=False)} | variants, len(data))
    lines = [(f"check_images / {name}", ratio(found, "check_images", name), TARGETS.get(name)) for name in variants]
    return Part(f"{title}, {cores()} threads", found, lines)


@pytest.mark.soak
@pytest.mark.parametrize("source", ["photographs", "shapes20"])
def test_the_check_keeps_its_share_of_the_rate_of_bare_decoding(source, photos, shapes20, tmp_path):
    data = photograph_tree(photos, tmp_path) if source == "photographs" else shapes20
    part = measure(source, data)
    print(part)
    assert not part.missed


if __name__ == "__main__":
    print(describe_machine(machine_record()))
    print(measure("shapes20", ImageNetVal(data_path("shapes20"))))
    photos = sorted((REPOSITORY.parent / "shared" / "photos").glob("*.JPEG"))
    with tempfile.TemporaryDirectory() as folder:
        print(measure(f"{len(photos)} photographs x {REPEATS}", photograph_tree(photos, Path(folder))))
