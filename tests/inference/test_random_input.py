"""The random-input test: what it counts, what is cold, and that nothing is left running."""

import threading

import pytest
import torch

from vitdemo import convert, run_random_input


def test_an_engine_is_cold_once(vit_shapes20):
    engine = convert(vit_shapes20, "eager", "fp32")
    cold, warm = (run_random_input(engine, device_batch_size=3, seconds=0.2) for _ in range(2))
    assert cold["first_run_s"] >= engine.load_s + cold["second_run_s"] / 10
    assert cold["compile_s"] == pytest.approx(cold["first_run_s"] - cold["second_run_s"])
    assert warm["first_run_s"] is None and warm["compile_s"] is None
    for run in (cold, warm):
        assert run["images"] >= 3 * 10 and run["images"] % 3 == 0
        assert run["images_per_s"] == pytest.approx(run["images"] / run["inference_s"])
        assert run["latency_ms"]["count"] >= 10
        assert run["streams"] in (1, engine.threads)
    assert not [t for t in threading.enumerate() if t.name.startswith("engine")]


class Noting:
    """An engine that notes what it is given and how many batches are in flight."""

    device, depth, load_s, has_run, streams, threads = "cpu", 3, 0.5, False, 1, 2

    def __init__(self, info):
        self.info, self.given, self.in_flight, self.most = info, [], 0, 0

    def __call__(self, x):
        self.has_run = True
        self.given.append(x)
        return torch.zeros(len(x), 20)

    def submit(self, x):
        self(x)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        return self  # what a future does it does too

    def result(self):
        self.in_flight -= 1

    def close(self):
        self.closed = True


def test_batches_in_flight_and_rotated_pixels(vit_shapes20):
    engine = Noting(vit_shapes20.info)
    run = run_random_input(engine, device_batch_size=2, seconds=0.05)
    assert engine.most == engine.depth and engine.closed and not engine.in_flight
    assert {tuple(x.shape) for x in engine.given} == {(2, *vit_shapes20.info.preprocessing.input_size)}
    assert len({x.data_ptr() for x in engine.given}) == 4 and engine.given[0].float().std() > 70
    assert run["first_run_s"] > 0.5
