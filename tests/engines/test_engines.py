"""The engines' contract, for every engine that is found."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.engines.near import LEAST, MOST, agreement, in_batches, pearson, relative_l2
from tests.native import name_in_precision_ran, unless_native
from vitdemo import CompiledEngine, Model, VitdemoError, convert, find_engines, reference_crop
from vitdemo.engines.artifacts import CARD, artifacts_root
from vitdemo.models.model import FlopsByPrecision

PAIRS = [
    pytest.param((name, precision), marks=unless_native(name, precision), id=f"{name}-{precision}")
    for name, cls in find_engines().items()
    for precision in cls.precisions
]


LATER = {"inductor": "tapped.pt2"}  # what is read when layers are asked for


@pytest.fixture(scope="module")
def batch(crops) -> torch.Tensor:
    return crops[:9]


@pytest.fixture(scope="module", params=PAIRS)
def engine(request, vit_shapes20):
    engine = convert(vit_shapes20, *request.param)
    yield engine
    engine.close()


@pytest.fixture
def computing(engine):
    if engine.name == "null":
        pytest.skip("computes nothing")
    return engine


def test_registry_finds_each_file():
    assert {"eager", "null"} <= set(find_engines())


def test_any_batch_from_one_engine(engine, batch):
    whole = engine(batch)
    assert whole.dtype == torch.float32 and whole.shape == (9, 20) and whole.device.type == "cpu"
    most = 5e-5 if engine.name == "onnx" else MOST.get(engine.precision, 0) / 2
    for size in (2, 7, 5, 1):  # others' kernels of another batch size add in another order, and round to another level
        assert (engine(batch[:size]) - whole[:size]).norm() <= most * whole[:size].norm()


def test_submit_gives_what_a_call_gives_also_after_close(engine, batch):
    for _ in range(2):
        futures = [engine.submit(batch[i % 7 : i % 7 + 1 + i % 3]) for i in range(3 * engine.depth)]
        for i, future in enumerate(futures):
            assert torch.equal(future.result(timeout=60), engine(batch[i % 7 : i % 7 + 1 + i % 3]))
        engine.close()


def test_calls_from_several_threads(engine, batch):
    expected = [engine(batch[i : i + 3]) for i in range(7)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: engine(batch[i % 7 : i % 7 + 3]), range(28)))
    assert all(torch.equal(logits, expected[i % 7]) for i, logits in enumerate(found))


def test_input_of_any_layout_is_read_as_it_is_and_left_alone(engine, batch):
    """Machine code reads memory as it lies; a view must not be read as what it is a view of."""
    expected, x = engine(batch[:4]), batch[:4].contiguous(memory_format=torch.channels_last)
    for view in (x, batch[:4].flip(3).flip(3), batch[:4].repeat_interleave(2, 0)[::2]):
        assert torch.equal(engine(view), expected)
    assert torch.equal(x, batch[:4])


def test_logits_stay_when_the_next_batch_runs(engine, batch):
    first = engine(batch[:2])
    kept = first.clone()
    engine(batch[2:4])
    assert torch.equal(first, kept)


def test_logits_are_eagers_but_for_rounding(computing, eager, crops):
    found, expected = in_batches(computing, crops), in_batches(eager, crops)
    assert (0 if computing.precision == "fp32" else 1e-4) <= relative_l2(found, expected) < MOST[computing.precision]
    assert agreement(found, expected) >= LEAST[computing.precision] and pearson(found, expected) >= 0.98


@pytest.mark.soak
def test_agreement_on_all_of_shapes20(computing, eager, shapes20):
    x = torch.stack([reference_crop(sample.image, eager.info.preprocessing) for sample in shapes20])
    found, expected = in_batches(computing, x), in_batches(eager, x)
    assert agreement(found, expected) >= LEAST[computing.precision] and pearson(found, expected) >= 0.98


def test_layers_are_eagers_but_for_rounding(computing, eager, batch):
    expected, found = eager.layers(batch), computing.layers(batch)
    most = 5e-2 if (computing.name, computing.precision) == ("onnx", "int8") else MOST[computing.precision]
    assert list(found) == list(expected) and list(found)[-1] == "logits"
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and tensor.shape == expected[name].shape, name
        assert relative_l2(tensor, expected[name]) < most, name
    twin = 1e-5 if computing.name == "onnx" else 1e-2  # onnx's is the artifact itself
    assert relative_l2(found["logits"], computing(batch)) <= twin


@pytest.mark.parametrize(
    "name, precision",
    [
        pytest.param(*pair.values[0], marks=[*pair.marks, *[pytest.mark.soak] * (pair.values[0][0] == "inductor")])
        for pair in PAIRS
        if pair.values[0][0] not in ("null", "eager")
    ],
)
def test_resnet18_goes_the_same_way(resnet18, crops, name, precision):
    x = crops[:8]
    engine, reference = convert(resnet18, name, precision, calibration=x), convert(resnet18, "eager", "fp32")
    expected, found = reference.layers(x), engine.layers(x)
    folded = {"conv1", "bn1"} if (name, precision) == ("onnx", "int8") else set()  # into the ReLU that follows
    assert list(found) == [layer for layer in expected if layer not in folded]
    assert all(tensor.shape == expected[layer].shape for layer, tensor in found.items())
    if name != "onnx" or precision == "fp32":
        assert all(relative_l2(tensor, expected[layer]) < MOST[precision] for layer, tensor in found.items())
    assert pearson(engine(x), reference(x)) >= 0.98 and relative_l2(found["logits"], engine(x)) < 1e-2
    assert engine.precision_ran == {precision: pytest.approx(1)}


def test_a_file_that_is_cut_in_half_does_not_load(engine, tmp_path):
    if not isinstance(engine, CompiledEngine):
        pytest.skip("reads no file")
    folder = shutil.copytree(artifacts_root() / engine.recipe.folder_name, tmp_path / "copy")
    for path in folder.iterdir():
        if path.name in (CARD, LATER.get(engine.name)):
            continue
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(Exception, match="."):
            type(engine)(folder, engine.info, engine.precision, device="cpu", threads=1)
        path.write_bytes(content)


def test_engine_says_what_it_is(engine, vit_shapes20):
    assert engine.info == vit_shapes20.info
    assert engine.threads >= 1 and engine.device in ("cpu", "cuda") and engine.depth >= 1
    assert sum(engine.precision_ran.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(0, 3, 224, 224, dtype=torch.uint8),
        torch.zeros(1, 3, 224, 224),
        torch.zeros(1, 3, 224, 223, dtype=torch.uint8),
        torch.zeros(3, 224, 224, dtype=torch.uint8),
        torch.zeros(1, 1, 224, 224, dtype=torch.uint8),
        torch.zeros(1, 3, 224, 224, dtype=torch.uint8, device="meta"),
    ],
    ids=["empty", "float", "narrow", "no batch", "grey", "device"],
)
def test_wrong_batches_are_refused(engine, bad):
    for call in (engine, engine.submit):
        with pytest.raises(VitdemoError, match=r"a batch is uint8\[B >= 1, 3, 224, 224\]"):
            call(bad)


def test_eager_fp32_is_timm_on_normalised_input(eager, vit_shapes20, batch):
    preprocessing = vit_shapes20.info.preprocessing
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    with torch.no_grad():
        expected = vit_shapes20.module((batch / 255 - mean) / std)
    torch.testing.assert_close(eager(batch), expected)


def test_bf16_runs_in_bf16_on_a_copy(eager, vit_shapes20):
    engine = convert(vit_shapes20, "eager", "bf16")
    assert engine.precision_ran == {name_in_precision_ran("eager", "bf16"): pytest.approx(1)}
    assert eager.precision_ran == {"fp32": pytest.approx(1)}
    assert {p.dtype for p in vit_shapes20.module.parameters()} == {torch.float32}


def test_precision_ran_is_read_back_not_echoed(vit_shapes20):
    """A module that computes half of its work in float32, whatever is asked for, is caught."""

    class Stubborn(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = torch.nn.AdaptiveAvgPool2d(8)
            self.a, self.b = torch.nn.Linear(192, 192), torch.nn.Linear(192, 192)

        def forward(self, x):
            x = self.a(self.pool(x).flatten(1)).float()
            return torch.nn.functional.linear(x, self.b.weight.float())

    model = Model.from_module(Stubborn(), vit_shapes20.info.preprocessing, name="stubborn")
    ran = {name_in_precision_ran("eager", "bf16"): pytest.approx(0.5), "fp32": pytest.approx(0.5)}
    assert convert(model, "eager", "bf16").precision_ran == ran


def test_flops_by_precision_counts_attention():
    q = torch.zeros(1, 3, 197, 64)
    with torch.no_grad(), FlopsByPrecision() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.flops == {"float32": 2 * 2 * 3 * 197 * 197 * 64}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(engine="tensorflow"), "there are 'eager', 'inductor', 'null', 'onnx', 'openvino'"),
        (dict(precision="fp4"), "the eager engine has 'fp32', 'fp16', 'bf16'"),
        (dict(device="tpu"), "there are auto, cpu, cuda"),
        (dict(threads=0), "at least 1"),
    ],
)
def test_unknown_engine_precision_device(vit_shapes20, arguments, message):
    with pytest.raises(VitdemoError, match=message):
        convert(vit_shapes20, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device(vit_shapes20):
    with pytest.raises(VitdemoError, match="no CUDA device"):
        convert(vit_shapes20, device="cuda")
