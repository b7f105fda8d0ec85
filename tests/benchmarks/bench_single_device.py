"""From files to answers on one device: the input path alone, the engine alone, both together, and what users write.

All variants live in one process and take turns in rounds; a ratio is the median of its rounds' ratios, with the
smallest and the largest. The baseline is the loop of every tutorial: timm's model in eager fp32, a DataLoader with two
workers and the default collate, timm's PIL transform. Run it as

    python -m tests.benchmarks.bench_single_device [--photos FOLDER]

where FOLDER has JPEGs, whose decoding is timed; ViT-B/16 runs on them with random weights, so without an accuracy.
"""

import argparse
import io
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import simplejpeg
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize
from tqdm.auto import tqdm

from vitdemo import ImageNetVal, convert, data_path, load_model
from vitdemo.conversion.engines.contract import Engine
from vitdemo.conversion.models import Model
from vitdemo.dataset.imagenet import Sample
from vitdemo.dataset.images import Preprocessing, prefetched_batches
from vitdemo.inference.loop import predict
from vitdemo.inference.random_input import run_random_input
from vitdemo.measure.clock import Phases, cores, describe_machine, machine_record, now
from vitdemo.paths import REPOSITORY

ROUNDS, BATCH, THREADS = 9, 8, 2
BIG = "vit_base_patch16_224.augreg2_in21k_ft_in1k"
PHOTOS = REPOSITORY.parent / "shared" / "photos"

Rates = dict[str, list[float]]  # variant -> images/s, a value a round


class Images(Dataset):
    """A map-style dataset as a user would write it, over samples that are in memory."""

    def __init__(self, samples: list[Sample], preprocessing: Preprocessing):
        self.samples, self.transform = samples, create_transform(**preprocessing.to_dict(), is_training=False)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        sample = self.samples[i]
        return self.transform(Image.open(io.BytesIO(sample.jpeg)).convert("RGB")), sample.label


def input_variants(samples: list[Sample], preprocessing: Preprocessing) -> dict[str, Callable[[], object]]:
    """Each goes through all images once."""
    images = Images(samples, preprocessing)
    height = int(preprocessing.input_size[1] / preprocessing.crop_pct)

    def bare(i: int) -> torch.Tensor:
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(samples[i].jpeg)).permute(2, 0, 1).unsqueeze(0)
        return center_crop(resize(pixels, [height], InterpolationMode.BICUBIC), [height])

    def threads(work: Callable) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(work, range(len(samples))):
                pass

    def batches(input_path: str) -> None:
        options = dict(input_path=input_path, workers=THREADS)
        for _ in prefetched_batches(samples, range(len(samples)), preprocessing, BATCH, **options):
            pass

    def loader() -> None:
        for _ in DataLoader(images, BATCH, num_workers=THREADS):
            pass

    return {
        "fast path": lambda: batches("fast"),
        "reference path": lambda: batches("reference"),
        "bare decode and resize": lambda: threads(bare),
        "timm's PIL transform, threads": lambda: threads(images.__getitem__),
        "timm's PIL transform, DataLoader": loader,
    }


def whole_way(engine: Engine, samples: list[Sample], input_path: str = "fast") -> None:
    options = dict(device_batch_size=BATCH, input_path=input_path, workers=cores(), phases=Phases(), times=[])
    for _ in predict(engine, samples, range(len(samples)), **options):
        pass


def baseline(model: Model, samples: list[Sample]) -> None:
    """What a user would write."""
    correct = 0
    loader = DataLoader(Images(samples, model.info.preprocessing), BATCH, num_workers=2)
    with torch.inference_mode():
        for images, labels in loader:
            correct += (model.module(images).argmax(1) == labels).sum().item()


def take_turns(variants: dict[str, Callable[[], object]], images: int, rounds: int) -> Rates:
    """Images/s; a variant may give its own rate. The round before them warms up and is not kept."""
    rates: Rates = {name: [] for name in variants}
    for number in tqdm(range(rounds + 1), desc="rounds"):
        for name, run in list(variants.items())[:: -1 if number % 2 else 1]:
            start = now()
            own = run()
            rates[name].append(own if isinstance(own, float) else images / (now() - start))
    return {name: values[1:] for name, values in rates.items()}


def ratio(rates: Rates, name: str, other: str) -> list[float]:
    return [ours / theirs for ours, theirs in zip(rates[name], rates[other], strict=True)]


def line(what: str, values: list[float], target: float | None = None) -> str:
    verdict = (
        "" if target is None else f", target {target}: {'met' if statistics.median(values) >= target else 'MISSED'}"
    )
    return f"  {what}: {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}){verdict}"


def table(rates: Rates) -> str:
    return "\n".join(
        f"  {name:34} {statistics.median(values):8.1f} images/s ({min(values):.1f} to {max(values):.1f})"
        for name, values in rates.items()
    )


def input_path(samples: list[Sample], rounds: int) -> str:
    preprocessing = load_model("vit_shapes20").info.preprocessing
    rates = take_turns(input_variants(samples, preprocessing), len(samples), rounds)
    fastest_timm = {
        "timm": [max(pair) for pair in zip(*(v for k, v in rates.items() if k.startswith("timm")), strict=True)]
    }
    return "\n".join(
        [
            f"input path alone, {len(samples)} photographs to 224, {THREADS} threads or workers",
            table(rates),
            line("fast path / timm's better one", ratio(rates | fastest_timm, "fast path", "timm"), 3),
            line("fast path / bare loop", ratio(rates, "fast path", "bare decode and resize"), 0.95),
        ]
    )


def engine_variants(model: Model, samples: list[Sample], engines: list[tuple[str, str]]) -> dict[str, Callable]:
    variants = {}
    for name, precision in engines:
        engine = convert(model, name, precision)
        variants[f"{name} {precision}, files"] = lambda engine=engine: whole_way(engine, samples)
        variants[f"{name} {precision}, random input"] = lambda engine=engine: run_random_input(
            engine, device_batch_size=BATCH, seconds=4
        )["images_per_s"]
    return variants


def small_model(samples: list[Sample], rounds: int) -> str:
    model = load_model("vit_shapes20")
    preprocessing = model.info.preprocessing
    null = convert(model, "null", "none")
    engines = [("openvino", "bf16"), ("openvino", "int8")]
    variants = engine_variants(model, samples, engines)
    variants |= {
        "decoding alone": lambda: input_variants(samples, preprocessing)["fast path"](),
        "null engine, files": lambda: whole_way(null, samples),
        "baseline": lambda: baseline(model, samples),
    }
    rates = take_turns(variants, len(samples), rounds)
    lines = [f"vit_shapes20, {len(samples)} bundled images", table(rates)]
    for name, precision in engines:
        files, alone = f"{name} {precision}, files", f"{name} {precision}, random input"
        bound = {"bound": [1 / (1 / d + 1 / e) for d, e in zip(rates["decoding alone"], rates[alone], strict=True)]}
        lines.append(line(f"{files} / one after the other", ratio(rates | bound, files, "bound"), 0.85))
        lines.append(line(f"{files} / baseline", ratio(rates, files, "baseline"), 3))
    return "\n".join(lines)


def big_model(samples: list[Sample], rounds: int) -> str:
    model = load_model(BIG, "random")
    variants = engine_variants(model, samples, [("openvino", "bf16"), ("openvino", "int8")])
    variants["baseline"] = lambda: baseline(model, samples[: len(samples) // 4])
    rates = take_turns(variants, len(samples), rounds)
    rates["baseline"] = [rate / 4 for rate in rates["baseline"]]  # of a quarter of the images
    int8 = "openvino int8, files"
    return "\n".join(
        [
            f"{BIG}, random weights (accuracy: not measured), {len(samples)} photographs",
            table(rates),
            line("int8, files / random input", ratio(rates, int8, "openvino int8, random input"), 0.94),
            line("int8, files / baseline, mixed precision", ratio(rates, int8, "baseline"), 6),
            line("bf16, files / baseline, mixed precision", ratio(rates, "openvino bf16, files", "baseline"), 3.5),
        ]
    )


def photographs(folder: Path) -> list[Sample]:
    """In memory, as random labels of shapes20: nobody scores them."""
    return [Sample(path.name, path.read_bytes(), "", 0) for path in sorted(folder.glob("*.JPEG"))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--part", choices=("input", "small", "big"), action="append")
    arguments = parser.parse_args()
    parts = arguments.part or ["input", "small", "big"]
    print(describe_machine(machine_record()))
    if "input" in parts:
        print(input_path(photographs(arguments.photos), arguments.rounds))
    if "small" in parts:
        print(small_model(list(ImageNetVal(data_path("shapes20"))), arguments.rounds))
    if "big" in parts:
        print(big_model(photographs(arguments.photos), arguments.rounds))
