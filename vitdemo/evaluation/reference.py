"""Compares an engine's run with the reference's run over the same images, and makes the FlagPerf row of both.

FlagPerf (https://github.com/FlagOpen/FlagPerf, inference/benchmarks/vit_l_16) validates a model in its framework,
converts it, runs the engine, and prints one row. Here the framework's run is that of the reference, eager fp32.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from vitdemo.dataset.dataset import Dataset
from vitdemo.engines.artifacts import convert
from vitdemo.engines.contract import Engine
from vitdemo.engines.roof import ROOF_BATCH, Roof, linear_shapes, machine_roof
from vitdemo.errors import VitdemoError, at_least_1, named_errors
from vitdemo.evaluation.evaluation import Evaluation, evaluate
from vitdemo.inference.predictions import FLAGPERF
from vitdemo.machine import memory_bytes
from vitdemo.models.model import Model
from vitdemo.paths import replacing, user_path
from vitdemo.verification.comparison import compare_answers

REFERENCE = ("eager", "fp32")
GIB = 2**30


def evaluate_beside_reference(
    engine: Engine,
    model: Model,
    data: Dataset,
    *,
    repeat: int = 1,
    skip_validation: bool = False,
    out: Path | str,
    resume: bool = False,
    **options: Any,
) -> tuple[list[Evaluation], Evaluation | None]:
    """``evaluate`` the engine, and then its model in eager fp32, the reference.

    Args:
        engine: an engine from ``convert``.
        model: the model from which it was made.
        data: the labelled images.
        repeat: the number of runs of the engine.
        skip_validation: leave out the reference.
        out: a new folder for the first run; further runs go to ``repeat_2`` … in it, the reference to ``validation``.
        resume: continue interrupted runs.
        options: further arguments of ``evaluate``.

    Returns:
        The engine's runs, and the reference's run. The latter is None with ``skip_validation``, and the first run where
        the engine itself is the reference.

    Raises:
        VitdemoError: for a ``repeat`` below 1, and as in ``evaluate``.
        EngineFailure: as in ``evaluate``.
    """
    at_least_1(repeat=repeat)
    out = user_path(out)
    folders = [out, *(out / f"repeat_{number}" for number in range(2, repeat + 1))]
    runs = [evaluate(engine, data, out=folder, resume=resume, **options) for folder in folders]
    if (engine.name, engine.precision) == REFERENCE:
        return runs, runs[0]
    if skip_validation:
        return runs, None
    tqdm.write("validation: the reference, eager fp32, over the same images")
    reference = convert(model, *REFERENCE, device=engine.device)
    return runs, evaluate(reference, data, out=out / "validation", resume=resume, **options)


def agreement(evaluation: Evaluation, reference: Evaluation) -> str:
    """The number of images with the same top-1 class, and whether the difference in accuracy is significant.

    Args:
        evaluation: the engine's evaluation.
        reference: the reference's evaluation of the same images.

    Returns:
        A line for people, with the p-value of McNemar's exact test.

    Raises:
        VitdemoError: where the two are of different images.
    """
    _check_same_images([evaluation, reference])
    sides = {"reference": reference.rows["predicted_1"], "candidate": evaluation.rows["predicted_1"]}
    answers = pd.DataFrame(sides | {"label": reference.rows["label"]})
    answers = answers.dropna(subset=[*sides], how="all").fillna(-1)  # without the images that neither could read
    m, same = evaluation.metrics, int((answers["reference"] == answers["candidate"]).sum())
    line = f"{m['engine']} {m['precision']} gives eager fp32's answer for {same} of {len(answers)} images"
    if answers.empty:
        return f"{line}: none could be read"
    found = compare_answers(answers)
    if m["top1"] is None:
        return line
    right = f"only it is right {found['better']} times, only the reference {found['worse']} times"
    return f"{line} ({same / len(answers):.2%}); {right}, McNemar's p {found['mcnemar_p']:.2g}"


def flagperf_row(
    runs: Sequence[Evaluation],
    reference: Evaluation | None = None,
    *,
    e2e_s: float | None = None,
    roof: Roof | None = None,
) -> dict:
    """One row of FlagPerf's table. Rates count only the images that were run in this session.

    Args:
        runs: the engine's runs over the same images, one per repeat.
        reference: the reference's run over these images.
        e2e_s: the seconds from loading the weights to the last row, for a run that was not interrupted.
        roof: the machine's roof, its measured peak throughput, in the precision in which most of the engine ran.

    Returns:
        The row by FlagPerf's column names; None where a value was not measured:

    - ``precision``, ``bs``: the requested precision; images per batch.
    - ``e2e_time``: ``e2e_s``.
    - ``p_val_whole`` (the reference), ``p_infer_whole`` (the engine, all repeats together): images/s of the whole loop,
      images / ``wall_s``.
    - ``p_val_core``, ``p_infer_core``: images/s from "batch available" to "logits there", images / ``inference_s``.
      The next images are decoded at the same time; without a GPU this uses the same cores and lowers these rates.
    - ``MFU``: floating-point operations per image (2 x multiply-accumulates) x ``p_infer_core`` / ``roof``, a fraction.
    - ``MFU_flagperf``: half of ``MFU``, because FlagPerf counts a multiply-accumulate as one operation.
    - ``acc``: top-1 in %, engine/reference. ``mem``: this process's peak and the machine's memory in GiB (in FlagPerf,
      the GPU's). MFU and mem are None with replicas.

    Raises:
        VitdemoError: where the runs are of different images.
    """
    _check_same_images([*runs, *([reference] if reference else [])])
    first, p_infer_core = runs[0].metrics, _rate(runs, "inference_s")
    shared = first["replicas"] is not None  # the roof and the memory of the replicas' machines are unknown
    mfu = first["flops_per_image"] * p_infer_core / roof.flops_per_s if roof and p_infer_core and not shared else None
    validated = [reference] if reference else []
    peak = max(run.metrics["peak_memory_bytes"] for run in [*runs, *validated])
    return {
        "engine": first["engine"],
        "precision": first["precision"],
        "bs": first["device_batch_size"],
        "e2e_time": e2e_s,
        "p_val_whole": _rate(validated, "wall_s"),
        "p_val_core": _rate(validated, "inference_s"),
        "p_infer_whole": _rate(runs, "wall_s"),
        "p_infer_core": p_infer_core,
        "MFU": mfu,
        "MFU_flagperf": mfu and mfu / 2,
        "acc": f"{_percent(runs[0])}/{_percent(reference)}",
        "mem": None if shared else f"{peak / GIB:.1f}/{memory_bytes() / GIB:.1f}",
    }


def describe_row(row: dict) -> str:
    """A FlagPerf row as one line, in FlagPerf's units."""
    shown = {name: f"{value:.1f}" if isinstance(value, float) else value for name, value in row.items()}
    shown |= {name: f"{row[name]:.1%}" for name in ("MFU", "MFU_flagperf") if row[name] is not None}
    return ", ".join(f"{name} {'n/a' if value is None else value}" for name, value in shown.items())


def write_row(row: dict, out: Path) -> None:
    """Write ``out/flagperf.csv``: the header and the row, with empty cells for values that were not measured."""
    with named_errors(out), replacing(out / FLAGPERF) as file:
        pd.DataFrame([row]).to_csv(file, index=False)


def roof_of(engine: Engine, model: Model, device_batch_size: int, images_per_s: float = 0) -> Roof | None:
    """The machine's roof in the precision in which most of the engine ran, measured also with the model's own products.

    Args:
        engine: the engine whose precision counts.
        model: the model from which it was made.
        device_batch_size: the batch size of the model's products. At most ROOF_BATCH is used, because larger products
            take more memory and are not faster.
        images_per_s: the rate that the engine reached. A roof far below it is measured again, see ``machine_roof``.

    Returns:
        The roof; None for a precision in which no runtime here has matrix products.
    """
    ran = engine.precision_ran
    shapes = linear_shapes(model, min(device_batch_size, ROOF_BATCH))
    try:
        reached = images_per_s * model.info.flops_per_image
        return machine_roof(max(ran, key=ran.get), shapes, device=engine.device, reached=reached)
    except VitdemoError as error:
        tqdm.write(f"MFU: not measured: {error}", file=sys.stderr)
        return None


def _check_same_images(runs: Sequence[Evaluation]) -> None:
    if any(not run.rows["file"].equals(runs[0].rows["file"]) for run in runs):
        raise VitdemoError("these runs are not of the same images; evaluate each on the same data, with the same limit")


def _rate(runs: Sequence[Evaluation], seconds: str) -> float | None:
    taken = sum(run.metrics[seconds] for run in runs)
    return sum(run.metrics["session_images"] for run in runs) / taken if taken else None


def _percent(run: Evaluation | None) -> str:
    return "-" if run is None or run.metrics["top1"] is None else f"{100 * run.metrics['top1']:.1f}"
