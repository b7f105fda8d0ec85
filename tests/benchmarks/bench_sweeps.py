"""Whether a sweep's numbers can be trusted: twice the same, in time, and as others measure them.

- Two sweeps of vit_shapes20 in a row: the median of each ratio to eager, one over the other. On a noisy machine they
  differ by more than 5 %; then their intervals must say so, that is, overlap.
- ViT-B/16 with random weights in every engine at batches 1 and 8: the minutes it takes, built before.
- What a sweep's worker measures of eager beside ``torch.utils.benchmark``, of OpenVINO beside benchmark_app, by turns.

Run it as ``python -m tests.benchmarks.bench_sweeps --out FILE.csv``; ``make soak`` holds it to its targets.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.benchmark import Timer

from tests.benchmarks.turns import write_results
from vitdemo import benchmark, convert, describe_machine, load_model, machine_record
from vitdemo.benchmarking.gate import RATIO, SAME, compare
from vitdemo.benchmarking.processes import Worker
from vitdemo.engines.artifacts import artifacts_root
from vitdemo.engines.contract import Engine
from vitdemo.engines.openvino import GRAPH, hint
from vitdemo.machine import cores, now
from vitdemo.stats import median_interval

VIT, TURNS = "vit_base_patch16_224", 9
NAMES = {"eager": "torch.utils.benchmark", "openvino": "benchmark_app"}
REPEATED, MINUTES, AGREED = 0.05, 6.0, 0.05
TOOL_S = 3.0


def repeated(folder: Path) -> pd.DataFrame:
    """Each ratio to eager in two sweeps in a row, its change, and the range of the change by their two intervals."""
    first, second = (benchmark("vit_shapes20", device_batch_sizes=[1, 8], images=100, out=folder / k) for k in "ab")
    return change(first, second)


def change(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    ends = [*SAME, f"{RATIO}_low", f"{RATIO}_high"]
    both = first[ends].merge(second[ends], on=SAME, suffixes=("_first", "_second"))
    found = compare(second, first).merge(both, on=SAME)
    low = found[f"{RATIO}_low_second"] / found[f"{RATIO}_high_first"] - 1
    high = found[f"{RATIO}_high_second"] / found[f"{RATIO}_low_first"] - 1
    what = "repeated: " + found["engine"] + " " + found["precision"]
    return found.assign(what=what, value=found["change"], low=low, high=high)


def in_time(folder: Path) -> pd.DataFrame:
    """Minutes of a sweep of ViT-B/16, once everything is built, and its rows."""
    for kept in ("built", "timed"):
        start = now()
        rows = benchmark(VIT, weights="random", device_batch_sizes=[1, 8], out=folder / kept)
    assert (rows["status"] == "ok").all(), rows["status"]
    return pd.DataFrame([{"what": f"{VIT}: minutes of {len(rows)} rows", "value": (now() - start) / 60}])


def as_others() -> list[dict]:
    """The median latency as a sweep's worker measures it over another tool's, by turns."""
    model = load_model(VIT, "random")
    eager, openvino = convert(model), convert(model, "openvino", "int8")
    rows = []
    for (engine, tool), batch in product(((eager, _torch_s), (openvino, _tool_s)), (1, 8)):
        worker = Worker()
        worker.ask("engine", engine.recipe if engine is eager else engine.recipe.ticket(), cores())
        worker.ask("first_call", batch)
        worker.ask("warm_up", TOOL_S)
        ratios = [np.median(worker.ask("turn", TOOL_S)) / tool(engine, batch) for _ in range(TURNS)]
        worker.end()
        median, low, high = median_interval(np.array(ratios))
        what = f"{engine.name} {engine.precision} over {NAMES[engine.name]}"
        rows.append({"what": what, "device_batch_size": batch, "value": median - 1, "low": low - 1, "high": high - 1})
    return rows


def _torch_s(engine: Engine, batch: int) -> float:
    """Seconds of the median call, by torch.utils.benchmark."""
    x = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    timer = Timer("engine(x)", globals={"engine": engine, "x": x}, num_threads=cores())
    return timer.blocked_autorange(min_run_time=TOOL_S).median


def _tool_s(engine: Engine, batch: int) -> float:
    """Seconds of the median call, as OpenVINO's benchmark_app reports it."""
    folder = artifacts_root() / engine.recipe.folder_name
    command = [str(Path(sys.executable).with_name("benchmark_app")), "-m", str(folder / GRAPH), "-d", "CPU"]
    command += ["-hint", "latency", "-api", "sync", "-infer_precision", hint(engine.precision)]
    command += ["-data_shape", f"[{batch},3,224,224]", "-t", str(int(TOOL_S)), "-inference_only"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(re.search(r"Median:\s+([\d.]+) ms", done.stdout).group(1)) / 1e3


def measure() -> pd.DataFrame:
    with tempfile.TemporaryDirectory() as folder:
        rows = [in_time(Path(folder)), repeated(Path(folder)), pd.DataFrame(as_others())]
    keep = ["what", "device_batch_size", "value", "low", "high", f"{RATIO}_baseline", RATIO]
    return pd.concat(rows, ignore_index=True).reindex(columns=keep)


def misses(rows: pd.DataFrame) -> list[str]:
    limit = rows["what"].map(lambda what: MINUTES if "minutes" in what else AGREED if "over" in what else REPEATED)
    overlap = rows["what"].str.startswith("repeated") & (rows["low"] <= 0) & (rows["high"] >= 0)
    late = rows[~(rows["value"].abs() <= limit) & ~overlap]  # nothing measured is a miss too
    return [f"{row.what}, batch {row.device_batch_size}: {row.value:.3f}" for row in late.itertuples()]


@pytest.mark.soak
def test_a_sweep_can_be_trusted():
    rows = measure()
    print(rows.to_string())
    assert not misses(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = measure()
    write_results(found, arguments.out)
    print(describe_machine(machine_record()), found.to_string(), *misses(found), sep="\n")
