"""The schedule of an engine on a GPU, driven on a device that runs everything late and in an order from a seed."""

import pytest
import torch

from tests.engines.late_device import LateDevice
from vitdemo.engines.pipeline import SLOTS, WAITS, Pipeline

SIZE = (3, 2, 2)
SEEDS, SEEDS_TO_FAIL = 1000, 50


def compute(x: torch.Tensor) -> torch.Tensor:
    """Logits that tell which pixels they are of."""
    return torch.stack([x.float().sum((1, 2, 3)), x[:, 0, 0, 0].float()], 1)


def answers_of(seed: int, without: str | None = None) -> bool:
    """Whether a run of batches, in flight two at a time as in ``predict``, gives each its own logits.

    The pixels of a batch are overwritten as soon as its result is there, as decoding does.
    """
    torch.manual_seed(seed)
    device = LateDevice(seed, without)
    pipeline = Pipeline(device, compute, SIZE, sizes=(4, 2, 1))
    flying, right = [], True

    def finish() -> bool:
        x, expected, future = flying.pop(0)
        found = future.result()
        x.fill_(99)
        return torch.equal(found, expected)

    for count in (4, 3, 1, 4, 2, 4, 9, 4):
        x = torch.randint(0, 256, (count, *SIZE), dtype=torch.uint8)
        flying.append((x, compute(x), pipeline.submit(x)))
        if len(flying) == SLOTS:
            right &= finish()
    while flying:
        right &= finish()
    pipeline.close()
    assert without or device.waits == set(WAITS)
    return right


def test_every_batch_gets_its_own_logits_in_any_order_that_the_waits_allow():
    assert all(answers_of(seed) for seed in range(SEEDS))


@pytest.mark.parametrize("name", WAITS)
def test_each_wait_is_needed(name):
    assert not all(answers_of(seed, without=name) for seed in range(SEEDS_TO_FAIL))
