"""How much of the rate of bare decoding ``check_images`` keeps: the two in turns over the same files and threads.

"Bare" is a ThreadPoolExecutor's map that reads each file and decodes it to RGB pixels, and nothing else: no hash,
header, row or progress, and no word of damage from torchvision. The check computes pixels at an eighth of the size,
which gains it more than all of these cost; how much they cost is the ratio to "the check's own call". Run it as

    python -m tests.benchmarks.bench_checking

``make soak`` holds it to its target.
"""

import shutil
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import simplejpeg
import torch
from torchvision.io import decode_jpeg

from vitdemo import ImageNetVal, data_path
from vitdemo.dataset.checking import check_images
from vitdemo.machine import cores, describe_machine, machine_record, now
from vitdemo.paths import REPOSITORY

TARGET = 0.9
ROUNDS = 9
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
            decode(data[index].jpeg)
        except (RuntimeError, ValueError):
            return True
        return False

    with ThreadPoolExecutor(cores()) as pool:
        return sum(pool.map(failed, range(len(data))))


def measure(data: ImageNetVal, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Images/s of the check and of each bare decoder, by name, one value per round after a first that is not kept."""
    arms = {"check_images": lambda: check_images(data, progress=False)}
    arms |= {f"bare {name}": lambda decode=decode: bare(data, decode) for name, decode in DECODERS.items()}
    rates = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, run in list(arms.items())[:: -1 if number % 2 else 1]:
            start = now()
            run()
            rates[name].append(len(data) / (now() - start))
    return {name: values[1:] for name, values in rates.items()}


def ratios(rates: dict[str, list[float]], name: str) -> list[float]:
    """The check's rate over a bare decoder's, one value per round."""
    return [ours / theirs for ours, theirs in zip(rates["check_images"], rates[f"bare {name}"], strict=True)]


def describe(title: str, rates: dict[str, list[float]]) -> str:
    lines = [f"{title}: {cores()} threads, {len(rates['check_images'])} rounds, median (smallest to largest)"]
    for name, values in rates.items():
        line = f"  {name:27} {statistics.median(values):7,.0f} images/s ({min(values):,.0f} to {max(values):,.0f})"
        if name != "check_images":
            of = ratios(rates, name.removeprefix("bare "))
            line += f"; check / this {statistics.median(of):.2f} ({min(of):.2f} to {max(of):.2f})"
        lines.append(line)
    return "\n".join(lines)


@pytest.mark.soak
@pytest.mark.parametrize("source", ["photographs", "shapes20"])
def test_the_check_keeps_its_share_of_the_rate_of_bare_decoding(source, photos, shapes20, tmp_path):
    data = photograph_tree(photos, tmp_path) if source == "photographs" else shapes20
    rates = measure(data)
    print(describe(source, rates))
    assert statistics.median(ratios(rates, "simplejpeg, RGB")) >= TARGET
    assert statistics.median(ratios(rates, "torchvision, RGB")) >= TARGET


if __name__ == "__main__":
    print(describe_machine(machine_record()))
    print(describe("shapes20", measure(ImageNetVal(data_path("shapes20")))))
    photos = sorted((REPOSITORY.parent / "shared" / "photos").glob("*.JPEG"))
    with tempfile.TemporaryDirectory() as folder:
        print(describe(f"{len(photos)} photographs x {REPEATS}", measure(photograph_tree(photos, Path(folder)))))
