"""Native, emulated, absent: what decides, and what this processor really has."""

import os
import platform
import re
import time
from pathlib import Path

import pytest
import torch

from vitdemo import VitdemoError, convert, find_engines, load_model, precisions, precisions_here
from vitdemo.benchmarking.pairs import Pair, choose_pairs
from vitdemo.doctor import examine
from vitdemo.engines import artifacts
from vitdemo.models.model import FlopsByPrecision
from vitdemo.precisions import MASKS, shares_that_ran, support_of, torch_product, torch_support


@pytest.fixture
def unmasked(monkeypatch):
    """The variables alone: what is loaded already keeps the instructions that it found."""
    for name in MASKS:
        monkeypatch.delenv(name, raising=False)


def product(**seconds):
    """A runtime whose products take so long, by precision; it does not have the others."""
    return lambda precision, shape, threads: precision in seconds and (lambda: time.sleep(seconds[precision])) or None


def never(precision, shape, threads):
    raise AssertionError("the words agree, nothing is to be measured")


def test_words_decide_where_all_say_yes(unmasked):
    assert support_of("bf16", [True, True], never) == "native"


@pytest.mark.parametrize("words", [[True, False], [False]])
def test_a_product_decides_where_they_do_not(unmasked, words):
    assert support_of("bf16", words, product(fp32=0.02, bf16=0.01)) == "native"
    assert support_of("bf16", words, product(fp32=0.01, bf16=0.02)) == "emulated"
    assert support_of("bf16", words, product(fp32=0.01)) == "absent"


@pytest.mark.parametrize("mask", MASKS)
def test_a_product_decides_under_a_mask_which_words_do_not_follow(unmasked, mask, monkeypatch):
    monkeypatch.setenv(mask, "AVX2")
    assert support_of("bf16", [True], product(fp32=0.01, bf16=0.02)) == "emulated"


def test_one_hiccup_decides_nothing(unmasked):
    waits = iter([0.0, 0.2, *[0.001] * precisions.ROUNDS])  # the cold call first

    def hiccups(precision, shape, threads):
        return lambda: time.sleep(next(waits) if precision == "bf16" else 0.01)

    assert support_of("bf16", [False], hiccups) == "native"


def test_an_emulated_precision_is_named_so_in_what_ran():
    ran = shares_that_ran({"bf16": 9, "fp32": 1}, {"fp32": "native", "bf16": "emulated"})
    assert ran == {"bf16 emulated": 0.9, "fp32": 0.1}
    assert shares_that_ran({"int8": 99.1}, {"int8": "native"}, expected=100) == {"int8": 1.0}
    assert shares_that_ran({"int8": 75}, {}, expected=100) == {"int8": 0.75, "unknown": 0.25}


def test_products_multiply_what_they_say():
    assert torch_product("int8", (3, 5, 7), 1) is None
    before = torch.get_num_threads()
    with torch.no_grad(), FlopsByPrecision() as counter:
        torch_product("bf16", (3, 5, 7), before + 1)()
    assert counter.flops == {"bfloat16": 2 * 3 * 5 * 7} and torch.get_num_threads() == before


@pytest.mark.skipif((platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="/proc/cpuinfo elsewhere")
@pytest.mark.skipif(any(os.environ.get(name) for name in MASKS), reason="instructions are masked")
def test_bf16_is_native_where_the_kernel_sees_its_instructions():
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split()
    if not {"avx512_bf16", "amx_bf16"} & set(flags):
        pytest.skip("no bf16 instructions that the kernel sees: a product decides")
    found = {name: support["bf16"] for name, support in precisions_here().items() if "bf16" in support}
    assert found and set(found.values()) == {"native"}


def test_every_engine_answers_for_each_of_its_precisions_and_doctor_says_it(monkeypatch):
    for cls in find_engines().values():
        assert set(cls.support("cpu")) <= set(cls.precisions)
        assert set(cls.support("cpu").values()) <= {"native", "emulated", "absent"}
        assert set(cls.native()) <= set(cls.precisions)
    eager = find_engines()["eager"]
    monkeypatch.setattr(eager, "support", lambda device: {"fp32": "native", "bf16": "emulated"})
    lines, _ = examine()
    assert "  ok       eager: fp32, bf16 (emulated here)" in lines


def test_torch_without_onednn_has_a_product_decide(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "arm64", "bf16": True})
    monkeypatch.setattr(precisions, "torch_product", product(fp32=0.001, bf16=0.003))
    assert torch_support.__wrapped__() == {"fp32": "native", "bf16": "emulated"}


def test_an_engine_that_cannot_be_imported_costs_itself_alone(monkeypatch):
    def broken(device):
        raise ImportError("libopenvino.so: undefined symbol")

    monkeypatch.setattr(find_engines()["openvino"], "support", broken)
    assert "openvino" not in precisions_here() and precisions_here()["eager"]["fp32"] == "native"
    assert Pair("eager", "fp32") in choose_pairs(None)
    lines, _ = examine()
    assert any(line.startswith("  ok       eager: fp32") for line in lines)
    line = "openvino engine: its runtime does not start .libopenvino.so: undefined symbol.; install it again"
    assert any(re.search(line, each) for each in lines)
    artifacts._say_what_is_not_native.cache_clear()  # another test may have asked before
    with pytest.raises(VitdemoError, match=line):
        convert(load_model("vit_shapes20"), "openvino", "fp32")


def test_a_gpu_without_onnx_runtime_is_no_traceback(monkeypatch):
    monkeypatch.setattr("vitdemo.engines.contract.no_cuda", lambda: "")  # as where a GPU computes
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr("vitdemo.engines.onnx.installed_version", lambda name: None)
    assert Pair("eager", "bf16") in choose_pairs(None)
    assert set(precisions_here("cuda")) == {"eager", "inductor"}
