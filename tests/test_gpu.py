"""The acceptance of CUDA, dry: on the CPU, with a device that only seems to be a GPU; and the table of traps."""

import re
from pathlib import Path

import pytest
import torch

from tests import gpu
from vitdemo.paths import REPOSITORY

TRAPS = REPOSITORY / "docs" / "cuda.md"


@pytest.mark.parametrize("step", gpu.STEPS)
def test_a_step_passes_and_finds_the_fault_that_is_planted(step, capsys, tmp_path):
    assert gpu.run([step], gpu.Setting(dry=True, fault=""), tmp_path)
    assert not gpu.run([step], gpu.Setting(dry=True, fault=step), None)
    passed, failed = (line for line in capsys.readouterr().out.splitlines() if line.startswith(("PASS", "FAIL")))
    assert passed.startswith(f"PASS {step}") and failed.startswith(f"FAIL {step}")
    assert (tmp_path / "gpu.json").exists()


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
