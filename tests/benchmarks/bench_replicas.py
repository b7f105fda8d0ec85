"""What replicas cost and gain on one machine: beside the same engine without Ray, in turns, once all are started.
And what it costs that one of them is killed: at most the ranges it had in hand, and its successor's start.

Two comparisons, each for a ViT-B/16 in int8 and for vit_shapes20: one replica with all cores against one process, and
one replica a core against one process with all cores. All stay alive and wait while another has its turn, Ray's own
processes too, also beside the one process; a ratio is the median of the rounds', with the interval that holds the true
median with 95 %. Run it as

    python -m tests.benchmarks.bench_replicas --out FILE.csv
"""

import argparse
import os
import signal
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
import timm

from tests.benchmarks.turns import ROUNDS, ratio, take_turns, write_results
from tests.inference.on_replicas import evaluate_while
from tests.native import is_native
from vitdemo import ImageNetVal, Model, Replicas, convert, data_path, describe_machine, evaluate, load_model
from vitdemo.engines.contract import Engine
from vitdemo.inference.schedule import RANGE_S
from vitdemo.machine import cores, machine_record
from vitdemo.stats import median_interval

KILLS, IMAGES = 5, {"vit_base_patch16_224": 160, "vit_shapes20": 1000}
TARGETS = {  # (median, lower bound)
    ("vit_base_patch16_224", "one replica"): (0.97, 0.93),
    ("vit_base_patch16_224", "a replica a core"): (0.97, None),
    ("vit_shapes20", "a replica a core"): (0.9, None),
}


def vit_base(data: ImageNetVal) -> Engine:
    """With random weights, and as many outputs as the bundled data set has classes."""
    module = timm.create_model("vit_base_patch16_224", num_classes=len(data.classes))
    preprocessing = load_model("vit_shapes20").info.preprocessing
    options = dict(name="vit_base_patch16_224", classes=data.classes, weights="random")
    return convert(Model.from_module(module, preprocessing, **options), "openvino", "int8")


def measure(name: str, engine: Engine, data: ImageNetVal, rounds: int) -> tuple[list[dict], list[str]]:
    """Rows, and lines for people."""
    top1: dict[str, float] = {}

    def run(arm: str, replicas: Replicas | None) -> float:
        metrics = evaluate(engine, data, replicas=replicas, limit=IMAGES[name], progress=False).metrics
        assert metrics["images"] == IMAGES[name]
        top1[arm] = metrics["top1"]
        return metrics["images_per_s"]

    with Replicas(engine, data, 1, share=0.5) as one, Replicas(engine, data, cores(), share=0.5) as many:
        arms = {"one process": None, "one replica": one, "a replica a core": many}
        found = take_turns({arm: partial(run, arm, pool) for arm, pool in arms.items()}, IMAGES[name], rounds)
    rows, lines = [], []
    for arm, turns in found.items():
        row = {"model": name, "engine": engine.name, "precision": engine.precision, "arm": arm}
        row |= {"images_per_s": turns.median, "rounds": rounds, "top1": top1[arm]}
        if arm != "one process":
            median, low, high = median_interval(ratio(found, arm, "one process"))
            row |= {"of_one_process": median, "of_one_process_low": low, "of_one_process_high": high}
            target, bound = TARGETS.get((name, arm), (None, None))
            missed = target and (median < target or bound and low < bound)
            verdict = f", target {target}: {'missed' if missed else 'met'}" if target else ""
            lines.append(f"{name}, {arm}: {median:.3f} ({low:.3f} to {high:.3f}){verdict}")
        rows.append(row)
    return rows, lines


def cost_of_a_kill(name: str, engine: Engine, data: ImageNetVal) -> tuple[dict, str]:
    """Seconds that a run takes longer when a replica is killed after a third of it, by turns with undisturbed ones."""
    options, costs, lost = dict(limit=IMAGES[name]), [], 0
    with Replicas(engine, data, cores(), share=0.5) as pool, TemporaryDirectory() as folder:
        most_s = 2 * RANGE_S + pool.start_s  # two ranges in hand, of RANGE_S each
        evaluate(engine, data, replicas=pool, progress=False, **options)
        for number in range(KILLS):
            undisturbed = evaluate(engine, data, replicas=pool, progress=False, **options).metrics
            kill = partial(os.kill, pool.pids[number % len(pool.pids)], signal.SIGKILL)
            out = Path(folder) / str(number)
            killed = evaluate_while(pool, engine, data, kill, IMAGES[name] // 3, out, **options).metrics
            assert killed["correct"] == undisturbed["correct"] and killed["images"] == IMAGES[name]
            costs.append(killed["wall_s"] - undisturbed["wall_s"])
            lost += killed["replicas"]["lost"]
    row = {"model": name, "engine": engine.name, "precision": engine.precision, "arm": "a replica killed"}
    row |= {"rounds": KILLS, "top1": killed["top1"], "cost_s": np.median(costs), "cost_s_max": max(costs)}
    row |= {"cost_s_bound": most_s}
    verdict = "met" if max(costs) <= most_s else "missed"
    line = f"{name}, a replica killed, {lost} lost in {KILLS} runs: {np.median(costs):.1f} s longer, at most "
    return row, f"{line}{max(costs):.1f}, bound {most_s:.1f}: {verdict}"


def measure_all(rounds: int = ROUNDS) -> tuple[pd.DataFrame, list[str]]:
    data = ImageNetVal(data_path("shapes20"))
    precision = "bf16" if is_native("openvino", "bf16") else "int8"
    engines = {"vit_shapes20": convert(load_model("vit_shapes20"), "openvino", precision)}
    engines["vit_base_patch16_224"] = vit_base(data)
    rows, lines = [], []
    for name, engine in engines.items():
        found, said = measure(name, engine, data, rounds)
        row, line = cost_of_a_kill(name, engine, data)
        rows += [*found, row]
        lines += [*said, line]
    return pd.DataFrame(rows), lines


@pytest.mark.soak
def test_replicas_cost_no_more_than_they_may():
    _, lines = measure_all()
    print("\n".join(lines))
    assert not [line for line in lines if line.endswith("missed")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    rows, lines = measure_all(arguments.rounds)
    write_results(rows, arguments.out)
    print(describe_machine(machine_record()), *lines, sep="\n")
