"""The roof: sane, kept, and above what a model reaches."""

import json
import math
import re
import time

import pytest

from vitdemo import Model, VitdemoError, find_engines
from vitdemo.engines import contract
from vitdemo.engines import roof as module
from vitdemo.engines.eager import EagerEngine
from vitdemo.engines.roof import Products, linear_shapes, machine_roof
from vitdemo.machine import installed_version
from vitdemo.paths import cache_root


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Quick products, in a cache of their own."""
    monkeypatch.setattr(module, "SQUARE", ((256, 256, 256),))
    monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setenv("VITDEMO_CACHE", str(tmp_path))


def test_a_roof_is_measured_once_and_kept(small):
    first = machine_roof("fp32", [(64, 512, 128)])
    assert 1e9 < first.flops_per_s < 1e15 and first.shape in ((256, 256, 256), (64, 512, 128))
    assert first.runtime in ("eager", "openvino") and "fp32" in str(first)
    assert machine_roof("fp32", [(64, 512, 128)]) == first
    assert len(json.loads((cache_root() / "roof.json").read_text())) == 1
    machine_roof("fp32")  # other shapes: another roof
    assert len(json.loads((cache_root() / "roof.json").read_text())) == 2


def test_a_roof_that_an_engine_exceeds_is_measured_again(small):
    kept = cache_root() / "roof.json"
    machine_roof("fp32")
    kept.write_text(re.sub(r'"flops_per_s": [\d.e+]+', '"flops_per_s": 1.0', kept.read_text()))
    assert machine_roof("fp32").flops_per_s == 1.0
    assert machine_roof("fp32", reached=1.05).flops_per_s == 1.0, "a few per cent more are noise"
    assert machine_roof("fp32", reached=2.0).flops_per_s > 1e9 and machine_roof("fp32").flops_per_s > 1e9


def test_a_damaged_file_is_measured_anew(small):
    (cache_root() / "roof.json").write_text("{")
    assert machine_roof("fp32").flops_per_s > 1e9


@pytest.mark.skipif(installed_version("openvino") is None, reason="needs openvino")
def test_int8_needs_openvino(small, monkeypatch):
    assert machine_roof("int8").runtime == "openvino"
    monkeypatch.setattr(contract, "installed_version", lambda name: None)
    with pytest.raises(VitdemoError, match="no roof in int8 here: nothing installed has it natively"):
        machine_roof("int8", reached=math.inf)


def test_an_emulated_precision_has_no_roof(small, monkeypatch):
    for cls in find_engines().values():
        monkeypatch.setattr(cls, "support", lambda device: {"bf16": "emulated"})
    monkeypatch.setattr(EagerEngine, "product", lambda *_: pytest.fail("it would take minutes"))
    with pytest.raises(VitdemoError, match="no roof in bf16 here"):
        machine_roof("bf16")


def test_a_product_that_takes_long_is_called_once(monkeypatch):
    calls = []

    def product(precision, shape, threads):
        return lambda: (calls.append(shape), time.sleep(0.001 * shape[0]))

    monkeypatch.setattr(EagerEngine, "product", product)
    monkeypatch.setattr(module, "find_engines", lambda: {"eager": EagerEngine})
    monkeypatch.setattr(module, "precisions_here", lambda device: {"eager": {"fp32": "native"}})
    monkeypatch.setattr(module, "LONGEST_S", 0.1)
    roof = Products("fp32", [(10, 1, 1), (20, 1, 1), (200, 1, 10**9)]).best(seconds=0.2, keep=1)
    assert calls.count((200, 1, 10**9)) == 1 and roof.shape in ((10, 1, 1), (20, 1, 1))


def test_linear_shapes_are_the_models(vit_shapes20):
    tokens, width = 197, 128
    shapes = linear_shapes(vit_shapes20, batch=2)
    assert shapes[:4] == [
        (2 * tokens, width, 3 * width),
        (2 * tokens, width, width),
        (2 * tokens, width, 4 * width),
        (2 * tokens, 4 * width, width),
    ]
    assert shapes[4:] == [(2, width, 20)]
    assert isinstance(vit_shapes20, Model) and not vit_shapes20.module._forward_hooks
