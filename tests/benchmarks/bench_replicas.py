"""What replicas cost and gain on one machine: beside the same engine without Ray, in turns, once all are started.
And what it costs that one of them is killed: at most the ranges it had in hand, and its successor's start.

For ViT-B/16 and vit_shapes20 in OpenVINO's int8 and in eager fp32: one process, one replica with all cores, and one
replica per core, each with as many streams as ``evaluate`` chooses. One process is to reach 0.93 of the better
replicas, or as much as they within the interval. All stay alive and wait while another has its turn, Ray's own
processes too; a ratio is the median of the rounds', with the interval that holds the true median with 95 %. Run it as

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
from vitdemo import ImageNetVal, Model, Replicas, convert, data_path, describe_machine, evaluate, load_model
from vitdemo.engines.contract import Engine
from vitdemo.inference.schedule import RANGE_S
from vitdemo.inference.streams import quicker_on_images
from vitdemo.machine import cores, machine_record
from vitdemo.stats import median_interval

KILLS, TARGET = 5, 0.93
ENGINES = [("eager", "fp32"), ("openvino", "int8")]  # a kill is measured with the last
RUN_S, BATCH = 6, 8  # about how long a run takes, on any processor; and the images in a batch


def vit_base(data: ImageNetVal) -> Model:
    """With random weights, and as many outputs as the bundled data set has classes."""
    module = timm.create_model("vit_base_patch16_224", num_classes=len(data.classes))
    preprocessing = load_model("vit_shapes20").info.preprocessing
    options = dict(name="vit_base_patch16_224", classes=data.classes, weights="random")
    return Model.from_module(module, preprocessing, **options)


def measure(name: str, engine: Engine, data: ImageNetVal, rounds: int) -> tuple[list[dict], list[str], int]:
    """Rows, lines for people, and the number of images in a run."""
    top1, streams = {}, {}

    def run(arm: str, replicas: Replicas | None) -> float:
        metrics = evaluate(engine, data, replicas=replicas, limit=images, progress=False).metrics
        assert metrics["images"] == images
        top1[arm] = metrics["top1"]
        streams[arm] = metrics["streams"]
        return metrics["images_per_s"]

    # As for all of ImageNet: these runs are too short for ``evaluate`` to choose.
    _, rates = quicker_on_images(engine, data, 50_000, device_batch_size=BATCH, input_path="fast")
    whole = BATCH * cores()  # so that no core has a batch less to do
    rate = max(rates.values(), default=0)
    images = min(len(data) // whole, max(2, round(RUN_S * rate / whole))) * whole
    with Replicas(engine, data, 1, share=0.5) as one, Replicas(engine, data, cores(), share=0.5) as many:
        arms = {"one process": None, "one replica": one, "one replica per core": many}
        found = take_turns({arm: partial(run, arm, pool) for arm, pool in arms.items()}, images, rounds)
    common = {"model": name, "engine": engine.name, "precision": engine.precision, "rounds": rounds}
    rows = [
        common | {"arm": arm, "images_per_s": turns.median, "top1": top1[arm], "streams": streams[arm]}
        for arm, turns in found.items()
    ]
    best = max(("one replica", "one replica per core"), key=lambda arm: found[arm].median)
    median, low, high = median_interval(ratio(found, "one process", best))
    rows[0] |= {"of_best_replicas": median, "of_best_replicas_low": low, "of_best_replicas_high": high}
    verdict = "met" if median >= TARGET or low <= 1 <= high else "missed"
    line = f"{name} {engine.name} {engine.precision}, one process over {best}: {median:.3f} ({low:.3f} to {high:.3f})"
    rows[0] |= {f"images_per_s_of_{number}_streams": rate for number, rate in rates.items()}
    return rows, [f"{line}, streams {streams['one process']}, target {TARGET}: {verdict}"], images


def cost_of_a_kill(name: str, engine: Engine, data: ImageNetVal, images: int) -> tuple[dict, str]:
    """Seconds that a run takes longer when a replica is killed after a third of it, by turns with undisturbed ones."""
    costs, lost = [], 0
    options = dict(limit=images)
    with Replicas(engine, data, cores(), share=0.5) as pool, TemporaryDirectory() as folder:
        most_s = 2 * RANGE_S + pool.start_s  # two ranges in hand, of RANGE_S each
        evaluate(engine, data, replicas=pool, progress=False, **options)
        for number in range(KILLS):
            undisturbed = evaluate(engine, data, replicas=pool, progress=False, **options).metrics
            kill = partial(os.kill, pool.pids[number % len(pool.pids)], signal.SIGKILL)
            out = Path(folder) / str(number)
            killed = evaluate_while(pool, engine, data, kill, images // 3, out, **options).metrics
            assert killed["correct"] == undisturbed["correct"] and killed["images"] == images
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
    models = {"vit_shapes20": load_model("vit_shapes20"), "vit_base_patch16_224": vit_base(data)}
    rows, lines = [], []
    for name, model in models.items():
        for pair in ENGINES:
            engine = convert(model, *pair)
            found, said, images = measure(name, engine, data, rounds)
            rows += found
            lines += said
        row, line = cost_of_a_kill(name, engine, data, images)
        rows.append(row)
        lines.append(line)
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
