"""The engines' contract, for every engine that is found."""

import pytest
import torch

from tests.native import name_in_precision_ran, unless_native
from vitdemo import Model, VitdemoError, convert, find_engines, reference_crop
from vitdemo.models.model import FlopsByPrecision

PAIRS = [
    pytest.param((name, precision), marks=unless_native(name, precision), id=f"{name}-{precision}")
    for name, cls in find_engines().items()
    for precision in cls.precisions
]


@pytest.fixture(scope="module")
def batch(shapes20, vit_shapes20) -> torch.Tensor:
    return torch.stack([reference_crop(shapes20[i].jpeg, vit_shapes20.info.preprocessing) for i in range(9)])


@pytest.fixture(scope="module", params=PAIRS)
def engine(request, vit_shapes20):
    engine = convert(vit_shapes20, *request.param)
    yield engine
    engine.close()


def test_registry_finds_each_file():
    assert {"eager", "null"} <= set(find_engines())


def test_any_batch_from_one_engine(engine, batch):
    whole = engine(batch)
    assert whole.dtype == torch.float32 and whole.shape == (9, 20) and whole.device.type == "cpu"
    for size in (1, 2, 5):
        torch.testing.assert_close(engine(batch[:size]), whole[:size], atol=5e-2, rtol=2e-2)


def test_submit_gives_what_a_call_gives(engine, batch):
    futures = [engine.submit(batch[i : i + 3]) for i in (0, 3, 6)]
    expected = torch.cat([engine(batch[i : i + 3]) for i in (0, 3, 6)])
    assert torch.equal(torch.cat([future.result() for future in futures]), expected)


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


def test_bf16_runs_in_bf16_on_a_copy(eager, vit_shapes20, batch):
    engine = convert(vit_shapes20, "eager", "bf16")
    assert engine.precision_ran == {name_in_precision_ran("eager", "bf16"): pytest.approx(1)}
    assert eager.precision_ran == {"fp32": pytest.approx(1)}
    assert {p.dtype for p in vit_shapes20.module.parameters()} == {torch.float32}
    difference = (engine(batch) - eager(batch)).norm() / eager(batch).norm()
    assert 1e-5 < difference < 2e-2  # rounded, and no more than rounded


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
        (dict(precision="fp4"), "the eager engine has 'fp32', 'bf16'"),
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
