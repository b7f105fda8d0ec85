"""The roof: what this machine was measured to reach, a precision, in plain matrix products.

A model's own rate over the roof says how much of the machine it uses. It is measured, not read off a data sheet: the
clock that a processor holds, and the share that other programs take, are in no data sheet.
"""

import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

import numpy as np
import torch
from torch import nn

from vitdemo.conversion.engines.openvino import HINTS, import_silently, macs_by_precision, shared_core
from vitdemo.conversion.models import Model
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.measure.clock import cores, installed_version, machine_record, now
from vitdemo.paths import cache_root, replacing

Shape = tuple[int, int, int]  # m, k, n of an [m, k] matrix by a [k, n] one

SQUARE: tuple[Shape, ...] = tuple((n, n, n) for n in (1024, 2048, 4096))
TORCH_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 3
ROOF_BATCH = 8  # images at once, of which the model's own products are
FINALISTS = 3  # products that take part in the rounds after the first
FILE = "roof.json"
COPIED = 256 << 20  # bytes, more than any cache holds


class AnotherPrecision(Exception):
    """A runtime computes a product in another precision, as this processor lacks the instructions."""


@dataclass(frozen=True)
class Roof:
    """The best that plain matrix products reached.

    flops_per_s: 2 x multiply-accumulates in a second, of integers where precision is int8. shape and runtime: of the
    product that reached it. threads: CPU threads it used. measured: when.
    """

    precision: str
    flops_per_s: float
    shape: Shape
    runtime: str
    threads: int
    measured: str

    def __str__(self) -> str:
        m, k, n = self.shape
        return (
            f"roof: {self.flops_per_s / 1e12:.2f} TFLOP/s in {self.precision}, reached by {self.runtime} with "
            f"[{m}, {k}] x [{k}, {n}] on {self.threads} threads, measured {self.measured}"
        )


def machine_roof(precision: str, shapes: Iterable[Shape] = (), *, fresh: bool = False) -> Roof:
    """The roof of this machine in ``precision``: "fp32", "bf16" or "int8".

    The best of square products and of ``shapes``, such as a model's own (``linear_shapes``), in torch and, where it is
    installed, in OpenVINO; the median call of the best shape, the best of three rounds, the last two of them among the
    three fastest. What was measured is kept in the cache, for this machine, these versions and shapes, until ``fresh``
    asks for it anew. Takes ten seconds or so.
    Raises VitdemoError where nothing here multiplies in that precision.
    """
    shapes = sorted({*SQUARE, *shapes})
    path, key = cache_root() / FILE, _key(precision, shapes)
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {}
        with suppress(FileNotFoundError, ValueError, TypeError, AttributeError):
            kept = {key: Roof(**entry) for key, entry in json.loads(path.read_text(encoding="utf-8")).items()}
        if fresh or key not in kept:
            print(f"measuring what this machine reaches in {precision}, once", file=sys.stderr)
            products = Products(precision, shapes)
            rounds = [products.keep(FINALISTS, seconds=2), *(products.best(seconds=2) for _ in range(ROUNDS - 1))]
            kept[key] = max(rounds, key=lambda roof: roof.flops_per_s)
            with replacing(path) as file:
                json.dump({key: asdict(roof) for key, roof in kept.items()}, file, indent=2)
    return replace(kept[key], shape=tuple(kept[key].shape))


def memory_bandwidth() -> float:
    """Bytes a second that the memory gives to all cores: reading an array and writing another, the best of five."""
    torch.set_num_threads(cores())
    source, target = torch.zeros(COPIED // 4), torch.empty(COPIED // 4)
    return 2 * COPIED / min(_timed(lambda: target.copy_(source), seconds=0.5)[:5])


def _key(precision: str, shapes: list[Shape]) -> str:
    machine = machine_record()
    what = [precision, shapes, machine["cpu"], machine["isa"], machine["cores"], machine["versions"]]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def linear_shapes(model: Model, batch: int) -> list[Shape]:
    """The matrix products of ``model``'s linear layers for ``batch`` images, each once, from input to output."""
    shapes: dict[Shape, None] = {}

    def note(layer: nn.Linear, inputs: tuple[torch.Tensor], _) -> None:
        k = inputs[0].shape[-1]
        shapes[inputs[0].numel() // k, k, layer.out_features] = None

    layers = [part for part in model.module.modules() if isinstance(part, nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.inference_mode():
            model.module(torch.zeros(1, *model.info.preprocessing.input_size))
    finally:
        for hook in hooks:
            hook.remove()
    return [(m * batch, k, n) for m, k, n in shapes]


class Products:
    """Matrix products in ``precision``, ready to be timed, in every runtime that has them here."""

    def __init__(self, precision: str, shapes: Iterable[Shape]):
        self.precision = precision
        self._calls: dict[tuple[str, Shape], Callable[[], object]] = {}
        for shape in shapes:
            if precision in TORCH_TYPES:
                self._calls["torch", shape] = _torch_product(precision, shape)
            if precision in HINTS and installed_version("openvino"):
                with suppress(AnotherPrecision):
                    self._calls["openvino", shape] = _openvino_product(precision, shape)
        if not self._calls:
            raise VitdemoError(
                f"no roof in {precision} here: install openvino, or take one of {', '.join(TORCH_TYPES)}"
            )

    def keep(self, count: int, seconds: float, least: int = 2) -> Roof:
        """As ``best``; from now on only the ``count`` fastest take part."""
        rates = self._rates(seconds, least)
        fastest = sorted(rates, key=rates.get, reverse=True)[:count]
        self._calls = {key: self._calls[key] for key in fastest}
        return self._roof(rates)

    def best(self, seconds: float, least: int = 2) -> Roof:
        """Time each product for an equal part of ``seconds``, ``least`` calls after a cold one; the fastest, by its
        median call."""
        return self._roof(self._rates(seconds, least))

    def _rates(self, seconds: float, least: int) -> dict[tuple[str, Shape], float]:
        torch.set_num_threads(cores())
        rates = {}
        for (runtime, shape), call in self._calls.items():
            median = statistics.median(_timed(call, seconds / len(self._calls), least))
            rates[runtime, shape] = 2 * np.prod(shape, dtype=np.int64).item() / median
        return rates

    def _roof(self, rates: dict[tuple[str, Shape], float]) -> Roof:
        runtime, shape = max(rates, key=rates.get)
        measured = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        return Roof(self.precision, rates[runtime, shape], shape, runtime, cores(), measured)


def _timed(call: Callable[[], object], seconds: float, least: int = 2) -> list[float]:
    call()  # the first one is cold
    taken: list[float] = []
    while len(taken) < least or sum(taken) < seconds:
        start = now()
        call()
        taken.append(now() - start)
    return taken


def _torch_product(precision: str, shape: Shape) -> Callable[[], object]:
    m, k, n = shape
    left, right = (torch.rand(size).to(TORCH_TYPES[precision]) for size in ((m, k), (n, k)))
    out = torch.empty(m, n, dtype=TORCH_TYPES[precision])
    return lambda: torch.mm(left, right.T, out=out)


def _openvino_product(precision: str, shape: Shape) -> Callable[[], object]:
    """An [m, k] matrix by constant [k, n] weights, in and out in ``precision``."""
    m, k, n = shape
    openvino = import_silently("openvino")
    from openvino import opset13 as ops

    kind = {"fp32": "f32", "bf16": "bf16", "int8": "u8"}[precision]
    random = np.random.default_rng(0)
    x = ops.parameter([m, k], getattr(openvino.Type, kind))
    weights = random.integers(-127, 128, (n, k), dtype=np.int8)
    if precision == "int8":  # the form in which quantised graphs come: the numbers, and what one step is worth
        left, right = (ops.multiply(ops.convert(v, "f32"), np.float32(0.01)) for v in (x, ops.constant(weights)))
    else:
        left, right = ops.convert(x, "f32"), ops.constant(weights / np.float32(127))
    y = ops.matmul(left, right, False, True)
    if precision == "int8":
        y = ops.fake_quantize(y, np.float32(0), np.float32(255), np.float32(0), np.float32(255), 256)
    graph = openvino.Model([ops.result(ops.convert(y, kind))], [x])
    options = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": cores(),
    }
    compiled = shared_core().compile_model(graph, "CPU", options)
    request = compiled.create_infer_request()
    bits = request.get_input_tensor().data.view(np.uint8)
    bits[:] = random.integers(60, 64, bits.shape, dtype=np.uint8)  # in every kind a number that is nothing special
    request.infer()
    if set(macs_by_precision(compiled.get_runtime_model())) != {precision}:
        raise AnotherPrecision
    return request.infer
