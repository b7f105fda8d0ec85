"""Processors that are not here: instructions are masked in a process of its own, before its runtimes look for them.

oneDNN, in torch and in OpenVINO, obeys ONEDNN_MAX_CPU_ISA, torch's own kernels ATEN_CPU_CAPABILITY. ONNX Runtime and
OpenVINO's fp32 products (MLAS both) ask the processor itself and obey nothing: their speed under a mask is this
processor's. `make masks` runs the engines' tests and the notebooks under the same masks.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from vitdemo import convert, evaluate
from vitdemo.precisions import MASKS as VARIABLES

MASKS = {
    "AVX512 with VNNI": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
BF16 = {  # which an unmasked AVX512 with bf16 would have everywhere
    "AVX512 with VNNI": {"eager": "emulated", "inductor": "emulated", "openvino": "emulated"},
    "AVX2": {"eager": "emulated", "inductor": "emulated", "openvino": "absent"},
}

SEEN = """
import json, sys
import timm, torch
from vitdemo import (
    ImageNetVal, Model, VitdemoError, convert, data_path, describe_machine, evaluate, load_model, machine_record,
    precisions_here,
)
from vitdemo.benchmarking.pairs import choose_pairs

vit, images = load_model("vit_shapes20"), ImageNetVal(data_path("shapes20"))
int8 = evaluate(convert(vit, "openvino", "int8"), images, limit=64, progress=False).metrics
torch.manual_seed(0)
module = timm.models.VisionTransformer(embed_dim=32, depth=2, num_heads=2, num_classes=9)
small, named, x = Model.from_module(module, vit.info.preprocessing, name="small_vit"), {}, torch.zeros(2, 3, 224, 224)
for name in ("eager", "openvino"):
    for _ in range(2):
        try:
            engine = convert(small, name, "bf16")
            assert engine(x.byte()).isfinite().all()
            named[name] = engine.precision_ran
        except VitdemoError as error:
            named[name] = str(error)
seen = {"int8": {name: int8[name] for name in ("images", "correct", "precision_ran")}, "named": named}
seen |= {"support": precisions_here(), "machine": describe_machine(machine_record())}
seen |= {"chosen": [pair.precision for pair in choose_pairs(None)]}
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def unmasked(vit_shapes20, shapes20) -> int:
    """How many of 64 images int8 gets right with all instructions of this processor."""
    engine = convert(vit_shapes20, "openvino", "int8")
    return evaluate(engine, shapes20, limit=64, progress=False).metrics["correct"]


@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="needs AVX512, to be masked")
@pytest.mark.skipif(any(map(os.environ.get, VARIABLES)), reason="instructions are masked already")
@pytest.mark.parametrize("mask", MASKS)
def test_a_processor_without_bf16(mask, unmasked):
    environment = os.environ | MASKS[mask]
    done = subprocess.run([sys.executable, "-c", SEEN], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])

    ran = seen["int8"]["precision_ran"]
    assert set(ran) == {"int8", "fp32"} and ran["int8"] > 0.9, "what NNCF leaves out runs in what is native"
    print(f"int8 under {mask}: {seen['int8']['correct']} of 64, {unmasked} without")
    assert seen["int8"]["images"] == 64 and seen["int8"]["correct"] >= unmasked - 1, "int8 saturates"

    found = {name: support["bf16"] for name, support in seen["support"].items() if "bf16" in support}
    assert found == {name: support for name, support in BF16[mask].items() if name in found}
    assert set(seen["chosen"]) == {"fp32", "int8"}, "nobody chooses an emulated precision by default"
    assert ", bf16 emulated, " in seen["machine"]

    assert set(seen["named"]["eager"]) == {"bf16 emulated"}
    assert done.stderr.count("eager bf16: emulated here, slower than fp32") == 1
    if BF16[mask]["openvino"] == "emulated":
        assert set(seen["named"]["openvino"]) == {"bf16 emulated"}
        assert done.stderr.count("openvino bf16: emulated here, slower than fp32") == 1
    else:
        assert seen["named"]["openvino"].startswith("openvino bf16: absent here")
        assert "native to it: 'fp32', 'int8'" in seen["named"]["openvino"]
