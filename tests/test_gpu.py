"""The acceptance of CUDA, dry: on the CPU, with a device that only seems to be a GPU; and the table of traps."""

import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from tests import gpu
from tests.engines.late_device import LateDevice
from tests.test_races import SIZE, compute
from vitdemo import summary
from vitdemo.benchmarking import bench
from vitdemo.benchmarking.rows import COLUMNS, OK
from vitdemo.engines import pipeline
from vitdemo.engines.eager import EagerEngine
from vitdemo.engines.pipeline import SLOTS, Pipeline, gpu_joules
from vitdemo.paths import REPOSITORY
from vitdemo.plots import plot_overlap

TRAPS = REPOSITORY / "docs" / "cuda.md"


@pytest.mark.parametrize("step", gpu.STEPS)
def test_a_step_passes_and_finds_the_fault_that_is_planted(step, capsys, tmp_path):
    assert gpu.run([step], gpu.Setting(dry=True, fault=""), tmp_path)
    assert not gpu.run([step], gpu.Setting(dry=True, fault=step), None)
    passed, failed = (line for line in capsys.readouterr().out.splitlines() if line.startswith(("PASS", "FAIL")))
    assert passed.startswith(f"PASS {step}") and failed.startswith(f"FAIL {step}")
    assert (tmp_path / "gpu.json").exists()


def test_a_time_out_costs_only_what_torch_compile_had_not_done(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: signal.raise_signal(signal.SIGALRM))
    assert gpu.run(["speed"], gpu.Setting(dry=True, fault=""), tmp_path)
    speed, targets = (pd.read_csv(tmp_path / f"gpu_{name}.csv") for name in ("speed", "targets"))
    late = speed["status"].str.startswith("not measured: TimeIsUp")
    assert set(speed["engine"][late]) == {"timm reduce-overhead", "timm max-autotune"}
    assert set(speed["engine"][~late]) == {"timm eager", "eager"} and (speed["status"][~late] == "ok").all()
    # Nothing is published for the bundled model.
    unknown = targets["target"].str.contains("reduce-overhead|max-autotune|published")
    assert (targets["met"].eq("not measured") == unknown).all()


def test_spans_show_copies_beside_a_graph_but_for_batches_that_are_waited_for():
    fed = Pipeline(LateDevice(1), compute, SIZE, sizes=(4, 2, 1))
    spans = fed.spans(torch.randint(0, 256, (8, 3, *SIZE), dtype=torch.uint8))
    assert (spans["begin_ms"] <= spans["end_ms"]).all() and set(spans["batch"]) == set(range(8))
    # In "compute" there are two copies beside each graph.
    each = {"in": 8, "compute": 24, "out": 8}
    assert spans.groupby(["in_flight", "stream"]).size().to_dict() == {
        (in_flight, stream): count for in_flight in (1, SLOTS) for stream, count in each.items()
    }
    alone, ahead = (gpu.copies_beside(own) for _, own in spans.groupby("in_flight"))
    assert alone == 0 and ahead > 0
    x = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    assert torch.equal(fed.submit(x).result(), compute(x)) and isinstance(fed._device, LateDevice), "as it was"

    panels = plot_overlap(spans).axes
    assert [sum(len(bars.get_paths()) for bars in ax.collections) for ax in panels] == [40, 40]
    assert [f"{SLOTS} in flight" in ax.get_title(loc="left") for ax in panels] == [False, True]


NVML = """
#include <string.h>
extern "C" {
int nvmlInit_v2() { return 0; }
int nvmlDeviceGetHandleByUUID(const char* uuid, void** board) { *board = (void*)7; return strcmp(uuid, "GPU-1-2"); }
int nvmlDeviceGetTotalEnergyConsumption(void* board, unsigned long long* millijoules) {
    static unsigned long long used = 1ull << 40;
    *millijoules = used += 5000;
    return board != (void*)7;
}
}
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_energy_comes_from_nvmls_counter(monkeypatch, tmp_path, vit_shapes20):
    """A library with NVML's functions stands in for the driver's."""
    (tmp_path / "nvml.cpp").write_text(NVML)
    library = tmp_path / "nvml.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, tmp_path / "nvml.cpp"], check=True)
    monkeypatch.setattr(pipeline, "NVML", str(library))
    monkeypatch.setattr(bench, "ENERGY_S", 0.01)
    gpu_is = SimpleNamespace(uuid="1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: gpu_is)
    assert gpu_joules() == (2**40 + 5000) / 1000

    measured = bench.EngineBench(EagerEngine(vit_shapes20, "fp32", device="cpu", threads=1))
    measured.first_call(2)
    assert measured.joules_per_image() is None, "a CPU's energy is in no GPU's counter"
    measured.engine.device = "cuda"
    before = next(measured._turn)
    joules, calls = measured.joules_per_image(), next(measured._turn) - before - 1
    assert calls >= 1 and joules == pytest.approx(5 / (2 * calls))

    row = dict.fromkeys(COLUMNS) | {"status": OK, "turns": "together"}
    assert "joules_per_image" in summary(pd.DataFrame([row | {"joules_per_image": joules}]))
    assert "joules_per_image" not in summary(pd.DataFrame([row])), "of a CPU"

    gpu_is.uuid = "another"
    assert gpu_joules() is None and measured.joules_per_image() is None
    monkeypatch.setattr(pipeline, "NVML", "libthere-is-none.so")
    assert gpu_joules() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match="torch sees no GPU here; --dry needs none"):
        gpu.main()


def test_each_trap_has_its_guard_and_its_test():
    """docs/cuda.md: | trap | guard: `file`: `code` | `tests/file.py::test` |."""
    rows = re.findall(r"^\|(.+?)\|(.+?)\|(.+?)\|$", TRAPS.read_text(encoding="utf-8"), re.MULTILINE)[2:]
    assert len(rows) >= 15
    for trap, guard, tests in rows:
        (file, *codes), ids = re.findall(r"`(.+?)`", guard), re.findall(r"`(tests/.+?)`", tests)
        source = Path(REPOSITORY / file).read_text(encoding="utf-8")
        assert codes and all(code in source for code in codes), f"{trap}: {guard}"
        for each in ids:
            where, name = each.split("::")
            assert f"def {name}(" in Path(REPOSITORY / where).read_text(encoding="utf-8"), each
        assert ids or "not here" in tests, trap
