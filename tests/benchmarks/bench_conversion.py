"""Every engine in every precision, one against the other: ViT-B/16 at 224, random weights, batches of 1 and 8.

Each model-engine pair lives in a worker process of its own. They take turns in rounds, all alive; who is not at work
is stopped, so that no idle thread spins. In the same rounds run OpenVINO's models driven by a bare script, its own
benchmark tool, and plain matrix products, whose best is the roof. A ratio is the median of its rounds' ratios, with
an interval that holds the true median 19 times in 20. Run it as
``python -m tests.benchmarks.bench_conversion --out FILE.csv``; ``make soak`` holds it to its targets.
"""

import argparse
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from tqdm.auto import tqdm

from vitdemo import VitdemoError, convert, find_engines, load_model
from vitdemo.engines.artifacts import artifacts_root
from vitdemo.engines.openvino import GRAPH, hint, import_silently
from vitdemo.engines.roof import SQUARE, Products, linear_shapes
from vitdemo.inference.predictions import write_json
from vitdemo.machine import cores, describe_machine, installed_version, machine_record, now
from vitdemo.paths import replacing
from vitdemo.stats import median_interval

MODEL = "vit_base_patch16_224.augreg2_in21k_ft_in1k"
BATCHES = (1, 8)
ROUNDS, TURN_S = 9, 1.5
PACKAGES = ("openvino", "nncf", "onnxruntime")
SCRIPT, TOOL, ROOF = "openvino, bare script", "openvino, benchmark_app", "roof"

EQUAL, MIXED_FP32, MIXED_BF16 = (
    "speedup_equal_precision",
    "speedup_mixed_over_eager_fp32",
    "speedup_mixed_over_eager_bf16",
)
OF_SCRIPT, OF_TOOL, OF_ROOF = "of_bare_script", "of_benchmark_app", "of_roof"
# Of OpenVINO's rows, by precision: the least value at batch 1 and at batch 8.
TARGETS = {
    "fp32": {EQUAL: (2.8, 1.9), OF_ROOF: (0.95, 0.95)},
    "bf16": {EQUAL: (1.3, 1.15), OF_ROOF: (0.90, 0.90)},
    "int8": {MIXED_FP32: (8.0, 6.5), MIXED_BF16: (2.2, 2.0), OF_ROOF: (0.75, 0.75)},
}
KEPT, LOAD_OF_BUILD = 0.97, 0.1  # the least of the script's and the tool's rate; the most that loading may take


@dataclass(frozen=True)
class Arm:
    """Something that takes turns: an engine by its name, or SCRIPT, TOOL (these with an artifact) or ROOF."""

    engine: str
    precision: str
    artifact: Path | None = None


Turn = Callable[[int, float], list[float]]  # batch, seconds to fill -> seconds of each call (ROOF: of a FLOP)


# What the workers do.


def engine_turns(arm: Arm) -> tuple[dict, Turn]:
    engine = convert(load_model(MODEL, "random"), arm.engine, arm.precision)
    engine(pixels(1))
    facts = {
        "build_s": engine.card.get("build_s"),
        "load_s": engine.load_s,
        "precision_ran": engine.precision_ran,
        "flops_per_image": engine.info.flops_per_image,
        "artifact": next(artifacts_root().glob(f"*-{engine.card['key'][:16]}"), None),
    }
    return facts, lambda batch, seconds: timed(engine, pixels(batch), seconds)


def script_turns(arm: Arm) -> tuple[dict, Turn]:
    """As short as OpenVINO's own calls allow: the input is set once, the output is left where it is."""
    openvino = import_silently("openvino")
    options = {"INFERENCE_PRECISION_HINT": hint(arm.precision), "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.compile_model(arm.artifact / GRAPH, "CPU", options).create_infer_request()

    def turn(batch: int, seconds: float) -> list[float]:
        request.set_input_tensor(openvino.Tensor(pixels(batch).numpy()))
        return timed(lambda _: request.infer(), None, seconds)

    return {}, turn


def roof_turns(arm: Arm) -> tuple[dict, Turn]:
    """Plain matrix products, the square ones and the model's own; of a turn the fastest is kept."""
    model, products = load_model(MODEL, "random"), {}

    def turn(batch: int, seconds: float) -> list[float]:
        if batch not in products:
            products[batch] = Products(arm.precision, {*SQUARE, *linear_shapes(model, batch)})
        return [1 / products[batch].best(seconds).flops_per_s]

    return {}, turn


def pixels(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, generator=generator)


def timed(call: Callable, x, seconds: float) -> list[float]:
    """Seconds of each call, at least 2, after one that is not kept."""
    call(x)
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < seconds:
        start = now()
        call(x)
        taken.append(now() - start)
    return taken


def work(arm: Arm, pipe: Connection, cache: str) -> None:
    """A worker's life: facts once, or why there are none; then the answer to each turn it is given."""
    os.environ["VITDEMO_CACHE"] = cache
    turns = {SCRIPT: script_turns, ROOF: roof_turns}.get(arm.engine, engine_turns)
    try:
        facts, turn = turns(arm)
    except VitdemoError as error:
        pipe.send({"missing": str(error)})
        return
    pipe.send(facts)
    while True:
        pipe.send(turn(*pipe.recv()))


class Worker:
    """A process for one arm, stopped except while it is waited for."""

    def __init__(self, arm: Arm, cache: str):
        self.pipe, end = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=work, args=(arm, end, cache), daemon=True)
        self.process.start()
        end.close()
        self.facts = self.pipe.recv()
        self.control = psutil.Process(self.process.pid)
        self.control.suspend()

    def turn(self, batch: int, seconds: float) -> list[float]:
        self.control.resume()
        self.pipe.send((batch, seconds))
        answer = self.pipe.recv()
        self.control.suspend()
        return answer

    def end(self) -> None:
        self.process.kill()  # SIGTERM would wait for it to be resumed
        self.process.join()


def tool_turn(arm: Arm, batch: int, seconds: float) -> list[float]:
    """OpenVINO's benchmark_app, its input filled once as the bare script's is; gives its median alone."""
    command = [str(Path(sys.executable).with_name("benchmark_app")), "-m", str(arm.artifact / GRAPH), "-d", "CPU"]
    command += ["-hint", "latency", "-api", "sync", "-infer_precision", hint(arm.precision), "-inference_only"]
    command += ["-data_shape", f"[{batch},3,224,224]", "-t", str(round(seconds))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(re.search(r"Median:\s+([\d.]+) ms", done.stdout).group(1)) / 1e3]


# What the rounds give.

Seconds = dict[tuple[Arm, int], list[list[float]]]  # (arm, batch) -> one list per round, of each call


def measure(rounds: int = ROUNDS, turn_s: float = TURN_S) -> tuple[pd.DataFrame, dict]:
    """The table, one row per arm and a batch, and what the machine did besides."""
    workers: dict[Arm, Worker | None] = {}
    noise = Noise()
    with tempfile.TemporaryDirectory() as cache:  # empty: what is built is built now
        try:
            for arm in tqdm(engine_arms(), desc="engines built"):
                start(arm, workers, cache)
            for arm in [arm for arm in workers if arm.engine == "openvino"]:
                artifact = workers[arm].facts["artifact"]
                start(Arm(SCRIPT, arm.precision, artifact), workers, cache)
                workers[Arm(TOOL, arm.precision, artifact)] = None  # a program that is started for each turn
                start(Arm(ROOF, arm.precision), workers, cache)
            seconds = take_turns(workers, BATCHES, rounds, turn_s)
            facts = {arm: worker.facts for arm, worker in workers.items() if worker}
            rows = table(seconds, facts)
            for row in rows[rows[OF_ROOF] > 1].itertuples():  # the roof was measured low: both again, side by side
                pair = {arm: workers[arm] for arm in (Arm(row.engine, row.precision), Arm(ROOF, row.precision))}
                again = table(take_turns(pair, (row.batch,), rounds, turn_s), facts)
                rows.loc[row.Index, again.filter(like=OF_ROOF).columns] = again.filter(like=OF_ROOF).iloc[0]
            return rows, noise.seen()
        finally:
            for worker in filter(None, workers.values()):
                worker.end()


def engine_arms() -> list[Arm]:
    found = sorted(find_engines().items())
    return [Arm(name, precision) for name, engine in found if name != "null" for precision in engine.precisions]


def start(arm: Arm, workers: dict[Arm, Worker | None], cache: str) -> None:
    """Twice for what is built, so that a process loads the artifact that did not build it."""
    worker = Worker(arm, cache)
    if worker.facts.get("build_s"):
        worker.end()
        worker = Worker(arm, cache)
    if "missing" in worker.facts:
        tqdm.write(f"{arm.engine} {arm.precision}: left out ({worker.facts['missing']})", file=sys.stderr)
        worker.end()
    else:
        workers[arm] = worker


def take_turns(workers: dict[Arm, Worker | None], batches: Sequence[int], rounds: int, turn_s: float) -> Seconds:
    """The first round, which warms up, is not kept."""
    seconds: Seconds = {(arm, batch): [] for batch in batches for arm in workers}
    with tqdm(total=len(seconds) * (rounds + 1), desc="turns") as bar:
        for batch in batches:
            for _ in range(rounds + 1):
                for arm, worker in workers.items():
                    turn = worker.turn(batch, turn_s) if worker else tool_turn(arm, batch, turn_s)
                    seconds[arm, batch].append(turn)
                    bar.update()
    return {key: turns[1:] for key, turns in seconds.items()}


def table(seconds: Seconds, facts: dict[Arm, dict]) -> pd.DataFrame:
    rounds = {
        (arm.engine, arm.precision, batch): np.array([statistics.median(turn) for turn in turns])
        for (arm, batch), turns in seconds.items()
    }
    flops = next(fact["flops_per_image"] for fact in facts.values() if "flops_per_image" in fact)
    rows = []
    for (arm, batch), turns in seconds.items():
        taken = rounds[arm.engine, arm.precision, batch]
        row = {"engine": arm.engine, "precision": arm.precision, "batch": batch}
        if arm.engine == ROOF:
            row["tflops"] = statistics.median(1e-12 / taken)
        else:
            calls = np.concatenate(turns)
            row |= {"p50_ms": np.median(calls) * 1e3, "images_per_s": batch * len(calls) / calls.sum()}
            row["tflops"] = statistics.median(batch * flops * 1e-12 / taken)
            roof = rounds.get((ROOF, arm.precision, batch))
            row |= {} if roof is None else interval(OF_ROOF, batch * flops * roof / taken)
            row["accuracy"] = "not measured (random weights)"
        row["spread"] = np.ptp(np.quantile(taken, (0.25, 0.75))) / np.median(taken)
        if arm.engine not in (ROOF, SCRIPT, TOOL):
            row |= ratios(arm, batch, rounds) | built(facts[arm])
        rows.append(row)
    return pd.DataFrame(rows)


def ratios(arm: Arm, batch: int, rounds: dict[tuple[str, str, int], np.ndarray]) -> dict[str, float]:
    """An engine's rate over those of others, round by round."""
    others = {EQUAL: ("eager", arm.precision)}
    others |= {} if arm.precision == "fp32" else {MIXED_FP32: ("eager", "fp32")}
    others |= {MIXED_BF16: ("eager", "bf16")} if arm.precision == "int8" else {}
    if arm.engine == "openvino":
        others |= {OF_SCRIPT: (SCRIPT, arm.precision), OF_TOOL: (TOOL, arm.precision)}
    found = {}
    for name, other in others.items():
        if (*other, batch) in rounds and other != (arm.engine, arm.precision):
            found |= interval(name, rounds[*other, batch] / rounds[arm.engine, arm.precision, batch])
    return found


def interval(name: str, values: np.ndarray) -> dict[str, float]:
    """The median, and the two values that hold the true one between them with 95 %."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), median_interval(values), strict=True))


def built(facts: dict) -> dict:
    shares = ", ".join(f"{precision} {share:.3f}" for precision, share in facts["precision_ran"].items())
    known = {"precision_ran": shares, "load_s": facts["load_s"]}
    if facts["build_s"]:
        known |= {"build_s": facts["build_s"], "load_of_build": facts["load_s"] / facts["build_s"]}
    return known


def misses(rows: pd.DataFrame) -> list[str]:
    """Where OpenVINO's rows are not what they are to be, a line each."""
    lines = []
    for row in rows[rows.engine == "openvino"].to_dict("records"):
        place = BATCHES.index(row["batch"])
        least = {name: both[place] for name, both in TARGETS[row["precision"]].items()}
        least |= {OF_SCRIPT: KEPT, OF_TOOL: KEPT}
        name = f"{row['precision']} at batch {row['batch']}"
        lines += [f"{name}: {key} {row[key]:.3f}, not {value}" for key, value in least.items() if row[key] < value]
        if row["load_of_build"] > LOAD_OF_BUILD:
            lines.append(f"{name}: loading took {row['load_of_build']:.3f} of building, not {LOAD_OF_BUILD}")
    return lines


class Noise:
    """What the machine did since this was made, besides this program and its children: shares of all its CPU time."""

    def __init__(self):
        self.begin = self.now()

    @staticmethod
    def now() -> np.ndarray:
        """Seconds of CPU: all there were, idle, stolen by the host, and used by this program and its children."""
        machine, own = psutil.cpu_times(), psutil.Process()
        ended = own.cpu_times().children_user + own.cpu_times().children_system
        alive = [process.cpu_times() for process in (own, *own.children(recursive=True))]
        used = ended + sum(times.user + times.system for times in alive)
        return np.array([sum(machine[:8]), machine.idle + machine.iowait, machine.steal, used])  # not guests: in user

    def seen(self) -> dict[str, float]:
        total, idle, stolen, used = self.now() - self.begin
        return {"stolen": round(stolen / total, 4), "others": round((total - idle - stolen - used) / total, 4)}


def describe(rows: pd.DataFrame, noise: dict) -> str:
    versions = ", ".join(f"{name} {installed_version(name)}" for name in PACKAGES)
    shown = rows.drop(columns=["accuracy"]).set_index(["engine", "precision", "batch"])
    return "\n".join(
        [
            f"{MODEL}, random weights, so accuracy is not measured; {cores()} threads",
            f"{describe_machine(machine_record())}, {versions}",
            f"CPU time stolen by the host {noise['stolen']:.1%}, used by other programs {noise['others']:.1%}",
            shown.T.to_string(float_format="{:.3f}".format, na_rep=""),
            *(misses(rows) or ["every target is met"]),
        ]
    )


@pytest.mark.soak
def test_the_speed_of_every_engine():
    rows, noise = measure()
    print(describe(rows, noise))
    assert not misses(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--turn-s", type=float, default=TURN_S)
    arguments = parser.parse_args()
    rows, noise = measure(arguments.rounds, arguments.turn_s)
    with replacing(arguments.out) as file:
        rows.to_csv(file, index=False)
    write_json(arguments.out.with_suffix(".machine.json"), machine_record() | {"noise": noise})
    print(describe(rows, noise))
