"""The onnx engine beyond the contract: its artifact, its numbers against eager's, and what it says of itself."""

import shutil
import time
from dataclasses import replace

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tests.engines.near import relative_l2
from vitdemo import Model, VitdemoError, convert
from vitdemo.engines.artifacts import artifacts_root
from vitdemo.engines.onnx import CALIBRATION_BATCH, CalibrationBatches, ONNXEngine
from vitdemo.precisions import adds_products_exactly


@pytest.fixture(scope="module")
def engines(vit_shapes20) -> dict[str, ONNXEngine]:
    return {precision: convert(vit_shapes20, "onnx", precision) for precision in ONNXEngine.precisions}


@pytest.fixture(scope="module")
def folders(engines) -> dict:
    """The artifacts' folders by precision."""
    return {
        precision: next(artifacts_root().glob(f"*-onnx-{precision}-{engine.card['key'][:16]}"))
        for precision, engine in engines.items()
    }


class Small(nn.Module):
    """Convolutions, one of them grouped, a batch norm to be folded, and a linear layer on top."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, stride=8, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(self.depthwise(x).mean((2, 3)))


@pytest.fixture(scope="module")
def small(vit_shapes20) -> Model:
    return Model.from_module(Small(), vit_shapes20.info.preprocessing, name="small")


def loaded(model: Model, precision: str, folder, pixels: torch.Tensor | None = None) -> ONNXEngine:
    """Built into ``folder`` and loaded from it, without a cache."""
    ONNXEngine.build(model, precision, folder, device="cpu", calibration=pixels)
    return ONNXEngine(folder, model.info, precision, device="cpu", threads=2)


def unknown_of_twice_the_work(folder, model: Model, precision: str) -> float:
    """The share of multiplications that is missing when the model says twice as many as torch counts: half of them."""
    info = replace(model.info, flops_per_image=2 * model.info.flops_per_image)
    return ONNXEngine(folder, info, precision, device="cpu", threads=2).precision_ran["unknown"]


def test_precision_that_ran(engines, vit_shapes20):
    blocks, width, tokens = 6, 128, 197
    attention = 2 * blocks * tokens**2 * width / (vit_shapes20.info.flops_per_image / 2)
    assert engines["fp32"].precision_ran == {"fp32": 1.0}
    assert engines["int8"].precision_ran == {"int8": pytest.approx(1 - attention), "fp32": pytest.approx(attention)}


@pytest.mark.parametrize("precision", ONNXEngine.precisions)
def test_every_multiplication_is_seen(folders, vit_shapes20, precision):
    assert unknown_of_twice_the_work(folders[precision], vit_shapes20, precision) == pytest.approx(0.5, abs=1e-6)


def test_rounding_that_is_not_fused_counts_as_fp32(folders, vit_shapes20, tmp_path):
    """With float weights in their place the same rounded activations are multiplied in float32."""
    shutil.copytree(folders["int8"], tmp_path, dirs_exist_ok=True)
    model = onnx.load(tmp_path / "model.onnx")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    products = {node.input[1] for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")}
    for node in list(model.graph.node):
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors and node.output[0] in products:
            weights, scale = (tensors[name].astype("float32") for name in node.input[:2])
            axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
            scale = scale.reshape([-1 if i == axis else 1 for i in range(weights.ndim)])
            model.graph.initializer.append(numpy_helper.from_array(weights * scale, node.output[0]))
            model.graph.node.remove(node)
    onnx.save(model, tmp_path / "model.onnx")
    engine = ONNXEngine(tmp_path, vit_shapes20.info, "int8", device="cpu", threads=2)
    assert engine.precision_ran == {"fp32": pytest.approx(1)}


@pytest.mark.parametrize("precision", ONNXEngine.precisions)
def test_artifact_is_a_sound_graph_of_pixels_and_logits(folders, precision):
    folder = folders[precision]
    assert {path.name for path in folder.iterdir()} == {"card.json", "model.onnx", "model.onnx.data", "taps.json"}
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    graph = onnx.load(folder / "model.onnx").graph
    (x,), (logits,) = graph.input, graph.output
    batch, *sides = x.type.tensor_type.shape.dim
    assert (x.name, x.type.tensor_type.elem_type) == ("x", onnx.TensorProto.UINT8)
    assert (logits.name, logits.type.tensor_type.elem_type) == ("logits", onnx.TensorProto.FLOAT)
    assert batch.dim_param and [side.dim_value for side in sides] == [3, 224, 224]


def test_normalisation_is_not_rounded(folders):
    nodes = onnx.load(folders["int8"] / "model.onnx").graph.node
    made_by = {value: node for node in nodes for value in node.output}
    rounding = next(node for node in nodes if node.op_type == "QuantizeLinear")
    chain, value = [], rounding.input[0]
    while value in made_by:
        chain.append(made_by[value].op_type)
        value = made_by[value].input[0]
    assert value == "x" and chain == ["Div", "Sub", "Div", "Cast"]


def test_an_idle_engine_leaves_the_cores_alone(engines, crops):
    busy = 0.0
    for _ in range(10):
        engines["fp32"](crops[:1])
        start = time.process_time()
        time.sleep(0.05)
        busy += time.process_time() - start
    assert busy < 0.05  # threads that spin would make it 0.2 and more


def test_building_is_quiet_and_leaves_the_model_alone(small, tmp_path, capfd):
    before = {name: tensor.clone() for name, tensor in small.module.state_dict().items()}
    engine = loaded(small, "fp32", tmp_path)
    x = torch.randint(0, 256, (3, 3, 224, 224), dtype=torch.uint8)
    assert relative_l2(engine(x), convert(small)(x)) <= 1e-4
    assert capfd.readouterr() == ("", "")
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.module.state_dict().items())


@pytest.mark.parametrize(
    "cpu, exactly",
    [
        (dict(architecture="x86_64", avx512_vnni=True, avx_vnni=False), True),
        (dict(architecture="x86_64", avx512_vnni=False, avx_vnni=True), True),
        (dict(architecture="x86_64", avx512_vnni=False, avx_vnni=False), False),
        (dict(architecture="arm64"), True),
    ],
)
def test_which_cpus_add_products_exactly(monkeypatch, cpu, exactly):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert adds_products_exactly() == exactly


def test_weights_have_a_bit_less_where_products_overflow(small, tmp_path, monkeypatch):
    monkeypatch.setattr("vitdemo.engines.onnx.adds_products_exactly", lambda: False)
    pixels = torch.randint(0, 256, (20, 3, 224, 224), dtype=torch.uint8)
    engine = loaded(small, "int8", tmp_path, pixels)
    assert engine.precision_ran == {"int8": pytest.approx(1)}
    assert unknown_of_twice_the_work(tmp_path, small, "int8") == pytest.approx(0.5, abs=1e-6)
    assert relative_l2(engine(pixels), convert(small)(pixels)) <= 5e-2
    tensors = onnx.load(tmp_path / "model.onnx").graph.initializer
    weights = [numpy_helper.to_array(each) for each in tensors if each.data_type == onnx.TensorProto.INT8]
    assert max(abs(each.astype(int)).max() for each in weights) == 64


def test_calibration_takes_a_few_images_at_a_time():
    batches = CalibrationBatches(torch.zeros(20, 3, 2, 2, dtype=torch.uint8))
    sizes = [len(batch["x"]) for batch in iter(batches.get_next, None)]
    assert sizes == [CALIBRATION_BATCH] * (20 // CALIBRATION_BATCH) and CALIBRATION_BATCH < 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_its_providers_is_one_line(folders, vit_shapes20):
    assert ONNXEngine.runs_on("cpu") and not ONNXEngine.runs_on("cuda")
    with (
        pytest.warns(UserWarning),
        pytest.raises(VitdemoError, match="no CUDA provider here; use cpu, or install onnxruntime-gpu"),
    ):
        ONNXEngine(folders["fp32"], vit_shapes20.info, "fp32", device="cuda", threads=2)


def test_providers_are_those_that_the_runtime_took(engines):
    assert engines["fp32"].providers == ["CPUExecutionProvider"]
