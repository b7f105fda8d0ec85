import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vitdemo import machine as clock
from vitdemo.machine import (
    Phases,
    describe_machine,
    free_memory_bytes,
    machine_record,
    memory_bytes,
    now,
    peak_memory_bytes,
)
from vitdemo.stats import paid_once, percentiles_ms, unaccounted_s


def test_percentiles_are_numpys_in_milliseconds():
    seconds = np.random.default_rng(0).exponential(0.01, 500)
    result = percentiles_ms(seconds)
    assert result["count"] == 500
    assert result["p90"] == pytest.approx(np.percentile(seconds, 90) * 1e3, abs=1e-3)
    assert result["p50"] <= result["p90"] <= result["p99"]
    assert percentiles_ms([]) == {"count": 0}


def test_paid_once_is_what_the_first_call_took_beyond_the_others():
    assert paid_once([7.0, 1.0, 1.0, 1.0]) == pytest.approx(6 / 10)
    assert paid_once([7.0, 1.0, 1.0, 5.0]) == pytest.approx(6 / 14)  # a slow call later on is not the first one's
    assert paid_once([1.0, 1.0, 1.0]) == paid_once([0.5, 1.0, 1.0]) == 0
    assert paid_once([3.0]) == paid_once([]) == 0


def test_unaccounted_is_what_the_parts_leave_out():
    assert unaccounted_s(10.0, [1.0, 2.0, 3.0]) == 4
    assert unaccounted_s(6.0, [1.0, 2.0, 3.5]) == 0


def test_phases_add_up_and_survive_exceptions():
    phases, start = Phases(), now()
    for _ in range(3):
        with phases("a"):
            sum(range(1000))
    with pytest.raises(ValueError), phases("b"):
        raise ValueError
    assert set(phases.seconds) == {"a", "b"}
    assert 0 < sum(phases.seconds.values()) <= now() - start


def test_peak_memory_is_this_process_own_in_bytes():
    """A child of a process that has used much memory reports its own peak."""
    block = np.ones(500 << 20, np.uint8)
    assert block[-1] and peak_memory_bytes() > 500 << 20
    code = "from vitdemo.machine import peak_memory_bytes; print(peak_memory_bytes())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 10 << 20 < child < 400 << 20


def test_machine_record_is_complete_and_serialisable():
    record = json.loads(json.dumps(machine_record()))
    assert record["cores"] >= 1 and record["memory_bytes"] > 1e9 and record["versions"]["torch"]
    line = describe_machine(record)
    assert record["cpu"] in line and f"{record['cores']} cores" in line
    assert f"bf16 {record['precisions']['bf16']}" in line


def test_a_container_s_limits_hold(tmp_path, monkeypatch):
    groups = tmp_path / "a" / "b"
    groups.mkdir(parents=True)
    monkeypatch.setattr(clock, "GROUPS", tmp_path)
    monkeypatch.setattr(clock, "OWN_GROUP", tmp_path / "own")
    whole, all_of_it = free_memory_bytes(), memory_bytes()
    all_cores = clock.cores()  # no limits, no files
    (tmp_path / "own").write_text("1:cpu:/\n0::/a/b\n")
    (groups / "cpu.max").write_text("max 100000\n")
    (groups / "memory.max").write_text("max\n")
    assert (clock.cores(), memory_bytes()) == (all_cores, all_of_it), "groups without a limit"
    (tmp_path / "a" / "cpu.max").write_text("50000 100000\n")
    for name, content in {"max": "1000", "current": "900", "stat": "anon 700\ninactive_file 150\n"}.items():
        (tmp_path / "a" / f"memory.{name}").write_text(content)
    assert clock.cores() == 1 and free_memory_bytes() == 250 < whole
    assert memory_bytes() == 1000 < all_of_it


@pytest.mark.trial
@pytest.mark.parametrize("inside", ["docker/4711", ""], ids=["its own", "the root of what it sees"])
def test_07_the_limits_of_the_older_control_groups_hold(tmp_path, monkeypatch, inside):
    all_cores = clock.cores()
    monkeypatch.setattr(clock, "GROUPS", tmp_path)
    monkeypatch.setattr(clock, "OWN_GROUP", tmp_path / "own")
    (tmp_path / "own").write_text("9:memory:/docker/4711\n4:cpu,cpuacct:/docker/4711\n1:name=systemd:/x\n0::/x\n")
    files = {
        "cpu": {"cfs_quota_us": 100_000, "cfs_period_us": 100_000},
        "memory": {"limit_in_bytes": 1 << 30, "usage_in_bytes": 600 << 20, "stat": "rss 7\ntotal_inactive_file 1024"},
    }
    for controller, values in files.items():
        group = tmp_path / controller / inside
        group.mkdir(parents=True)
        for name, value in values.items():
            (group / f"{controller}.{name}").write_text(f"{value}\n")
    assert clock.cores() == 1 and memory_bytes() == 1 << 30
    assert free_memory_bytes() == (1 << 30) - (600 << 20) + 1024
    (tmp_path / "cpu" / inside / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "memory" / inside / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert clock.cores() == all_cores and memory_bytes() > 1 << 30


@pytest.mark.skipif((platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="/proc/cpuinfo elsewhere")
@pytest.mark.parametrize("flag", ["amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni"])
def test_the_machine_names_what_small_numbers_are_quick_by(flag):
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split()
    assert (flag in machine_record()["isa"].split()) == (flag in flags)
