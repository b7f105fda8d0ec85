"""The roof: the measured peak throughput of plain matrix products on this machine, for each precision.

A model's own throughput divided by the roof is the share of the machine that it uses. The roof is measured because a
data sheet gives neither the clock rate that the processor sustains nor the share that other programs take.
"""

import hashlib
import json
import math
import os
import statistics
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

import torch
from torch import nn

from vitdemo.engines.contract import Engine, find_engines, precisions_here
from vitdemo.engines.graph import watched
from vitdemo.errors import VitdemoError
from vitdemo.machine import cores, machine_record, message_stream, seconds_of
from vitdemo.models.model import Model
from vitdemo.paths import cache_root, replacing
from vitdemo.precisions import MASKS, NATIVE, Call, Shape, torch_product

SQUARE: tuple[Shape, ...] = tuple((n, n, n) for n in (1024, 2048, 4096))
SQUARE_ON_GPU: Shape = (8192, 8192, 8192)
ROUNDS = 3
ROOF_BATCH = 8  # the batch size for the shapes of the model's own products
FASTEST = 3  # the number of products that take part in the rounds after the first
FILE = "roof.json"
COPIED = 256 << 20  # bytes, more than any CPU cache holds
LONGEST_S = 1.0  # a product that takes longer is left out to save time; smaller ones reach the same throughput


@dataclass(frozen=True)
class Roof:
    """The highest throughput that plain matrix products reached.

    flops_per_s: 2 x multiply-accumulates per second, integer ones where the precision is int8. shape, runtime: the
    shape of the product that reached it, and the name of the engine that computed it. threads: of the CPU, 0 on a GPU.
    measured: the time of the measurement.
    """

    precision: str
    flops_per_s: float
    shape: Shape
    runtime: str
    threads: int
    measured: str

    def __str__(self) -> str:
        (m, k, n), where = self.shape, f"{self.threads} threads" if self.threads else "the GPU"
        what = f"{self.flops_per_s / 1e12:.2f} TFLOP/s in {self.precision}, reached by {self.runtime}"
        return f"roof: {what} with [{m}, {k}] x [{k}, {n}] on {where}, measured {self.measured}"


def machine_roof(precision: str, shapes: Iterable[Shape] = (), *, device: str = "cpu", reached: float = 0) -> Roof:
    """The roof of this machine in a precision, from the cache or measured now, which usually takes 10 to 20 seconds.

    It times square products and products of ``shapes`` in every engine that has plain products and the precision
    natively. In each of three rounds the throughput of a product is that of its median call, and the best product
    counts; the last two rounds time only the three fastest. The roof is the best round. A product that takes more than
    a second is left out, and so are all larger ones.

    Args:
        precision: "fp32", "bf16" or "int8"; on CUDA also "fp16".
        shapes: the shapes of further products, such as a model's own (``linear_shapes``).
        device: "cpu", or "cuda" (*not run*), where only torch's products are timed, by the GPU's events.
        reached: a throughput in operations per second. If the roof in the cache is more than a tenth below it, the
            machine was busy when that roof was measured, and it is measured again. Infinity always measures.

    Raises:
        VitdemoError: where no runtime here multiplies natively in that precision.
    """
    shapes = sorted({*SQUARE, *shapes})
    path, key = cache_root() / FILE, _key(precision, shapes, device)
    kept = {}
    with suppress(OSError, ValueError, TypeError, AttributeError):
        kept = {key: Roof(**entry) for key, entry in json.loads(path.read_text(encoding="utf-8")).items()}
    if key not in kept or kept[key].flops_per_s < 0.9 * reached:
        products = Products(precision, shapes, device)
        again = "again, as the one in the cache is too low" if key in kept else "once"
        print(f"measuring this machine's roof in {precision}, {again}", file=message_stream())
        rounds = [products.best(seconds=2, least=1, keep=FASTEST)]
        rounds += [products.best(seconds=2) for _ in range(ROUNDS - 1)]
        rounds += [kept[key]] if key in kept and reached < math.inf else []
        kept[key] = max(rounds, key=lambda roof: roof.flops_per_s)
        with suppress(OSError):  # if the cache cannot be written, the next call measures again
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                json.dump({key: asdict(roof) for key, roof in kept.items()}, file, indent=2)
    return replace(kept[key], shape=tuple(kept[key].shape))


def memory_bandwidth(device: str = "cpu") -> float:
    """The memory bandwidth in bytes per second, for copying one array to another; the best of five.

    With all cores, or of the GPU's own memory where ``device`` is "cuda" (*not run*).
    """
    torch.set_num_threads(cores())
    source, target = (torch.zeros(COPIED // 4, device=device) for _ in range(2))
    return 2 * COPIED / min(_timed(lambda: target.copy_(source), seconds=0.5, device=device)[:5])


def _key(precision: str, shapes: list[Shape], device: str) -> str:
    machine = machine_record()
    what = [precision, shapes, machine["cpu"], machine["isa"], machine["cores"], machine["versions"]]
    what += [machine["precisions"], [os.environ.get(name) for name in MASKS]]
    what += [machine["gpu"]] if device == "cuda" else []
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def linear_shapes(model: Model, batch: int) -> list[Shape]:
    """The shapes of the products in ``model``'s linear layers for ``batch`` images, each once, from input to output."""
    shapes: dict[Shape, None] = {}

    def note(_, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        k = inputs[0].shape[-1]
        shapes[inputs[0].numel() // k, k, output.shape[-1]] = None

    layers = [name for name, part in model.module.named_modules() if isinstance(part, nn.Linear)]
    with torch.inference_mode(), watched(model.module, layers, note):
        model.module(torch.zeros(1, *model.info.preprocessing.input_size))
    return [(m * batch, k, n) for m, k, n in shapes]


class Products:
    """Matrix products in ``precision``, ready to be timed, in every runtime that has it natively on ``device``."""

    def __init__(self, precision: str, shapes: Iterable[Shape], device: str = "cpu"):
        self.precision, self._device = precision, device
        self._calls: dict[tuple[str, Shape], Call] = {}
        if device == "cuda":
            calls = {shape: torch_product(precision, shape, 1, device) for shape in {*shapes, SQUARE_ON_GPU}}
            self._calls = {("eager", shape): call for shape, call in calls.items() if call}
        for name, support in () if device == "cuda" else precisions_here("cpu").items():
            if support.get(precision) == NATIVE:
                self._calls |= _quick_products(find_engines()[name], precision, shapes)
        if not self._calls:
            raise VitdemoError(f"no roof in {precision} here: nothing installed has it natively; see vitdemo doctor")

    def best(self, seconds: float, least: int = 2, keep: int | None = None) -> Roof:
        """Time each product, and return the Roof of the fastest by its median call.

        Each product gets an equal part of ``seconds``, and at least ``least`` calls after a cold one. Later calls time
        only the ``keep`` fastest products.
        """
        rates = {}
        for (runtime, shape), call in self._calls.items():
            median = statistics.median(_timed(call, seconds / len(self._calls), least, self._device))
            rates[runtime, shape] = 2 * math.prod(shape) / median
        fastest = sorted(rates, key=rates.get, reverse=True)
        self._calls = {key: self._calls[key] for key in fastest[:keep]}
        runtime, shape = fastest[0]
        measured = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        threads = 0 if self._device == "cuda" else cores()
        return Roof(self.precision, rates[runtime, shape], shape, runtime, threads, measured)


def _quick_products(engine: type[Engine], precision: str, shapes: Iterable[Shape]) -> dict[tuple[str, Shape], Call]:
    """The products of ``shapes`` in ascending size, up to the first that takes longer than LONGEST_S.

    The smallest is always included.
    """
    found: dict[tuple[str, Shape], Call] = {}
    for shape in sorted(shapes, key=math.prod):
        if (call := engine.product(precision, shape, cores())) is None:
            break
        if seconds_of(call) > LONGEST_S and found:
            break
        found[engine.name, shape] = call
    return found


def _timed(call: Call, seconds: float, least: int = 2, device: str = "cpu") -> list[float]:
    """The seconds of each call, after a cold call that does not count."""
    time_one = _gpu_seconds if device == "cuda" else seconds_of
    time_one(call)
    taken, total = [], 0.0
    while len(taken) < least or total < seconds:
        taken.append(time_one(call))
        total += taken[-1]
    return taken


def _gpu_seconds(call: Call) -> float:
    """The seconds, by the GPU's own clock, from the beginning to the end of the work that ``call`` queues."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
