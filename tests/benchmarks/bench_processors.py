"""What this processor makes of the course: int8 over eager fp32, from files to answers, and the notebooks' time.

- ViT-B/16 with random weights (accuracy: not measured): OpenVINO int8 over eager fp32, mixed precision, by turns as
  `vitdemo benchmark` takes them.
- vit_shapes20 from files to answers, in each engine that is native here, over the loop of every tutorial (timm's PIL
  transform, a DataLoader with two workers, eager fp32), by turns.
- Seconds of `vitdemo run 00 01 03` (what `make demo` runs once it is installed) and of every notebook in `bundled`,
  each with an empty cache.

The targets follow what the processor has: AMX, bf16, or neither. Run it as

    python -m tests.benchmarks.bench_processors --out FILE.csv [--part int8 --part files --part notebooks]

A processor without bf16 is seen through ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI on one with AVX512. ONNX Runtime and
OpenVINO's fp32 products do not obey it, so under a mask of AVX2 no ratio would be one of such a processor.
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

import pandas as pd

from tests.benchmarks.bench_single_device import baseline, whole_way
from tests.benchmarks.turns import ROUNDS, ratio, take_turns, write_results
from vitdemo import ImageNetVal, benchmark, convert, data_path, describe_machine, load_model, machine_record
from vitdemo.benchmarking.pairs import choose_pairs
from vitdemo.course import run_notebooks
from vitdemo.stats import median_interval

VIT = "vit_base_patch16_224"
TARGETS = {  # the least ratio: int8 over eager fp32 by batch size, files over the loop
    "without bf16": ({1: 3.5, 8: 3.2}, 2.5),
    "with bf16": ({1: 6.0, 8: 6.5}, 3.0),
    "with AMX": ({1: 3.9, 8: 4.4}, 3.0),
}
DEMO_S, NOTEBOOK_S, LONGER_S = 240, 300, {"05_benchmark": 480}


def kind_of_processor() -> str:
    record = machine_record()
    if record["precisions"]["bf16"] != "native":
        return "without bf16"
    return "with AMX" if "amx" in record["isa"] else "with bf16"


def int8(folder: Path) -> list[dict]:
    options = dict(weights="random", engines="openvino:int8", device_batch_sizes=[1, 8], row_budget_s=60.0)
    rows = benchmark(VIT, out=folder / "sweep", **options)
    found, targets = [], TARGETS[kind_of_processor()][0]
    for _, row in rows[rows["precision"] == "int8"].iterrows():
        name = "speedup_over_eager_fp32"
        what = f"{VIT}, openvino int8 over eager fp32, mixed, batch {row['batch']} (ran {row['precision_ran']})"
        spread = dict(value=row[name], low=row[f"{name}_low"], high=row[f"{name}_high"], rounds=row[f"{name}_pairs"])
        rate = f"{row['images_per_s']:.1f} images/s; accuracy not measured (random weights)"
        found.append(dict(what=what, unit="ratio", **spread, least=targets[row["batch"]], beside=rate))
    return found


def files(folder: Path) -> list[dict]:
    model, samples = load_model("vit_shapes20"), list(ImageNetVal(data_path("shapes20")))
    variants = {str(pair): partial(whole_way, convert(model, *pair), samples) for pair in choose_pairs(None)}
    turns = take_turns(variants | {"loop": partial(baseline, model, samples)}, len(samples), scored=True)
    best = max(variants, key=lambda name: turns[name].median)
    found = []
    for name in variants:
        median, low, high = median_interval(ratio(turns, name, "loop"))
        rate = f"{turns[name].median:.0f} images/s, top-1 {turns[name].correct}/{len(samples)}"
        row = dict(what=f"vit_shapes20, {name} from files over the loop", unit="ratio")
        row |= dict(value=median, low=low, high=high, rounds=ROUNDS, beside=rate)
        least = TARGETS[kind_of_processor()][1] if name == best else None
        found.append(row | dict(least=least))
    loop = f"top-1 {turns['loop'].correct}/{len(samples)}"
    return [*found, dict(what="the loop", unit="images/s", value=turns["loop"].median, rounds=ROUNDS, beside=loop)]


def notebooks(folder: Path) -> list[dict]:
    found = []
    for what, names in {"demo": ["00", "01", "03"], "bundled": None}.items():
        os.environ["VITDEMO_CACHE"] = str(folder / what)
        report = run_notebooks(names, out=folder / f"runs-{what}")
        assert report.ok, report
        if what == "demo":
            taken = sum(result.duration_s for result in report.notebooks)
            found.append(dict(what="make demo, installed", unit="s", value=taken, most=DEMO_S))
        else:
            for result in report.notebooks:
                row = dict(what=f"{result.name} in bundled", unit="s", value=result.duration_s)
                found.append(row | dict(most=LONGER_S.get(result.name, NOTEBOOK_S), beside=result.accuracy))
    return found


def verdict(row: pd.Series) -> str:
    if pd.notna(row.get("least")):
        return "met" if row["value"] >= row["least"] else "missed"
    if pd.notna(row.get("most")):
        return "met" if row["value"] <= row["most"] else "missed"
    return ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = {"int8": int8, "files": files, "notebooks": notebooks}
    parser.add_argument("--part", choices=parts, action="append")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    print(describe_machine(machine_record()), kind_of_processor(), sep="\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.part or parts:
            rows += parts[name](Path(folder))
            table = pd.DataFrame(rows)
            table = table.assign(verdict=table.apply(verdict, axis=1))
            write_results(table, arguments.out)
            print(table.round(3).to_string(index=False), flush=True)
