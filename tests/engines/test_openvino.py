"""The OpenVINO engine: against eager, and against OpenVINO's own model driven by a bare script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.engines.near import MOST, relative_l2
from tests.native import is_native, precisions_of
from vitdemo import Model, convert
from vitdemo.engines.openvino import GRAPH, OpenVINOEngine, hint, import_silently, macs_by_precision, shared_core
from vitdemo.machine import cores

openvino = import_silently("openvino")

PRECISIONS = precisions_of("openvino")


@pytest.fixture(scope="module")
def engines(vit_shapes20) -> dict[str, OpenVINOEngine]:
    return {precision: convert(vit_shapes20, "openvino", precision) for precision in OpenVINOEngine.native()}


@pytest.fixture(scope="module")
def small_vit(vit_shapes20) -> Model:
    """Two blocks of a ViT on 14 x 14 patches: whatever is built of it is built in a second or two."""
    torch.manual_seed(0)
    module = timm.models.VisionTransformer(
        img_size=224, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=9
    )
    return Model.from_module(module, vit_shapes20.info.preprocessing, name="small_vit")


def folder_of(engine: OpenVINOEngine, cache: Path) -> Path:
    return next(path.parent for path in cache.glob("artifacts/*/card.json") if engine.card["key"] in path.read_text())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_runtime_by_hand_gives_the_same(engines, crops, cache, precision):
    """The artifact, read, compiled and run by OpenVINO's own calls as its manual has them."""
    compiled = openvino.compile_model(
        folder_of(engines[precision], cache) / GRAPH,
        "CPU",
        {"INFERENCE_PRECISION_HINT": hint(precision), "PERFORMANCE_HINT": "LATENCY"},
    )
    assert len(compiled.outputs) == 1
    assert str(compiled.input(0).get_partial_shape()) == "[?,3,224,224]"
    by_hand = torch.from_numpy(compiled(crops[:3].numpy())[0])
    assert torch.equal(engines[precision](crops[:3]), by_hand)


def test_layers_show_the_block_that_is_wrong(vit_shapes20, eager, crops, small_vit):
    """One matrix of block 1 scaled by 1.05: what comes before it is untouched, and it is the first that is not."""
    engine = convert(small_vit, "openvino", "fp32")
    before = engine.layers(crops[:3])
    small_vit.module.blocks[1].mlp.fc1.weight.data *= 1.05
    try:
        expected = convert(small_vit, "eager", "fp32").layers(crops[:3])
    finally:
        small_vit.module.blocks[1].mlp.fc1.weight.data /= 1.05
    wrong = [name for name in expected if relative_l2(before[name], expected[name]) > MOST["fp32"]]
    assert wrong[0] == "blocks.1.mlp" and wrong[-1] == "logits"


def test_precision_ran(engines):
    assert engines["fp32"].precision_ran == {"fp32": pytest.approx(1)}
    if "bf16" in engines:
        assert engines["bf16"].precision_ran == {"bf16": pytest.approx(1)}
    # What NNCF leaves out: the products of attention's probabilities with the values, 6 blocks x 197 x 197 x 128.
    left_out = 2 * 6 * 197 * 197 * 128 / (engines["int8"].info.flops_per_image / 2)
    rest = "bf16" if is_native("openvino", "bf16") else "fp32"
    assert engines["int8"].precision_ran == {"int8": pytest.approx(1 - left_out), rest: pytest.approx(left_out)}


def test_precision_ran_is_not_what_was_asked_for(small_vit, cache, monkeypatch):
    """Where bf16 is asked for and the runtime computes in float32, as with AVX2 alone, that is what it says."""
    folder = folder_of(convert(small_vit, "openvino", "fp32"), cache)
    monkeypatch.setattr("vitdemo.engines.openvino.hint", lambda precision: "f32")
    engine = OpenVINOEngine(folder, small_vit.info, "bf16", device="cpu", threads=1)
    assert engine.precision == "bf16" and engine.precision_ran == {"fp32": pytest.approx(1)}


def macs(engine: OpenVINOEngine) -> float:
    """Of an image, by the runtime's graph after a batch of 2, over torch's count."""
    engine(torch.zeros(2, 3, 224, 224, dtype=torch.uint8))
    return macs_by_precision(engine._compiled.get_runtime_model()).total() / (engine.info.flops_per_image / 2)


def test_macs_are_those_torch_counts(engines, resnet18, vit_shapes20):
    grouped = nn.Sequential(
        nn.Conv2d(3, 12, 16, 16), nn.Conv2d(12, 24, 3, groups=6), nn.GELU(), nn.Flatten(), nn.Linear(24 * 144, 5)
    )
    grouped = Model.from_module(grouped, vit_shapes20.info.preprocessing, name="grouped")
    for engine in (*engines.values(), *(convert(model, "openvino", "fp32") for model in (resnet18, grouped))):
        assert macs(engine) == pytest.approx(1, rel=0.01)


def test_macs_of_attention_that_is_not_fused(small_vit):
    engine = convert(small_vit, "openvino", "fp32")
    kinds = {node.get_rt_info()["layerType"].astype(str) for node in engine._compiled.get_runtime_model().get_ops()}
    assert "MatMul" not in kinds
    shared_core().set_property("CPU", {"SNIPPETS_MODE": "DISABLE"})
    try:
        engine._compiled = engine._compile(engine._graph)
    finally:
        shared_core().set_property("CPU", {"SNIPPETS_MODE": "ENABLE"})
    kinds = {node.get_rt_info()["layerType"].astype(str) for node in engine._compiled.get_runtime_model().get_ops()}
    assert "MatMul" in kinds
    assert macs(engine) == pytest.approx(1, rel=0.01)


def test_work_that_it_cannot_count_is_said(vit_shapes20, crops):
    module = nn.Sequential(
        nn.Conv2d(3, 8, 16, 16), nn.ConvTranspose2d(8, 4, 2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    model = Model.from_module(module, vit_shapes20.info.preprocessing, name="transposed")
    transposed = 14 * 14 * 8 * 4 * 2 * 2 / (model.info.flops_per_image / 2)
    assert convert(model, "openvino", "fp32").precision_ran["unknown"] == pytest.approx(transposed, rel=0.01)


def test_threads_are_those_it_uses(small_vit):
    assert convert(small_vit, "openvino", threads=1).threads == 1
    assert convert(small_vit, "openvino", threads=1000).threads == cores()


def test_int8_is_the_same_twice(small_vit, crops):
    first = convert(small_vit, "openvino", "int8", calibration=crops[:8])(crops)
    again = convert(small_vit, "openvino", "int8", calibration=crops[:8], force=True)(crops)
    assert torch.equal(first, again)


REPORT = """
import sys
import torch
from vitdemo import Model, Preprocessing, convert

module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 4, 4), torch.nn.Flatten(), torch.nn.Linear(256, 5))
black = Preprocessing((3, 32, 32), 1.0, "center", "bilinear", (0.5,) * 3, (0.5,) * 3)
model = Model.from_module(module, black, name="tiny")
convert(model, "openvino", "int8", calibration=torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
assert "openvino_telemetry" not in sys.modules
"""


def test_building_reports_to_nobody_and_draws_one_bar(tmp_path):
    """In a process of its own, as a test runner or CI would keep the statistics from being sent."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    environment |= {"HOME": str(tmp_path), "VITDEMO_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True, check=True)
    assert not (tmp_path / "intel").exists()  # where the sender would keep the identity it sends
    assert done.stdout == ""
    assert "calibrating: 100%" in done.stderr and "Statistics" not in done.stderr


SIGNALS = """
import gc, os, signal
import torch
from vitdemo import convert, load_model

heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append(gc.collect()))
model, images = load_model("vit_shapes20"), torch.zeros(4, 3, 224, 224, dtype=torch.uint8)
first = convert(model, "openvino", "fp32", force=True)
others = [convert(model, "openvino", "int8", calibration=images, force=True), convert(model, "openvino", "fp32")]
for engine in (first, *others):
    engine(images)
del first, engine
while others:  # the oldest first
    os.kill(os.getpid(), signal.SIGUSR1)
    del others[0]
    gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
print(len(heard))
"""


def test_a_signal_is_heard_when_engines_were_dropped(tmp_path):
    """OpenVINO's second runtime of a process would leave its signals' stack to memory that is free."""
    environment = os.environ | {"VITDEMO_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SIGNALS], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr[-2000:]
