import json

import numpy as np
import pytest

from vitdemo.measure.clock import Phases, describe_machine, machine_record, now, peak_memory_bytes, percentiles_ms


def test_percentiles_are_numpys_in_milliseconds():
    seconds = np.random.default_rng(0).exponential(0.01, 500)
    result = percentiles_ms(seconds)
    assert result["count"] == 500
    assert result["p90"] == pytest.approx(np.percentile(seconds, 90) * 1e3, abs=1e-3)
    assert result["p50"] <= result["p90"] <= result["p99"]
    assert percentiles_ms([]) == {"count": 0}


def test_phases_add_up_and_survive_exceptions():
    phases, start = Phases(), now()
    for _ in range(3):
        with phases("a"):
            sum(range(1000))
    with pytest.raises(ValueError), phases("b"):
        raise ValueError
    assert set(phases.seconds) == {"a", "b"}
    assert 0 < sum(phases.seconds.values()) <= now() - start


def test_peak_memory_is_this_process_in_bytes():
    before = peak_memory_bytes()
    block = np.ones(200 << 20, np.uint8)
    assert block[-1] and peak_memory_bytes() >= before
    assert 50e6 < peak_memory_bytes() < 200e9


def test_machine_record_is_complete_and_serialisable():
    record = json.loads(json.dumps(machine_record()))
    assert record["cores"] >= 1 and record["memory_bytes"] > 1e9 and record["versions"]["torch"]
    line = describe_machine(record)
    assert record["cpu"] in line and f"{record['cores']} cores" in line
