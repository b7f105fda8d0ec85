"""ONNX Runtime: the graph from torch's exporter, in float32, or in int8 with ranges from ONNX Runtime's own tool."""

import json
import tempfile
from collections import Counter
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from tqdm.auto import tqdm

from vitdemo.engines.contract import CompiledEngine
from vitdemo.engines.graph import export_graph, tap_points
from vitdemo.errors import VitdemoError
from vitdemo.machine import installed_version
from vitdemo.models.model import Model, ModelInfo
from vitdemo.precisions import adds_products_exactly, shares_that_ran

GRAPH, TAPS = "model.onnx", "taps.json"  # weights are in model.onnx.data, because the graph's file is limited to 2 GB

# By device, in the order in which each part of the graph is offered to them. The providers for CUDA were *not run*.
PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("TensorrtExecutionProvider", ("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"),
}
ON_CUDA = {"TensorrtExecutionProvider", "CUDAExecutionProvider"}

# The build for CUDA is another distribution of the same module.
RUNTIME = "onnxruntime-gpu" if installed_version("onnxruntime-gpu") else "onnxruntime"
CALIBRATION_BATCH = 2  # images; all their activations are in memory at once, and larger batches are not faster


class ONNXEngine(CompiledEngine):
    """The graph on the CPU; on CUDA, with the providers of TensorRT and CUDA, it was *not run*.

    The artifact is one ONNX file with an input "x" and an output "logits", and a file with the names of the values that
    ``layers`` reads. int8 is static: the ranges of the activations are fixed, and found on the calibration images.

    providers: the providers that ONNX Runtime reports to use.
    """

    name = "onnx"
    precisions = ("fp32", "int8")
    packages = (RUNTIME, "onnx", "onnxscript")
    calibrated = ("int8",)
    script = f"""
import onnxruntime

model = onnxruntime.InferenceSession(HERE / "{GRAPH}", providers=["CPUExecutionProvider"])
logits = lambda x: model.run(None, {{"x": x}})[0]
"""

    def __init__(self, folder: Path, info: ModelInfo, precision: str, *, device: str, threads: int):
        super().__init__(folder, info, precision, device=device, threads=threads)
        self._folder = folder
        self._taps: dict[str, str] = json.loads((folder / TAPS).read_text(encoding="utf-8"))
        self._session = self._open(folder / GRAPH)
        self.providers = self._session.get_providers()
        if device == "cuda" and ON_CUDA.isdisjoint(self.providers):  # ONNX Runtime would use the CPU instead
            wrong = "ONNX Runtime has no CUDA provider here"
            raise VitdemoError(f"device 'cuda': {wrong}; use cpu, or install onnxruntime-gpu in place of onnxruntime")

    @classmethod
    def runs_on(cls, device: str) -> bool:
        if device == "cpu" or not installed_version(RUNTIME):
            return device == "cpu"
        import onnxruntime

        return not ON_CUDA.isdisjoint(onnxruntime.get_available_providers())

    def _open(self, graph: Path | bytes, *, profile: Path | None = None):
        """Open a session of a graph's file, or of a graph's bytes, whose weights are then the artifact's.

        profile: a folder for a profile of the kernels that run.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # only errors, which are raised as well
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads free their cores
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile / "kernels")
            options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights would have no shape
        source = graph if isinstance(graph, bytes) else str(graph)
        # A provider that fails must be an error; ONNX Runtime must not fall back to another one.
        return onnxruntime.InferenceSession(source, options, list(PROVIDERS[self.device]), enable_fallback=0)

    def _open_streams(self) -> None:
        self._session = self._open(self._folder / GRAPH)

    def _infer(self, x: torch.Tensor) -> torch.Tensor:
        (logits,) = self._session.run(None, feed(x))
        return torch.from_numpy(logits)

    def layers(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """As in ``Engine``, without layers that int8 folds into others, such as a convolution before a batch norm."""
        self._check(x)
        values = self._tapped.run([*self._taps.values(), "logits"], feed(x))
        return {name: torch.from_numpy(value) for name, value in zip((*self._taps, "logits"), values, strict=True)}

    @cached_property
    def _tapped(self):
        """A session of the artifact's graph with one more output per layer."""
        import onnx

        model = onnx.load(self._folder / GRAPH, load_external_data=False)
        model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in self._taps.values())
        return self._open(model.SerializeToString())

    @cached_property
    def precision_ran(self) -> dict[str, float]:
        """Counted from the kernels that ONNX Runtime reports to have run for one black image."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(self._folder / GRAPH, profile=Path(folder))
            session.run(None, feed(torch.zeros(1, *self.info.preprocessing.input_size, dtype=torch.uint8)))
            macs = macs_by_type(json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")))
        return shares_that_ran(macs, self.support(self.device), self.info.flops_per_image / 2)

    @classmethod
    def build(
        cls, model: Model, precision: str, folder: Path, *, device: str, calibration: torch.Tensor | None
    ) -> None:
        if precision == "int8":
            import onnx

            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                taps = export(model, Path(scratch) / GRAPH)
                quantise(Path(scratch) / GRAPH, folder / GRAPH, calibration)
            nodes = onnx.load(folder / GRAPH, load_external_data=False).graph.node
            computed = {value for node in nodes for value in node.output}
            taps = {name: value for name, value in taps.items() if value in computed}
        else:
            taps = export(model, folder / GRAPH)
        (folder / TAPS).write_text(json.dumps(taps, indent=2), encoding="utf-8")


def feed(x: torch.Tensor) -> dict:
    """The inputs of a session, without a copy; the runtime copies the batch only if it is not contiguous."""
    return {"x": x.numpy()}


def export(model: Model, path: Path) -> dict[str, str]:
    """Write the graph, for any batch size, to ``path``; return the names of its values at the tap points, in order."""
    taps = tap_points(model.module, model.info.preprocessing.input_size)
    program = torch.onnx.export(
        export_graph(model, taps=taps), dynamo=True, verbose=False, input_names=["x"], output_names=["logits", *taps]
    )
    outputs = program.model.graph.outputs
    values = {name: value.name for name, value in zip(taps, outputs[1:], strict=True)}
    del outputs[1:]
    program.save(path, external_data=True)
    return values


def quantise(exported: Path, path: Path, pixels: torch.Tensor) -> None:
    """Write ``exported`` to ``path`` with static int8 rounding around its convolutions and layers with weights.

    Their inputs are rounded to uint8, and their weights to int8 with one scale per output channel. The output of a
    linear layer stays in float32. The output of a convolution is rounded too, because there is no kernel without that;
    where a ReLU follows, the rounding uses the range after the ReLU. (With the range before it, a real
    EfficientNet-Lite0 lost 9 points of top-1 and was a third slower.) The two products in attention stay in float32:
    rounding them too more than tripled the error and was not faster. A range is the smallest and the largest value
    seen.

    Args:
        exported: the graph's file, in a writable folder.
        path: the file for the quantised graph.
        pixels: calibration images, uint8[N, 3, H, W].
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = exported.with_name("prepared.onnx")
    # The exporter has already written every shape.
    quant_pre_process(
        exported, prepared, skip_symbolic_shape=True, save_as_external_data=True, all_tensors_to_one_file=True
    )
    graph = onnx.load(prepared, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    attention = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in weights]
    quantize_static(
        prepared,
        path,
        CalibrationBatches(pixels),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=not adds_products_exactly(),
        op_types_to_quantize=["Conv", "MatMul", "Gemm", "Relu", "Clip"],
        nodes_to_exclude=attention,
        use_external_data_format=True,
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
    )


class CalibrationBatches:
    """ONNX Runtime's ``CalibrationDataReader``: a few images at a time, with a progress bar."""

    def __init__(self, pixels: torch.Tensor):
        self._feeds = map(feed, tqdm(pixels.split(CALIBRATION_BATCH), desc="calibrating", unit="batch"))

    def get_next(self) -> dict | None:
        return next(self._feeds, None)


def macs_by_type(events: list[dict]) -> Counter[str]:
    """The multiply-accumulates in an ONNX Runtime profile, by the runtime's name of the first operand's type.

    Convolutions and matrix products count, under all names that the runtime has for them (FusedMatMul, QLinearConv,
    MatMulIntegerToFloat …). The output of a product has one row per row of its first operand.
    """
    macs: Counter[str] = Counter()
    for kernel in (event["args"] for event in events if "input_type_shape" in event.get("args", ())):
        is_convolution = "Conv" in kernel["op_name"]
        if not is_convolution and "MatMul" not in kernel["op_name"] and "Gemm" not in kernel["op_name"]:
            continue
        (kind, data), *others = (pair for operand in kernel["input_type_shape"] for pair in operand.items())
        ((_, out),) = kernel["output_type_shape"][0].items()
        if is_convolution:  # its weights are [channels out, channels in, height, width]
            weights = next(shape for _, shape in others if len(shape) == len(data))
            count = prod(out) * prod(weights[1:])
        else:
            count = prod(data) * out[-1]
        macs[kind] += count
    return macs
