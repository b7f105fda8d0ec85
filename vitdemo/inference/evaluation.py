"""evaluate: every image of a data set through one engine, exactly once, with its accuracy and its speed."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import pandas as pd
from scipy.stats import binomtest
from tqdm.auto import tqdm

from vitdemo.conversion.engines.contract import Engine, EngineFailure
from vitdemo.dataset.imagenet import ImageNetVal
from vitdemo.dataset.images import INPUT_PATHS
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.inference.loop import PREDICTED, BatchTimes, predict
from vitdemo.inference.records import (
    METRICS,
    appending,
    claim_run,
    csv_lines,
    finished_metrics,
    rows_frame,
    write_json,
)
from vitdemo.measure.clock import Phases, cores, machine_record, now, peak_memory_bytes, percentiles_ms

SETTINGS_SHOWN = ("engine", "precision", "device", "threads", "device_batch_size", "input_path")


@dataclass
class Evaluation:
    """What ``evaluate`` gives.

    rows: one an image, in file order, the columns of predictions.csv. metrics: metrics.json. out: the folder. times: a
    row a batch of this session, the columns of ``BatchTimes``, in seconds since the session began.
    """

    rows: pd.DataFrame
    metrics: dict
    out: Path | None
    times: pd.DataFrame

    def __str__(self) -> str:
        m = self.metrics
        rate = f"{m['images_per_s']:.1f} images/s end to end" if m["images_per_s"] else "no image run in this session"
        return (
            f"{self._accuracy()}; {rate}, {m['engine']} {m['precision']} on {m['device']}, {m['threads']} threads, "
            f"device_batch_size {m['device_batch_size']}; {m['model']}, weights: {m['weights']}"
        )

    def _accuracy(self) -> str:
        m = self.metrics
        if m["top1"] is None:
            command = f"vitdemo evaluate {m['model']} --weights pretrained --engine eager --data PATH --out DIR"
            return f"accuracy: not measured ({m['weights']} weights, {m['engine']} engine; for one run `{command}`)"
        low, high = m["top1_ci95"]
        unread = f", {m['errors']} unreadable counted as wrong" if m["errors"] else ""
        scored = f", {m['calibrated_on_scored']} of them seen in calibration" if m["calibrated_on_scored"] else ""
        counts = f"{m['correct']}/{m['images']}{unread}{scored}; 95 % interval {low:.1%} to {high:.1%}"
        return f"top-1 {m['top1']:.1%} ({counts}), top-5 {m['top5']:.1%}"


def evaluate(
    engine: Engine,
    data: ImageNetVal,
    *,
    device_batch_size: int = 8,
    input_path: str = "fast",
    limit: int | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Run ``engine`` over the first ``limit`` images of ``data`` (all by default) in ascending file order.

    Every image gives exactly one row; one that cannot be read is a row with its error, counted as wrong. input_path:
    "fast", or "reference", which decodes and resizes with PIL, as timm does; see ``fast_crop`` for the difference.
    With ``out``, the rows go to ``out/predictions.csv`` as they come, then ``metrics.json`` (see
    ``summarise``); ``run.json`` holds the settings and the machine. ``resume=True`` goes on where an
    interrupted run with the same settings stopped. Raises VitdemoError for bad input, and EngineFailure,
    after writing ``"valid": false``, when the engine breaks.
    """
    _check_input(engine, data, device_batch_size, input_path, limit)
    images = len(data) if limit is None else min(limit, len(data))
    settings = _settings(engine, data, device_batch_size, input_path, images)
    out = Path(out) if out is not None else None
    with named_errors(out or data.path):
        lines = claim_run(out, settings, data, resume) if out else []
        finished = finished_metrics(out) if out and len(lines) == images else None
    if finished:
        return Evaluation(rows_frame(lines), finished, out, _times_frame([], 0.0))
    phases, times = Phases(), []
    start, cpu = now(), process_time()
    bar = tqdm(total=images, initial=len(lines), unit="image", disable=not progress, desc="evaluate")
    try:
        with named_errors(out or data.path), appending(out) as file, bar:
            todo = range(len(lines), images)
            options = dict(device_batch_size=device_batch_size, input_path=input_path, workers=cores())
            for batch_rows in predict(engine, data, todo, **options, phases=phases, times=times):
                with phases("postprocess"):
                    lines += (batch_lines := csv_lines(batch_rows))
                    if file:
                        file.writelines(batch_lines)
                        file.flush()
                    bar.update(len(batch_rows))
    except EngineFailure as failure:
        if out:
            write_json(out / METRICS, {"valid": False, "error": str(failure), "images": len(lines)})
        raise
    wall_s, cpu_s = now() - start, process_time() - cpu
    rows = rows_frame(lines)
    if rows["file"].tolist() != data.files[:images]:
        raise AssertionError("the rows are not the data set's images, each exactly once: a fault in vitdemo")
    metrics = summarise(rows, settings, engine, times, phases, wall_s, cpu_s)
    metrics["calibrated_on_scored"] = _calibrated_on_scored(engine, data, images)
    if out:
        with named_errors(out):
            write_json(out / METRICS, metrics)
    return Evaluation(rows, metrics, out, _times_frame(times, start))


def summarise(
    rows: pd.DataFrame,
    settings: dict,
    engine: Engine,
    times: list[BatchTimes],
    phases: Phases,
    wall_s: float,
    cpu_s: float,
) -> dict:
    """The metrics of a run.

    - ``images``, ``correct``, ``correct_top5``, ``errors``: integer counts over all rows; an unreadable image is
      an error and is not correct. ``top1 = correct / images``, ``top5`` likewise, as fractions, with their 95 %
      Wilson score intervals (Wilson 1927) as ``*_ci95``. None for random weights and for the null engine, whose
      answers mean nothing.
    - ``session_images``, ``wall_s``: what this session ran and how long it took, from the first read to the last
      row written, the first (cold) batch included. ``images_per_s = session_images / wall_s``: end to end.
    - ``decode_wait_s``, ``compute_wait_s``, ``postprocess_s``: how long the loop waited for decoded batches, waited
      for the engine, and made and wrote rows. Decoding runs beside computing, so a small ``decode_wait_s`` means
      decoding was hidden, not free.
    - ``inference_s``: how long the engine had a batch to work on, from submission to logits, what overlaps counted
      once.
    - ``flops_per_image``: 2 x the multiply-accumulates of the model, for an MFU.
    - ``build_s``, ``load_s``: how long it took to build the engine's artifact, whenever that was (None where nothing
      is built), and to make it ready to run. In neither ``wall_s`` nor ``images_per_s``.
    - ``decode_share``, ``compute_share``: the shares of the cores that decoding got, and all else (the engine, and
      Python): CPU seconds, as the system counts them a thread, over ``wall_s`` x cores. What is missing to 1 was idle,
      or other programs'.
    - ``fallbacks``: images that the fast path left to the reference path, in this session.
    - ``latency_ms``: a batch from submission to logits, without the first; ``first_batch_ms``: that first one.
    - ``peak_memory_bytes``: this process's largest resident size so far.

    ``evaluate`` adds ``calibrated_on_scored``: how many of these very images the engine was calibrated on, None where
    it was not calibrated or nobody knows the files.
    """
    images = len(rows)
    correct = int(rows["correct"].sum())
    correct_top5 = int(rows[PREDICTED].eq(rows["label"], axis=0).any(axis=1).sum())
    latencies_s = [batch.finished - batch.submitted for batch in times]
    decode_cpu_s = sum(batch.decode_cpu_s for batch in times)
    means_something = engine.info.weights != "random" and engine.name != "null"
    accuracy = {
        "top1": correct / images,
        "top1_ci95": wilson_interval(correct, images),
        "top5": correct_top5 / images,
        "top5_ci95": wilson_interval(correct_top5, images),
    }
    return {
        "valid": True,
        "model": engine.info.tag,
        "weights": engine.info.weights,
        **{
            key: settings[key]
            for key in ("engine", "precision", "device", "threads", "device_batch_size", "input_path")
        },
        "precision_ran": engine.precision_ran,
        "images": images,
        "correct": correct,
        "correct_top5": correct_top5,
        "errors": int(rows["error"].ne("").sum()),
        **(accuracy if means_something else dict.fromkeys(accuracy)),
        "session_images": (session_images := sum(batch.images for batch in times)),
        "wall_s": wall_s,
        "images_per_s": session_images / wall_s if session_images else None,
        **{f"{name}_s": phases.seconds.get(name, 0.0) for name in ("decode_wait", "compute_wait", "postprocess")},
        "flops_per_image": engine.info.flops_per_image,
        "inference_s": covered_s((batch.submitted, batch.finished) for batch in times),
        "build_s": engine.card.get("build_s"),
        "load_s": engine.load_s,
        "decode_share": decode_cpu_s / (wall_s * cores()),
        "compute_share": (cpu_s - decode_cpu_s) / (wall_s * cores()),
        "fallbacks": sum(batch.fallbacks for batch in times),
        "first_batch_ms": round(latencies_s[0] * 1e3, 3) if latencies_s else None,
        "latency_ms": percentiles_ms(latencies_s[1:]),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def covered_s(intervals: Iterable[tuple[float, float]]) -> float:
    """Seconds that at least one interval covers; ``intervals``: (begin, end) in seconds, by ascending begin."""
    covered, reached = 0.0, -math.inf
    for begin, end in intervals:
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def wilson_interval(correct: int, images: int) -> list[float]:
    """The 95 % Wilson score interval of ``correct / images``, as [low, high] fractions."""
    interval = binomtest(correct, images).proportion_ci(0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


def _check_input(engine: Engine, data: ImageNetVal, device_batch_size: int, input_path: str, limit: int | None) -> None:
    if input_path not in INPUT_PATHS:
        raise VitdemoError(f"input_path {input_path!r}: is not one of {', '.join(INPUT_PATHS)}")
    for name, value in (("device_batch_size", device_batch_size), ("limit", limit)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise VitdemoError(f"{name} {value!r}: must be a whole number of at least 1")
    if engine.info.classes is None:
        raise VitdemoError(
            f"{engine.info.tag}: nobody said which class each output is; give Model.from_module classes="
        )
    if list(engine.info.classes) != list(data.classes):
        raise VitdemoError(
            f"{data.path}: its {len(data.classes)} classes are not the {len(engine.info.classes)} that "
            f"{engine.info.tag} was made for, so no accuracy could be right; take the data set of that model"
        )


def _settings(engine: Engine, data: ImageNetVal, device_batch_size: int, input_path: str, images: int) -> dict:
    """All that shapes the predictions: a run may be resumed only under the very same."""
    return {
        "model": engine.info.to_dict() | {"classes": len(engine.info.classes)},
        "engine": engine.name,
        "precision": engine.precision,
        "device": engine.device,
        "threads": engine.threads,
        "device_batch_size": device_batch_size,
        "images": images,
        "artifact": engine.card.get("key"),
        "data_fingerprint": data.fingerprint,
        "versions": machine_record()["versions"],
        "input_path": input_path,
    }


def _calibrated_on_scored(engine: Engine, data: ImageNetVal, images: int) -> int | None:
    files = {tuple(file) for file in (engine.card.get("calibration") or {}).get("files", ())}
    if not files:
        return None
    sizes = {size for size, _ in files}  # only files of such a size need be read
    candidates = (i for i, size in enumerate(data.sizes[:images]) if size in sizes)
    return sum((data.sizes[i], hashlib.sha256(data[i].jpeg).hexdigest()) in files for i in candidates)


def _times_frame(times: list[BatchTimes], start: float) -> pd.DataFrame:
    frame = pd.DataFrame(times, columns=BatchTimes._fields)
    moments = ["decode_began", "decode_ended", "submitted", "finished"]
    return frame.assign(**(frame[moments] - start))
