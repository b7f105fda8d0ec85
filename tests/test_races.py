"""The schedule of an engine on a GPU, driven on a device that runs everything late and in an order from a seed."""

import subprocess
import sys

import pytest
import torch

from tests.engines.late_device import LateDevice
from vitdemo.engines.artifacts import Recipe
from vitdemo.engines.eager import EagerEngine
from vitdemo.engines.pipeline import SLOTS, WAITS, Pipeline

SIZE = (3, 2, 2)
SEEDS, SEEDS_TO_FAIL = 1000, 50
COUNTS = (4, 3, 1, 4, 2, 4, 9, 4)


def compute(x: torch.Tensor) -> torch.Tensor:
    """Logits that tell which pixels they are of."""
    return torch.stack([x.float().sum((1, 2, 3)), x[:, 0, 0, 0].float()], 1)


def answers_right(device, counts=COUNTS, sizes=(4, 2, 1)) -> bool:
    """Whether a run of batches, in flight two at a time as in ``predict``, gives each its own logits.

    The pixels of a batch are overwritten as soon as its result is there, as decoding does.

    Args:
        device: what runs them.
        counts: images in each batch.
        sizes: as at ``Pipeline``.
    """
    pipeline = Pipeline(device, compute, SIZE, sizes=sizes)
    flying, right = [], True

    def finish() -> bool:
        x, expected, future = flying.pop(0)
        found = future.result()
        x.fill_(99)
        return torch.equal(found, expected)

    for count in counts:
        x = torch.randint(0, 256, (count, *SIZE), dtype=torch.uint8)
        x = x.pin_memory() if torch.cuda.is_available() else x
        flying.append((x, compute(x), pipeline.submit(x)))
        if len(flying) == SLOTS:
            right &= finish()
    while flying:
        right &= finish()
    pipeline.close()
    return right


def late(seed: int, without: str | None = None) -> LateDevice:
    torch.manual_seed(seed)
    return LateDevice(seed, without)


def test_every_batch_gets_its_own_logits_in_any_order_that_the_waits_allow():
    for seed in range(SEEDS):
        device = late(seed)
        assert answers_right(device) and device.waits == set(WAITS)


@pytest.mark.parametrize("name", WAITS)
def test_each_wait_is_needed(name):
    assert not all(answers_right(late(seed, name)) for seed in range(SEEDS_TO_FAIL))


@pytest.mark.parametrize("size", range(1, 10))
def test_a_batch_of_any_size_gets_the_models_logits(size, vit_shapes20):
    """Filled up to the next size of a graph, cut again, and in parts where it is larger than all of them."""
    x = vit_shapes20.info.random_pixels(size)
    engine = EagerEngine(vit_shapes20, "fp32", device="cpu", threads=1)
    expected = engine(x)
    engine.captured(engine._module, LateDevice(size), sizes=(4, 2, 1))
    for _ in range(2):
        torch.testing.assert_close(engine(x), expected, rtol=1e-4, atol=1e-4)
        engine.close()


def test_a_fault_on_the_device_reaches_its_own_batch():
    def failing(x):
        if x[0, 0, 0, 0] == 13:
            raise RuntimeError("an illegal memory access")
        return compute(x)

    pipeline = Pipeline(LateDevice(0), failing, SIZE, sizes=(1,))
    with pytest.raises(RuntimeError, match="illegal"):
        pipeline.submit(torch.full((1, *SIZE), 13, dtype=torch.uint8)).result()


def test_nothing_starts_cuda_where_processes_fork():
    code = "import vitdemo.benchmarking.preload, torch; print(torch.cuda.is_initialized())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_an_artifact_is_the_gpus_it_was_built_for(vit_shapes20, monkeypatch):
    keys = set()
    for name in ("an H100", "an H200"):
        monkeypatch.setattr("vitdemo.engines.artifacts.gpu_record", lambda name=name: {"name": name})
        keys.add(Recipe.of(vit_shapes20, EagerEngine, "fp32", "cuda").key)
    keys.add(Recipe.of(vit_shapes20, EagerEngine, "fp32", "cpu").key)
    assert len(keys) == 3


def test_the_engine_has_weights_of_its_own(vit_shapes20):
    """What is captured holds the addresses of its weights; the caller's model may be trained on meanwhile."""
    engine = EagerEngine(vit_shapes20, "bf16", device="cpu", threads=1)
    theirs = {tensor.data_ptr() for tensor in vit_shapes20.module.parameters()}
    assert theirs.isdisjoint(tensor.data_ptr() for tensor in engine._module.parameters())
