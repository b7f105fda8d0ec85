"""``evaluate``: runs an engine over every image of a data set exactly once, and measures accuracy and speed."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time, time

import pandas as pd
from tqdm.auto import tqdm

from vitdemo.dataset.dataset import Dataset
from vitdemo.dataset.decoding import INPUT_PATHS
from vitdemo.dataset.samples import UnreadableFile
from vitdemo.engines.contract import Engine
from vitdemo.errors import EngineFailure, VitdemoError, at_least_1, named_errors
from vitdemo.evaluation.metrics import Session, describe_threads, set_faults, summarise
from vitdemo.inference.cluster import check_ray
from vitdemo.inference.loop import Row, batches_of, merge_ranges, predict
from vitdemo.inference.predictions import appending, finish_run, open_run_folder, rows_frame, write_rows, write_settings
from vitdemo.inference.replicas import Replicas
from vitdemo.inference.schedule import SCHEDULES
from vitdemo.inference.streams import has_choice, quicker_on_images
from vitdemo.machine import cores, machine_record, now
from vitdemo.models.classes import match_classes
from vitdemo.models.loading import full_tag
from vitdemo.paths import user_path
from vitdemo.stats import percentiles_ms

Brought = Iterator[tuple[int, list[Row]]]  # the first image's number, and the rows from there


@dataclass(eq=False)  # == of two tables is not a single truth value
class Evaluation:
    """The result of ``evaluate``.

    rows: one row per image, in file order, with the columns of predictions.csv. metrics: the content of metrics.json.
    out: the folder. times: one row per batch of this session, with the columns of ``BatchTimes``, in seconds since the
    session began. data: the images with the model's outputs as labels.
    """

    rows: pd.DataFrame
    metrics: dict
    out: Path | None
    times: pd.DataFrame
    data: Dataset

    def __str__(self) -> str:
        m, seen, in_all = self.metrics, self.rows["label"].nunique(), len(set(self.data.labels))
        rate = f"{m['images_per_s']:.1f} images/s end to end" if m["images_per_s"] else "no image run in this session"
        text = f"{self._accuracy()}; {rate}, {m['engine']} {m['precision']} on {m['device']}, {describe_threads(m)}, "
        text += f"device_batch_size {m['device_batch_size']}"
        if shared := m["replicas"]:
            idle = max(each["idle_s"] for each in shared["each"])
            text += f", {shared['count']} replicas ({shared['lost']} lost, the longest idle time {idle:.1f} s)"
        text += f"; {m['model']}, weights: {m['weights']}"
        if rotated := m.get("rotated"):
            many = f"{rotated} images carry" if rotated > 1 else "1 image carries"
            text += f"; {many} an EXIF orientation, which is ignored, as timm does; --diagnose tests if rotating helps"
        if 2 * seen < min(in_all, len(self.rows)):  # with one folder per class, the first images are all of few classes
            text += f"; these first images are of {seen} of {in_all} classes"
        return text

    def _accuracy(self) -> str:
        m = self.metrics
        if m["top1"] is None:
            command = f"vitdemo evaluate {full_tag(m['model'])} --weights pretrained --data PATH --out DIR"
            return f"accuracy: not measured ({m['weights']} weights, {m['engine']} engine; for one run `{command}`)"
        low, high = m["top1_ci95"]
        unread = f", {m['errors']} unreadable counted as wrong" if m["errors"] else ""
        scored = f", {m['calibrated_on_scored']} of them seen in calibration" if m["calibrated_on_scored"] else ""
        counts = f"{m['correct']}/{m['images']}{unread}{scored}; 95 % interval {low:.1%} to {high:.1%}"
        outputs, present = len(self.data.classes), m["classes_present"]
        if present == outputs:
            return f"top-1 {m['top1']:.1%} ({counts}), top-5 {m['top5']:.1%}"
        low, high = m["top1_present_ci95"]
        among = f"{present} classes that are present ({m['correct_present']}/{m['images']}; {low:.1%} to {high:.1%})"
        text = f"top-1 {m['top1']:.1%} among all {outputs} outputs ({counts}), top-5 {m['top5']:.1%}"
        return f"{text}; top-1 {m['top1_present']:.1%} among the {among}"


def evaluate(
    engine: Engine,
    data: Dataset,
    *,
    class_map: Path | str | None = None,
    device_batch_size: int = 8,
    replicas: int | Replicas | None = None,
    schedule: str = "async",
    input_path: str = "fast",
    limit: int | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    ray_address: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Run ``engine`` over the first ``limit`` images of ``data`` in ascending file order.

    Every image gives exactly one row; an unreadable image is a row with its error, counted as wrong. Replicas give the
    same rows. A replica that dies or hangs is replaced, and its unfinished images are computed again. With ``out``, the
    rows are written to ``out/predictions.csv`` as they are computed, and sorted in file order at the end; then
    ``metrics.json`` is written (see ``summarise``). ``run.json`` holds the settings and the machine.

    Args:
        engine: an engine from ``convert``.
        data: the labelled images, whose classes the model must have; see ``match_classes``.
        class_map: the output of each class, where the names do not match; see ``match_classes``.
        device_batch_size: images per batch on the device.
        replicas: the number of processes that share the work, on this machine or on the cluster at ``ray_address``; or
            ``Replicas`` of this engine and data that are already started.
        schedule: "async", see ``AsyncSchedule``, or "sync", see ``SyncSchedule``.
        input_path: "fast", or "reference", which decodes and resizes with PIL, as timm does; see ``fast_crop`` for the
            difference.
        limit: the number of images, from the first; None is all.
        out: a new folder for the results.
        resume: continue an interrupted run with the same settings.
        ray_address: the address of a Ray cluster, "host:port" of its head or "auto"; None is this machine.
        progress: show a progress bar.

    Returns:
        The rows and the metrics.

    Raises:
        VitdemoError: for bad input.
        EngineFailure: when the engine breaks, after writing ``"valid": false``.
    """
    if input_path not in INPUT_PATHS:
        raise VitdemoError(f"input_path {input_path!r}: is not one of {', '.join(INPUT_PATHS)}")
    at_least_1(device_batch_size=device_batch_size, limit=limit)
    data = match_classes(engine.info, data, class_map)
    _check_replicas(engine, data, replicas, schedule, ray_address)
    images = len(data) if limit is None else min(limit, len(data))
    device_batch_size = min(device_batch_size, images)  # the actual size, which the metrics report
    settings = _settings(engine, data, device_batch_size, input_path, images)
    out = user_path(out) if out is not None else None
    with named_errors(out or data.path):
        rows, finished, before = open_run_folder(out, settings, data, resume) if out else ([None] * images, None, {})
    if finished:
        return Evaluation(rows_frame(rows), finished, out, Session(0, 0, 0).table(), data)
    todo = [batch for batch in batches_of(range(images), device_batch_size) if not rows[batch.start]]
    options = dict(device_batch_size=device_batch_size, input_path=input_path)
    with ExitStack() as stack:
        if isinstance(replicas, int):
            replicas = stack.enter_context(Replicas(engine, data, replicas, ray_address=ray_address))
        left, start = sum(map(len, todo)), now()
        kept = before.get("streams") or (1 if any(rows) else None)
        form, streams, rates = _form(engine, data, left, replicas, kept, **options)
        session = Session(form.threads, streams, cores(), rates, now() - start)
        if out:
            with named_errors(out):
                write_settings(out, settings | {"streams": streams})
        if replicas:
            source = _on_replicas(replicas, schedule, todo, session, **options)
        else:
            source = _here(form, data, todo, session, **options)
            stack.callback(form.close)
        stack.enter_context(closing(source))
        bar = tqdm(total=images, initial=images - left, unit="image", disable=not progress, desc="evaluate")
        try:
            with named_errors(out or data.path), appending(out) as file, bar:
                for first, brought in source:
                    with session.phases("postprocess"):
                        rows[first : first + len(brought)] = brought
                        write_rows(file, brought)
                        file.flush()
                    bar.update(len(brought))
        except EngineFailure as failure:
            finish_run(out, rows, {"valid": False, "error": str(failure), "images": sum(map(bool, rows))})
            raise
        session.wall_s = time() - session.began
    table = rows_frame(filter(None, rows))
    if faults := set_faults(table["file"].tolist(), data.files[:images]):
        wrong = f"the rows are not the data set's images, each exactly once ({faults})"
        raise AssertionError(f"{wrong}: a fault in vitdemo")
    metrics = summarise(table, settings, form, session)
    metrics["calibrated_on_scored"] = calibrated_on_scored(engine, data, images)
    finish_run(out, rows, metrics)
    return Evaluation(table, metrics, out, session.table(), data)


def _form(
    engine: Engine, data: Dataset, images: int, replicas: Replicas | None, kept: int | None, **options
) -> tuple[Engine, int, dict[int, float]]:
    """The form of the engine for this process, the number of streams for run.json, and the rates of the trial.

    kept: the number of streams with which the run was begun. A resumed run keeps it, because another number of threads
    sums in another order. For the same reason, replicas with one thread each are recorded as streams.
    """
    if kept:
        return engine if kept == 1 or replicas else engine.side_by_side(), kept, {}
    if replicas and replicas.threads == 1:
        return engine, engine.threads if has_choice(engine) else 1, {}
    form, rates = quicker_on_images(engine, data, images, **options)
    return form, form.streams or 1, rates


def _here(engine: Engine, data: Dataset, todo: Sequence[range], session: Session, **options) -> Brought:
    """Yield the first image's number and the rows of each batch, computed in this process."""
    cpu = process_time()
    options |= dict(phases=session.phases, times=session.times)
    for span in merge_ranges(todo):
        first = span.start
        with closing(predict(engine, data, span, **options)) as batches:
            for rows in batches:
                yield first, rows
                first += len(rows)
    session.cpu_s = process_time() - cpu


def _on_replicas(replicas: Replicas, schedule: str, todo: Sequence[range], session: Session, **options) -> Brought:
    """Yield the first image's number and the rows of each range, in the order in which replicas return them."""
    plan = SCHEDULES[schedule](todo, len(replicas.slots))
    session.cores, split = replicas.cores, session.streams > 1
    session.streams, session.threads = (replicas.threads, 1) if split else (1, replicas.threads)
    with closing(replicas.run(sum(map(len, todo)), plan, streams=split, **options)) as shards:
        for shard in shards:
            session.add(shard, len(replicas.slots))
            yield shard.indices.start, shard.rows
    session.replicas = replicas.summary(schedule, time() - session.began) | {"step_ms": percentiles_ms(plan.step_s)}


def _check_replicas(
    engine: Engine, data: Dataset, replicas: int | Replicas | None, schedule: str, ray_address: str | None
) -> None:
    """Check the arguments about replicas, before anything is written or started."""
    if schedule not in SCHEDULES:
        raise VitdemoError(f"schedule {schedule!r}: is not one of {', '.join(SCHEDULES)}")
    if isinstance(replicas, Replicas):
        same = replicas.data.fingerprint == data.fingerprint and replicas.data.labels == data.labels
        if replicas.engine is not engine or not same:
            raise VitdemoError("replicas: were started for another engine or other data")
    elif replicas is not None:
        at_least_1(replicas=replicas)
        check_ray(ray_address)
    elif ray_address or schedule != "async":
        raise VitdemoError("schedule and ray_address are for replicas; say how many, or leave them out")


def _settings(engine: Engine, data: Dataset, device_batch_size: int, input_path: str, images: int) -> dict:
    """Everything on which the predictions depend; a run can be resumed only with equal settings."""
    return {
        "model": asdict(engine.info) | {"classes": engine.info.outputs, "class_names": None},
        "engine": engine.name,
        "precision": engine.precision,
        "device": engine.device,
        "threads": engine.threads,
        "device_batch_size": device_batch_size,
        "images": images,
        "artifact": engine.card.get("key"),
        "data_fingerprint": data.fingerprint,
        "classes_decided": data.decided,
        "classes_present": len(data.present or data.classes),
        "labels_sha256": hashlib.sha256(str(data.labels).encode()).hexdigest(),
        "versions": machine_record()["versions"],
        "input_path": input_path,
    }


def calibrated_on_scored(engine: Engine, data: Dataset, images: int) -> int | None:
    """The number of scored images on which the engine was calibrated, found by comparing the files' bytes.

    Args:
        engine: the engine, whose card lists the size and hash of each calibration file.
        data: the scored images.
        images: the number of scored images, from the first.

    Returns:
        The number; None where the engine was not calibrated or the files are unknown.
    """
    files = {tuple(file) for file in (engine.card.get("calibration") or {}).get("files", ())}
    if not files:
        return None
    sizes, found = {size for size, _ in files}, 0  # only files with one of these sizes must be read
    for i in (i for i, size in enumerate(data.sizes[:images]) if size in sizes or size < 0):
        with suppress(UnreadableFile):  # an unreadable file counts as not used in the calibration
            image = data[i].image
            found += (len(image), hashlib.sha256(image).hexdigest()) in files
    return found
