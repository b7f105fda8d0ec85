"""The metrics of a run: counts, accuracy with its interval, speed, the parts of the time, and memory."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pandas as pd

from vitdemo.engines.contract import Engine
from vitdemo.inference.actor import Shard
from vitdemo.inference.loop import PREDICTED, BatchTimes
from vitdemo.machine import Phases, peak_memory_bytes
from vitdemo.stats import paid_once, percentiles_ms, wilson_interval

PHASES = ("decode_wait", "compute_wait", "postprocess")


@dataclass
class Session:
    """The measurements of one run in this process or on replicas.

    threads: CPU threads that a call of the engine uses. streams: simultaneous calls in each process. cores: all cores
    that the run may use. rates: images/s by the number of streams, from which the streams were chosen. choosing_s: the
    seconds for choosing. began: in seconds since 1970, like the times of the batches. cpu_s: CPU seconds of all
    processes. replicas: the summary of the replicas, if any.
    """

    threads: int
    streams: int
    cores: int
    rates: dict[int, float] = field(default_factory=dict)
    choosing_s: float = 0.0
    began: float = field(default_factory=time.time)
    times: list[BatchTimes] = field(default_factory=list)
    phases: Phases = field(default_factory=Phases)
    wall_s: float = 0.0
    cpu_s: float = 0.0
    replicas: dict | None = None

    def add(self, shard: Shard, replicas: int) -> None:
        """Add a range that a replica returned; its phases count as an average over the replicas."""
        self.times += shard.times
        for name, seconds in shard.phases.items():
            self.phases.seconds[name] = self.phases.seconds.get(name, 0.0) + seconds / replicas
        self.cpu_s += shard.cpu_s

    def table(self) -> pd.DataFrame:
        """One row per batch, with the columns of ``BatchTimes``; times are in seconds since the session began."""
        times = pd.DataFrame(self.times, columns=BatchTimes._fields)
        moments = ["decode_began", "decode_ended", "submitted", "finished"]
        return times.assign(**(times[moments] - self.began))


def summarise(rows: pd.DataFrame, settings: dict, engine: Engine, session: Session) -> dict:
    """The metrics of a run.

    Args:
        rows: one row per image, with the columns of predictions.csv.
        settings: the settings of the run, as in run.json.
        engine: the engine that ran.
        session: the measurements of the run.

    Returns:
        The content of metrics.json:

    - ``images``, ``correct``, ``correct_top5``, ``errors``: integer counts over all rows; an unreadable image is
      an error and is not correct. ``top1 = correct / images`` and ``top5`` are fractions, with their 95 % Wilson score
      intervals (Wilson 1927) as ``*_ci95``. They are None for random weights and for the null engine, whose
      predictions mean nothing.
    - ``correct_present``, ``top1_present``: the same where the prediction is the largest logit among the
      ``classes_present`` outputs whose classes have images in the data set, the convention of ImageNet-A and -R.
      Equal to ``top1`` if all classes have images. ``classes_decided``: how outputs and classes were matched.
    - ``rotated``: images of this session with an EXIF orientation other than upright, which is ignored, as in timm.
    - ``session_images``, ``wall_s``: the number of images run in this session, and its duration from the first read to
      the last row written, including the first batch. ``images_per_s = session_images / wall_s``: end to end.
    - ``threads``: CPU threads per call. ``streams``: simultaneous calls per process. ``images_per_s_by_streams``: the
      rates on this machine from which the streams were chosen, see ``quicker_form``; empty where nothing was timed.
      ``choosing_s``: the seconds for choosing and loading; no rate includes them, and the first batch is then warm.
    - ``decode_wait_s``, ``compute_wait_s``, ``postprocess_s``: the seconds in which the loop waited for decoded
      batches, waited for the engine, and made and wrote rows. Decoding overlaps with computing, so a small
      ``decode_wait_s`` means that decoding was hidden, not that it was free.
    - ``inference_s``: the seconds in which the engine had at least one batch to work on, from submission to logits.
    - ``flops_per_image``: 2 x the multiply-accumulates of the model, for computing the MFU.
    - ``build_s``, ``load_s``: the seconds to build the engine's artifact, in this run or earlier (None where nothing
      is built), and to make it ready to run. Neither ``wall_s`` nor ``images_per_s`` includes them.
    - ``decode_share``, ``compute_share``: the shares of the cores used by decoding, and by everything else (the engine
      and Python): CPU seconds, as the system counts them per thread, over ``wall_s`` x cores. The rest up to 1 was idle
      or used by other programs.
    - ``fallbacks``: images of this session that the reference path decoded instead of the fast path.
    - ``latency_ms``: the time of a batch from submission to logits, without the first batch. ``first_batch_ms``: the
      time of the first batch. With replicas, the first batch of each is left out, and the slowest of these is reported.
      ``first_batch_share``: see ``paid_once``; the part of these times that would not grow with a longer run.
    - ``peak_memory_bytes``: this process's largest resident size so far; replicas report their own.
    - ``replicas``: None, or the result of ``Replicas.summary``. With replicas, ``wall_s`` is measured by this process's
      clock from the first range handed out to the last one returned, and the times above are averages over the
      replicas.

    ``evaluate`` adds ``calibrated_on_scored``: the number of these images on which the engine was calibrated, None
    where it was not calibrated or the files are unknown.
    """
    images, times = len(rows), session.table()
    counts = {"top1": int(rows["correct"].sum()), "top1_present": int(rows["correct_present"].sum())}
    counts["top5"] = int(rows[PREDICTED].eq(rows["label"], axis=0).any(axis=1).sum())
    accuracy = {}
    for name, count in counts.items():
        accuracy |= {name: count / images, f"{name}_ci95": wilson_interval(count, images)}
    if engine.info.weights == "random" or engine.name == "null":
        accuracy = dict.fromkeys(accuracy)
    spans = [span for _, span in times.sort_values("submitted").groupby("replica")]
    latencies_s = [(span["finished"] - span["submitted"]).tolist() for span in spans]
    first_s = max((first for first, *_ in latencies_s), default=None)
    others_s = [seconds for _, *others in latencies_s for seconds in others]
    computing_s = [covered_s(zip(span["submitted"], span["finished"], strict=True)) for span in spans]
    session_images, decode_cpu_s = int(times["images"].sum()), float(times["decode_cpu_s"].sum())
    wall_s, core_s = session.wall_s, session.wall_s * session.cores
    return {
        "valid": True,
        "model": engine.info.tag,
        "weights": engine.info.weights,
        **{key: settings[key] for key in ("engine", "precision", "device", "device_batch_size", "input_path")},
        "threads": session.threads,
        "streams": session.streams,
        "images_per_s_by_streams": session.rates,
        "choosing_s": session.choosing_s,
        "precision_ran": engine.precision_ran,
        "images": images,
        "correct": counts["top1"],
        "correct_top5": counts["top5"],
        "correct_present": counts["top1_present"],
        "classes_present": settings["classes_present"],
        "classes_decided": settings["classes_decided"],
        "errors": int(rows["error"].ne("").sum()),
        **accuracy,
        "session_images": session_images,
        "wall_s": wall_s,
        "images_per_s": session_images / wall_s if session_images else None,
        **{f"{name}_s": session.phases.seconds.get(name, 0.0) for name in PHASES},
        "flops_per_image": engine.info.flops_per_image,
        "inference_s": max(computing_s, default=0.0),
        "build_s": engine.card.get("build_s"),
        "load_s": engine.load_s,
        "decode_share": decode_cpu_s / core_s,
        "compute_share": (session.cpu_s - decode_cpu_s) / core_s,
        "fallbacks": int(times["fallbacks"].sum()),
        "rotated": int(times["rotated"].sum()),
        "first_batch_ms": first_s and round(first_s * 1e3, 3),
        "first_batch_share": first_s and paid_once([first_s, *others_s]),
        "latency_ms": percentiles_ms(others_s),
        "peak_memory_bytes": peak_memory_bytes(),
        "replicas": session.replicas,
    }


def describe_threads(metrics: dict) -> str:
    """The threads and streams for people: "2 threads", or "2 streams of 1 thread"."""
    threads = f"{metrics['threads']} thread{'s' * (metrics['threads'] > 1)}"
    return f"{metrics['streams']} streams of {threads}" if metrics.get("streams", 1) > 1 else threads


def set_faults(files: Sequence[str], expected: Sequence[str]) -> str:
    """Check that every image is there exactly once and in order.

    Args:
        files: the actual names.
        expected: the expected names.

    Returns:
        The faults, such as "4 missing (the first is ILSVRC2012_val_00000097.JPEG)"; "" where there are none.
    """
    found, wanted = Counter(files), Counter(expected)
    counted = {"missing": wanted - found, "too many": found - wanted}
    faults = [f"{names.total()} {what} (the first is {next(iter(names))})" for what, names in counted.items() if names]
    return ", ".join(faults) or ("" if list(files) == list(expected) else "in another order")


def covered_s(intervals: Iterable[tuple[float, float]]) -> float:
    """The seconds that at least one interval covers.

    Args:
        intervals: (begin, end) in seconds, by ascending begin.
    """
    covered, reached = 0.0, -math.inf
    for begin, end in intervals:
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered
