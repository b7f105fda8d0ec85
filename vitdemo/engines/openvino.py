"""OpenVINO, Intel's runtime for CPUs: the exported graph in float32, bfloat16, or int8 with ranges from NNCF."""

import importlib
import json
import logging
import re
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from math import prod
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from tqdm.auto import tqdm

from vitdemo.engines.contract import CompiledEngine
from vitdemo.engines.graph import export_graph, tap_points
from vitdemo.errors import VitdemoError
from vitdemo.machine import installed_version
from vitdemo.models.model import Model, ModelInfo
from vitdemo.precisions import NATIVE, PRECISION_OF, Call, Shape, adds_products_exactly, shares_that_ran, support_of

GRAPH, TAPS = "model.xml", "taps.json"  # the runtime keeps the weights in model.bin, next to the graph


def product(precision: str, shape: Shape, threads: int) -> Call | None:
    """``OpenVINOEngine.product``: a product with constant weights, whose input and output are in ``precision``."""
    openvino = import_silently("openvino")
    from openvino import opset13 as ops

    m, k, n = shape
    if (kind := {"fp32": "f32", "bf16": "bf16", "int8": "u8"}.get(precision)) is None:
        return None
    random = np.random.default_rng(0)
    x = ops.parameter([m, k], getattr(openvino.Type, kind))
    weights = random.integers(-127, 128, (n, k), dtype=np.int8)
    if precision == "int8":  # as in quantised graphs: integers, and the value of one step
        left, right = (ops.multiply(ops.convert(v, "f32"), np.float32(0.01)) for v in (x, ops.constant(weights)))
    else:
        left, right = ops.convert(x, "f32"), ops.constant(weights / np.float32(127))
    y = ops.matmul(left, right, False, True)
    if precision == "int8":
        y = ops.fake_quantize(y, np.float32(0), np.float32(255), np.float32(0), np.float32(255), 256)
    graph = openvino.Model([ops.result(ops.convert(y, kind))], [x])
    try:
        ready = compiled(graph, "bf16" if precision == "bf16" else "f32", threads)
    except RuntimeError:  # OpenVINO expects instructions that are masked
        return None
    request = ready.create_infer_request()
    bits = request.get_input_tensor().data.view(np.uint8)
    bits[:] = random.integers(60, 64, bits.shape, dtype=np.uint8)  # ordinary numbers in every type, no NaN or denormal
    request.infer()
    return request.infer if set(macs_by_precision(ready.get_runtime_model())) == {precision} else None


class OpenVINOEngine(CompiledEngine):
    """The graph on the CPU, compiled for the shortest latency; one compiled model serves every batch size.

    The artifact is the graph in OpenVINO's own format with unchanged weights, and a file with the names of the nodes
    that ``layers`` reads. For int8, NNCF finds the ranges of the activations on the calibration images and inserts its
    rounding into the graph. The two products in each attention are not rounded; they run in bfloat16 where that is
    native, and otherwise in float32.
    """

    name = "openvino"
    precisions = ("fp32", "bf16", "int8")
    packages = ("openvino", "nncf")
    calibrated = ("int8",)
    depth = 2  # so that the next batch is waiting when one is done
    product = staticmethod(product)

    def __init__(self, folder: Path, info: ModelInfo, precision: str, *, device: str, threads: int):
        super().__init__(folder, info, precision, device=device, threads=threads)
        self._graph = shared_core().read_model(folder / GRAPH)
        self._taps: dict[str, list] = json.loads((folder / TAPS).read_text(encoding="utf-8"))
        self._open_streams()
        self.threads = self._compiled.get_property("INFERENCE_NUM_THREADS")

    def _open_streams(self) -> None:
        self._compiled = self._compile(self._graph)
        self._idle: deque = deque()  # requests that are not in use

    def _compile(self, graph):
        return compiled(graph, hint(self.precision), self.threads, self.streams or 1)

    def _infer(self, x: torch.Tensor) -> torch.Tensor:
        try:
            request = self._idle.popleft()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            return run(request, x)[0]
        finally:
            self._idle.append(request)

    def layers(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self._check(x)
        logits, *taken = run(self._tapped.create_infer_request(), x)
        return dict(zip((*self._taps, "logits"), (*taken, logits), strict=True))

    @cached_property
    def _tapped(self):
        """A copy of the artifact with one more output per layer, compiled in the same way."""
        return self._compile(with_outputs(self._graph, self._taps.values(), apart=self.precision == "int8"))

    @cached_property
    def precision_ran(self) -> dict[str, float]:
        """Counted from the runtime's own graph, fused and rounded, after it ran one black image."""
        self(torch.zeros(1, *self.info.preprocessing.input_size, dtype=torch.uint8))
        macs = macs_by_precision(self._compiled.get_runtime_model())
        return shares_that_ran(macs, self.support(self.device), self.info.flops_per_image / 2)

    @property
    def script(self) -> str:
        # The script checks for bf16 when it runs, because it may run on another machine.
        return SCRIPT.format(hint="'f32'" if self.precision == "fp32" else BF16_OR_F32)

    @classmethod
    def support(cls, device: str) -> dict[str, str]:
        every = super().support(device)
        return every | {"bf16": bf16_support()} if installed_version("openvino") else every

    @classmethod
    def build(
        cls, model: Model, precision: str, folder: Path, *, device: str, calibration: torch.Tensor | None
    ) -> None:
        openvino = import_silently("openvino")
        taps = tap_points(model.module, model.info.preprocessing.input_size)
        try:
            graph = openvino.convert_model(export_graph(model, taps=taps))
        except Exception as error:  # the message has many lines; one names the operations without a conversion rule
            if missing := re.search(r"No conversion rule found for operations: .*", str(error)):
                raise VitdemoError(f"openvino engine: {missing[0]}; take onnx, or another model") from None
            raise
        _, *tapped = graph.get_results()
        nodes = {}
        for name, result in zip(taps, tapped, strict=True):
            source = result.input_value(0)
            nodes[name] = [source.get_node().get_friendly_name(), source.get_index()]
            graph.remove_result(result)
        graph.reshape([-1, *model.info.preprocessing.input_size])  # the importer leaves all dimensions dynamic
        if precision == "int8":
            graph = quantised(graph, calibration)
        openvino.save_model(graph, folder / GRAPH, compress_to_fp16=False)
        (folder / TAPS).write_text(json.dumps(nodes, indent=2), encoding="utf-8")


BF16_OR_F32 = '"bf16" if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"'
SCRIPT = f"""
sys.modules["openvino_telemetry"] = None  # it would report this use, in a process that loads the model again
import openvino

core = openvino.Core()
hint = {{hint}}
options = {{{{"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}}}}
model = core.compile_model(HERE / "{GRAPH}", "CPU", options)
logits = lambda x: model(x)[0]
"""


@cache
def bf16_support() -> str:
    """How OpenVINO computes in bf16 on this CPU.

    With AVX512 but no bf16 instructions, OpenVINO emulates bf16, up to 17 times slower than fp32. With only AVX2 it
    ignores the hint and computes in float32.
    """
    return support_of("bf16", ["BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")], product)


def hint(precision: str) -> str:
    """OpenVINO's name of the precision for everything that the graph does not round to int8.

    In int8 that is a twenty-fifth of a ViT-B/16. If it ran in float32, a batch of 8 took a tenth longer on a CPU with
    bf16; if it ran in bf16, five times as long on a CPU with AVX512 and no bf16.
    """
    if precision == "int8":
        return "bf16" if bf16_support() == NATIVE else "f32"
    return {"fp32": "f32", "bf16": "bf16"}[precision]


def compiled(graph, precision: str, threads: int, streams: int = 1):
    """Compile a graph for the CPU.

    Args:
        graph: an ``openvino.Model``.
        precision: OpenVINO's name of the precision for everything that is not rounded to int8.
        threads: CPU threads that a call uses.
        streams: the number of simultaneous calls.
    """
    options = {
        "INFERENCE_PRECISION_HINT": precision,  # by default OpenVINO takes bfloat16 where the CPU has it
        "INFERENCE_NUM_THREADS": threads * streams,
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
    } | ({"NUM_STREAMS": streams} if streams > 1 else {})
    return shared_core().compile_model(graph, "CPU", options)


def run(request, x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of one batch, copied because the next batch overwrites the request's memory."""
    from openvino import Tensor

    pixels = x.contiguous().numpy()
    request.set_input_tensor(Tensor(pixels, shared_memory=True))
    request.infer()
    return [torch.from_numpy(tensor.data.copy()) for tensor in request.output_tensors]


@cache
def shared_core():
    """OpenVINO's runtime, one instance for all engines and for the life of the process.

    Each instance has its own stack for signals. If the older of two instances is deleted first, signals in OpenVINO
    2026.4 use memory that is already freed, so the next signal (a child that ends, or Ctrl-C) overwrites other data.
    """
    return import_silently("openvino").Core()


def import_silently(name: str) -> ModuleType:
    """Import a module of OpenVINO or NNCF without its telemetry.

    Both send usage statistics to their developers unless the user opts out, and write an identity into the home folder
    for that. Both work without the package that sends the statistics, so it is made to look missing here.
    """
    if "openvino_telemetry" in sys.modules:  # the user's own program imported it first, and decides
        return importlib.import_module(name)
    sys.modules["openvino_telemetry"] = None
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules["openvino_telemetry"]


def with_outputs(graph, nodes: Iterable[tuple[str, int]], *, apart: bool):
    """A copy of ``graph`` with further outputs.

    Args:
        graph: an ``openvino.Model``.
        nodes: the nodes whose outputs are added, each by its name and the output's index.
        apart: insert after each of them a node that changes nothing, across which the runtime moves no scale factors.
            Otherwise it gets the factors of a layer with two readers wrong in a quantised graph: the output of
            ResNet-18's first convolution was 42,000 times too small in OpenVINO 2026.4.
    """
    from openvino import opset13

    twin = graph.clone()
    found = {node.get_friendly_name(): node for node in twin.get_ops()}
    results = []
    for name, index in nodes:
        point = found[name].output(index)
        if apart:
            readers = point.get_target_inputs()
            point = opset13.minimum(point, np.float32(np.inf)).output(0)
            for reader in readers:
                reader.replace_source_output(point)
        results.append(opset13.result(point))
    twin.add_results(results)
    return twin


def quantised(graph, pixels: torch.Tensor):
    """A graph with NNCF's int8 rounding.

    In a transformer the products in attention are not rounded, and NNCF does not correct the biases, because on a real
    DINOv2 both made the error larger. In other models all weights get 7 bits where the CPU would add up products of 8
    bits wrongly; NNCF's default is 7 bits only in the first layer. On a real EfficientNet-Lite0 this reduced the error
    from 0.27 to 0.16. The measurements are in ``data/results/``.

    Args:
        graph: an ``openvino.Model``.
        pixels: the calibration images, uint8[N, 3, H, W], which run one by one.
    """
    nncf = import_silently("nncf")
    nncf.set_log_level(logging.ERROR)
    kinds = {node.get_type_name() for node in graph.get_ops()}
    transformer = not kinds.isdisjoint(("ScaledDotProductAttention", "Softmax"))
    fewer_bits = not transformer and not adds_products_exactly()
    passes = 2 if transformer else 1  # for a transformer, a first pass finds outlier channels, which are smoothed
    with tqdm(total=passes * len(pixels), desc="calibrating", unit="image") as bar, silent_console():

        def feed(image):
            bar.update()
            return image[None]

        return nncf.quantize(
            graph,
            nncf.Dataset(pixels.numpy(), feed),
            subset_size=len(pixels),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            ignored_scope=nncf.IgnoredScope(names=attention_products(graph)),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                disable_bias_correction=transformer, overflow_fix=nncf.OverflowFix.ENABLE if fewer_bits else None
            ),
        )


def attention_products(graph) -> list[str]:
    """The names of the nodes of an ``openvino.Model`` that multiply two computed values, and not a value by weights."""
    names = []
    for node in graph.get_ops():
        kind = node.get_type_name()
        by_weights = kind == "MatMul" and node.input_value(1).get_node().get_type_name() == "Constant"
        if kind == "ScaledDotProductAttention" or kind == "MatMul" and not by_weights:
            names.append(node.get_friendly_name())
    return names


@contextmanager
def silent_console() -> Iterator[None]:
    """Within the block, hide NNCF's progress bars and a warning of torch.

    The bars would also leave empty outputs in a notebook. Torch warns because NNCF makes it look for a CUDA compiler
    on a machine without a GPU.
    """
    import rich

    console, torchs = rich.get_console(), logging.getLogger("torch.utils.cpp_extension")
    before = console.quiet, console.is_jupyter, torchs.level
    console.quiet, console.is_jupyter = True, False
    torchs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        console.quiet, console.is_jupyter = before[:2]
        torchs.setLevel(before[2])


def macs_by_precision(runtime_graph) -> Counter[str]:
    """The multiply-accumulates per image in an OpenVINO runtime graph that has run, by the precision of the operands.

    Convolutions, matrix products, and the two products in each fused attention (one node in the graph) count.
    """
    batch = dimensions(runtime_graph.inputs[0])[0]  # the graph has the dimensions of its last run
    macs: Counter[str] = Counter()
    for node in runtime_graph.get_ordered_ops():
        kind, layers = (node.get_rt_info()[key].astype(str) for key in ("layerType", "originalLayersNames"))
        if kind in ("Convolution", "FullyConnected", "MatMul"):
            data, weights = node.inputs()[:2]
            out = dimensions(node.output(0))
            if kind == "Convolution":  # its weights are [(groups,) channels out, channels in, height, width]
                terms = prod(dimensions(weights)) // out[1]
            else:
                rows, columns = dimensions(data)[-2:]
                terms = columns if kind == "FullyConnected" or rows == out[-2] else rows
            macs[multiplied_in(data, weights)] += prod(out) * terms / batch
        elif kind == "Subgraph" and "Softmax" in layers and len(node.inputs()) > 2:
            query, key, *_, value = node.inputs()
            keys = dimensions(value)[-2]
            macs[multiplied_in(query, key)] += prod(dimensions(query)) * keys / batch
            macs[multiplied_in(value)] += prod(dimensions(node.output(0))) * keys / batch
    return macs


def dimensions(port) -> list[int]:
    """The shape of a node's input or output."""
    return [dimension.get_length() for dimension in port.get_partial_shape()]


def multiplied_in(*operands) -> str:
    """The precision "int8" if all operands have it, and otherwise that of the first operand that has another."""
    types = [operand.get_element_type().get_type_name() for operand in operands]
    return next((kind for kind in (PRECISION_OF.get(name, name) for name in types) if kind != "int8"), "int8")
