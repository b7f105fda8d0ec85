"""From files to answers on one device: the input path alone, the engine alone, both together, and what users write.

All variants live in one process and take turns in rounds; a ratio is the median of its rounds' ratios, with the
smallest and the largest. The baseline is the loop of every tutorial: timm's model in eager fp32, a DataLoader with two
workers and the default collate, timm's PIL transform. Run it as

    python -m tests.benchmarks.bench_single_device --out FILE.csv [--photos FOLDER]

where FOLDER has JPEGs, whose decoding is timed; ViT-B/16 runs on them with random weights, so without an accuracy. The
last part is memory, not time: the null engine over a tar of 1,000 and of 50,000 images, each in a process of its own.
"""

import argparse
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import pandas as pd
import pytest
import simplejpeg
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize

from data.results.record import shown
from tests.benchmarks.bench_extraction import make_archives
from tests.benchmarks.turns import ROUNDS, Part, Turns, Variant, ratio, take_turns, write_results
from tests.native import is_native
from vitdemo import ImageNetVal, Model, convert, data_path, evaluate, load_model
from vitdemo.benchmarking.gate import WORSE_BY
from vitdemo.dataset.batches import prefetched_batches
from vitdemo.dataset.decoding import Preprocessing
from vitdemo.dataset.samples import Sample
from vitdemo.engines.contract import Engine
from vitdemo.inference.loop import predict
from vitdemo.inference.random_input import run_random_input
from vitdemo.inference.streams import quicker_on_images
from vitdemo.machine import Phases, describe_machine, machine_record, now
from vitdemo.paths import REPOSITORY

BATCH, THREADS = 8, 2
BIG = "vit_base_patch16_224.augreg2_in21k_ft_in1k"
FEWER_BITS = [("openvino", each) for each in ("bf16", "int8") if is_native("openvino", each)]
PHOTOS = REPOSITORY.parent / "shared" / "photos"


class Images(Dataset):
    """A map-style dataset as a user would write it, over samples that are in memory."""

    def __init__(self, samples: list[Sample], preprocessing: Preprocessing):
        self.samples, self.transform = samples, create_transform(**asdict(preprocessing), is_training=False)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        sample = self.samples[i]
        return self.transform(Image.open(io.BytesIO(sample.image)).convert("RGB")), sample.label


def input_variants(samples: list[Sample], preprocessing: Preprocessing) -> dict[str, Callable[[], object]]:
    """Each goes through all images once."""
    images = Images(samples, preprocessing)
    height = int(preprocessing.input_size[1] / preprocessing.crop_pct)

    def bare(i: int) -> torch.Tensor:
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(samples[i].image)).permute(2, 0, 1).unsqueeze(0)
        return center_crop(resize(pixels, [height], InterpolationMode.BICUBIC), [height])

    def threads(work: Callable) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(work, range(len(samples))):
                pass

    def batches(input_path: str) -> None:
        for _ in prefetched_batches(samples, range(len(samples)), preprocessing, BATCH, input_path=input_path):
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


def whole_way(engine: Engine, samples: list[Sample], input_path: str = "fast") -> int:
    """From files to rows, in the form that ``evaluate`` takes; how many are right."""
    options = dict(device_batch_size=BATCH, input_path=input_path)
    form, _ = quicker_on_images(engine, samples, 50_000, **options)  # as for all of ImageNet; in the warm-up round
    rows = predict(form, samples, range(len(samples)), **options, phases=Phases(), times=[])
    return sum(row.correct for batch in rows for row in batch)


def baseline(model: Model, samples: list[Sample]) -> int:
    """What a user would write; how many are right."""
    correct = 0
    loader = DataLoader(Images(samples, model.info.preprocessing), BATCH, num_workers=2)
    with torch.inference_mode():
        for images, labels in loader:
            correct += (model.module(images).argmax(1) == labels).sum().item()
    return correct


def input_path(samples: list[Sample], rounds: int) -> Part:
    preprocessing = load_model("vit_shapes20").info.preprocessing
    found = take_turns(input_variants(samples, preprocessing), len(samples), rounds)
    timms = [turns.rates for name, turns in found.items() if name.startswith("timm")]
    found_with_best = found | {"timm": Turns([max(rates) for rates in zip(*timms, strict=True)])}
    lines = [("fast path / timm's better one", ratio(found_with_best, "fast path", "timm"), 3)]
    lines += [("fast path / bare loop", ratio(found, "fast path", "bare decode and resize"), 0.95)]
    title = f"input path alone, {len(samples)} photographs to 224 x 224, {THREADS} threads or workers"
    return Part(title, found, lines)


def engine_variants(model: Model, samples: list[Sample], engines: list[tuple[str, str]]) -> dict[str, Variant]:
    """For each engine: from files, and on random input with as many batches in flight as it takes."""
    variants = {}
    for name, precision in engines:
        engine = convert(model, name, precision)
        variants[f"{name} {precision}, files"] = partial(whole_way, engine, samples)
        variants[f"{name} {precision}, random input"] = partial(random_input, engine)
    return variants


def random_input(engine: Engine) -> float:
    """Images/s."""
    return run_random_input(engine, device_batch_size=BATCH, seconds=4)["images_per_s"]


def small_model(samples: list[Sample], rounds: int) -> Part:
    model = load_model("vit_shapes20")
    preprocessing = model.info.preprocessing
    null = convert(model, "null", "none")
    variants = engine_variants(model, samples, FEWER_BITS)
    variants["decoding alone"] = input_variants(samples, preprocessing)["fast path"]
    variants["null engine, files: the harness alone"] = lambda: rate_of(partial(whole_way, null), samples)
    variants["baseline"] = lambda: baseline(model, samples)
    found = take_turns(variants, len(samples), rounds, scored=True)
    lines = []
    for name in map(" ".join, FEWER_BITS):
        files, alone = f"{name}, files", f"{name}, random input"
        decoding = found["decoding alone"].rates
        bound = Turns([1 / (1 / d + 1 / e) for d, e in zip(decoding, found[alone].rates, strict=True)])
        lines.append((f"{files} / decoding, then computing", ratio(found | {"bound": bound}, files, "bound"), 0.85))
        lines.append((f"{files} / baseline, mixed precision", ratio(found, files, "baseline"), 3))
    return Part(f"vit_shapes20, {len(samples)} bundled images", found, lines)


def rate_of(run: Callable[[list[Sample]], object], samples: list[Sample]) -> float:
    """Images/s; what it answers is nobody's."""
    start = now()
    run(samples)
    return len(samples) / (now() - start)


def big_model(samples: list[Sample], rounds: int) -> Part:
    model = load_model(BIG, "random")
    variants = engine_variants(model, samples, FEWER_BITS)
    user, targets = "baseline, a quarter of the images", {"int8": 6, "bf16": 3.5}
    variants[user] = lambda: rate_of(partial(baseline, model), samples[: len(samples) // 4])
    found = take_turns(variants, len(samples), rounds)
    mixed = [
        (f"{name}, files / baseline, mixed precision", ratio(found, f"{name}, files", user), targets[name.split()[1]])
        for name in map(" ".join, FEWER_BITS)
    ]
    alone = ratio(found, "openvino int8, files", "openvino int8, random input")
    lines = [("openvino int8, files / random input", alone, 0.94), *mixed]
    return Part(f"{BIG}, random weights (accuracy: not measured), {len(samples)} photographs", found, lines)


SIZES = (1_000, 50_000)


def peak_memory(tar: Path) -> int:
    """Bytes: this process's peak after the null engine went over ``tar``."""
    data = ImageNetVal(tar)
    preprocessing = load_model("vit_shapes20").info.preprocessing
    pooled = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    module = pooled.append(torch.nn.Linear(3, len(data.classes)))
    model = Model.from_module(module, preprocessing, name="nothing", classes=data.classes)
    run = evaluate(convert(model, "null", "none"), data, out=tar.parent / "run", progress=False)
    assert run.metrics["images"] == len(data)
    return run.metrics["peak_memory_bytes"]


def memory() -> dict[int, int]:
    """Peak bytes by the number of tar members."""
    code = "import sys; from pathlib import Path; from tests.benchmarks.bench_single_device import peak_memory\n"
    code += "print(peak_memory(Path(sys.argv[1])))"
    found = {}
    for images in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            tar = make_archives(Path(folder) / "archives", images)
            done = subprocess.run([sys.executable, "-c", code, tar], capture_output=True, text=True, check=True)
            found[images] = int(done.stdout.split()[-1])
    return found


def describe_memory(peaks: dict[int, int]) -> str:
    few, many = (peaks[images] / 2**20 for images in SIZES)
    return f"peak memory: {few:.0f} MiB for {SIZES[0]:,} images, {many:.0f} MiB for {SIZES[1]:,}: {many / few:.3f}"


def photographs(folder: Path) -> list[Sample]:
    """In memory, all of label 0: nobody scores them."""
    return [Sample(path.name, path.read_bytes(), "", 0) for path in sorted(folder.glob("*.JPEG"))]


@pytest.mark.soak
def test_memory_does_not_grow_with_the_data_set():
    peaks = memory()
    print(describe_memory(peaks))
    assert peaks[SIZES[1]] <= 1.05 * peaks[SIZES[0]]


@pytest.mark.soak
def test_the_fast_path_against_timms_and_a_bare_loop(photos):
    part = input_path(photographs(photos[0].parent), ROUNDS)
    print(part)
    # The target of 3 was missed wherever this ran: decoding alone takes 30 to 40 % of the time of PIL's whole way, so
    # that a resize in no time would give 2.5 to 3.5. What must not get lost is the recorded ratio.
    recorded = pd.read_csv(data_path(f"results/{shown()}/single_device.csv")).set_index("what")["median"]
    for what, ratios, _ in part.lines:
        assert median(ratios) >= (1 - WORSE_BY) * recorded[what], what


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    measures = {
        "input": lambda: input_path(photographs(arguments.photos), arguments.rounds),
        "small": lambda: small_model(list(ImageNetVal(data_path("shapes20"))), arguments.rounds),
        "big": lambda: big_model(photographs(arguments.photos), arguments.rounds),
    }
    parser.add_argument("--part", choices=(*measures, "memory"), action="append")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    wanted, parts = arguments.part or [*measures, "memory"], []
    print(describe_machine(machine_record()))
    for name in wanted:
        if name in measures:
            parts.append(measures[name]())
            print(parts[-1], flush=True)
            # after each part, as all of them take half an hour
            write_results(pd.DataFrame([row for part in parts for row in part.rows()]), arguments.out)
    if "memory" in wanted:
        print(describe_memory(memory()))
