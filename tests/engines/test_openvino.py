"""The OpenVINO engine: against eager, and against OpenVINO's own model driven by a bare script."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.native import is_native, precisions_of
from vitdemo import Model, convert, load_model, reference_crop
from vitdemo.engines.openvino import GRAPH, TAPS, OpenVINOEngine, hint, import_silently, macs_by_precision, shared_core
from vitdemo.machine import cores

openvino = import_silently("openvino")

IMAGES = 60
PRECISIONS = precisions_of("openvino")
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "int8": 0.1}  # relative L2
LEAST = {"fp32": 1, "bf16": 0.995, "int8": 0.98}  # of the answers are eager's


@pytest.fixture(scope="module")
def crops(shapes20, vit_shapes20) -> torch.Tensor:
    step = len(shapes20) // IMAGES
    preprocessing = vit_shapes20.info.preprocessing
    return torch.stack([reference_crop(shapes20[i * step].jpeg, preprocessing) for i in range(IMAGES)])


@pytest.fixture(scope="module")
def engines(vit_shapes20) -> dict[str, OpenVINOEngine]:
    return {precision: convert(vit_shapes20, "openvino", precision) for precision in OpenVINOEngine.native()}


@pytest.fixture(scope="module")
def resnet18() -> Model:
    return load_model("resnet18.tv_in1k", "random")


@pytest.fixture(scope="module")
def small_vit(vit_shapes20) -> Model:
    """Two blocks of a ViT on 14 x 14 patches: whatever is built of it is built in a second or two."""
    torch.manual_seed(0)
    module = timm.models.VisionTransformer(
        img_size=224, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=9
    )
    return Model.from_module(module, vit_shapes20.info.preprocessing, name="small_vit")


def relative_l2(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def folder_of(engine: OpenVINOEngine, cache: Path) -> Path:
    return next(path.parent for path in cache.glob("artifacts/*/card.json") if engine.card["key"] in path.read_text())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_are_those_of_eager(engines, eager, crops, precision):
    ours, expected = engines[precision](crops), eager(crops)
    assert relative_l2(ours, expected) < TOLERANCES[precision]
    agreement = (ours.argmax(1) == expected.argmax(1)).float().mean()
    assert agreement >= (0.98 if precision == "int8" else 1)


@pytest.mark.soak
@pytest.mark.parametrize("precision", PRECISIONS)
def test_agreement_on_all_of_shapes20(engines, eager, shapes20, vit_shapes20, precision):
    agreed = 0
    for start in range(0, len(shapes20), 50):
        samples = [shapes20[i] for i in range(start, min(start + 50, len(shapes20)))]
        x = torch.stack([reference_crop(sample.jpeg, vit_shapes20.info.preprocessing) for sample in samples])
        agreed += int((engines[precision](x).argmax(1) == eager(x).argmax(1)).sum())
    assert agreed / len(shapes20) >= LEAST[precision]


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


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_batch_size_from_one_artifact(engines, crops, precision):
    engine = engines[precision]
    singly = torch.cat([engine(crops[i : i + 1]) for i in range(17)])
    for size in (2, 7, 17, 1):
        # The kernels of another batch size may add in another order, and round to another of 256 levels.
        assert relative_l2(engine(crops[:size]), singly[:size]) < TOLERANCES[precision] / 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_layers_are_those_of_eager(engines, eager, crops, precision):
    expected, found = eager.layers(crops[:5]), engines[precision].layers(crops[:5])
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and tensor.shape == expected[name].shape, name
        assert relative_l2(tensor, expected[name]) < TOLERANCES[precision], name
    assert relative_l2(found["logits"], engines[precision](crops[:5])) < TOLERANCES["bf16"] / 2


def test_layers_show_the_block_that_is_wrong(vit_shapes20, eager, crops, small_vit):
    """One matrix of block 1 scaled by 1.05: what comes before it is untouched, and it is the first that is not."""
    engine = convert(small_vit, "openvino", "fp32")
    before = engine.layers(crops[:3])
    small_vit.module.blocks[1].mlp.fc1.weight.data *= 1.05
    try:
        expected = convert(small_vit, "eager", "fp32").layers(crops[:3])
    finally:
        small_vit.module.blocks[1].mlp.fc1.weight.data /= 1.05
    wrong = [name for name in expected if relative_l2(before[name], expected[name]) > TOLERANCES["fp32"]]
    assert wrong[0] == "blocks.1.mlp" and wrong[-1] == "logits"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_resnet18_goes_the_same_way(resnet18, crops, precision):
    x = crops[:4]
    calibration = x if precision == "int8" else None
    engine = convert(resnet18, "openvino", precision, calibration=calibration)
    reference = convert(resnet18, "eager", "fp32")
    assert relative_l2(engine(x), reference(x)) < TOLERANCES[precision]
    expected, found = reference.layers(x), engine.layers(x)
    for name, tensor in found.items():
        assert relative_l2(tensor, expected[name]) < TOLERANCES[precision], name
    assert relative_l2(found["logits"], engine(x)) < TOLERANCES["bf16"] / 2  # the twin is near the artifact
    assert engine.precision_ran == {precision: pytest.approx(1)}


def test_precision_ran(engines):
    assert engines["fp32"].precision_ran == {"fp32": pytest.approx(1)}
    if "bf16" in engines:
        assert engines["bf16"].precision_ran == {"bf16": pytest.approx(1)}
    # What NNCF leaves out: the products of attention's probabilities with the values, 6 blocks x 197 x 197 x 128.
    left_out = 6 * 197 * 197 * 128 / (engines["int8"].info.flops_per_image / 2)
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


def test_logits_stay_when_the_next_batch_runs(engines, crops):
    engine = engines["fp32"]
    first = engine(crops[:2])
    kept = first.clone()
    engine(crops[2:4])
    assert torch.equal(first, kept)


def test_input_of_any_layout(engines, crops):
    engine = engines["fp32"]
    expected = engine(crops[:2])
    assert torch.equal(engine(crops[:2].to(memory_format=torch.channels_last)), expected)
    assert torch.equal(engine(crops[:4].repeat_interleave(2, 0)[::2][:2]), expected)


def test_many_threads_call_one_engine(engines, crops):
    engine = engines["fp32"]
    expected = [engine(crops[i : i + 3]) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: engine(crops[i % 8 : i % 8 + 3]), range(40)))
    assert all(torch.equal(logits, expected[i % 8]) for i, logits in enumerate(found))


def test_submit_beyond_depth_and_after_close(engines, crops):
    engine = engines["fp32"]
    for _ in range(2):
        futures = [engine.submit(crops[i : i + 1 + i % 3]) for i in range(3 * engine.depth)]
        for i, future in enumerate(futures):
            assert torch.equal(future.result(timeout=60), engine(crops[i : i + 1 + i % 3]))
        engine.close()


def test_threads_are_those_it_uses(small_vit):
    assert convert(small_vit, "openvino", threads=1).threads == 1
    assert convert(small_vit, "openvino", threads=1000).threads == cores()


@pytest.mark.parametrize("file", [GRAPH, "model.bin", TAPS])
def test_a_damaged_file_does_not_load(small_vit, cache, tmp_path, file):
    engine = convert(small_vit, "openvino", "fp32")
    folder = shutil.copytree(folder_of(engine, cache), tmp_path / "copy")
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises((RuntimeError, json.JSONDecodeError)):
        OpenVINOEngine(folder, small_vit.info, "fp32", device="cpu", threads=1)


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
