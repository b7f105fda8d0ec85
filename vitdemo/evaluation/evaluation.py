"""evaluate: every image of a data set through one engine, exactly once, with its accuracy and its speed."""

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


@dataclass(eq=False)  # tables have no one answer to ==
class Evaluation:
    """What ``evaluate`` gives.

    rows: one row per image, in file order, the columns of predictions.csv. metrics: metrics.json. out: the folder.
    times: one row per batch of this session, the columns of ``BatchTimes``, in seconds since the session began.
    data: the images with the model's outputs as labels.
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
            text += f", {shared['count']} replicas ({shared['lost']} lost, the idlest {idle:.1f} s idle)"
        text += f"; {m['model']}, weights: {m['weights']}"
        if rotated := m.get("rotated"):
            many = f"{rotated} images carry" if rotated > 1 else "1 image carries"
            text += f"; {many} an EXIF orientation, which is ignored, as timm does: --diagnose tries what turning gives"
        if 2 * seen < min(in_all, len(self.rows)):  # in a folder per class the first images are of the first ones
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

    Every image gives exactly one row; one that cannot be read is a row with its error, counted as wrong. With replicas
    the same images get the same rows; a replica that dies or hangs is replaced, and what it did not bring back is done
    again. With ``out``, the rows go to ``out/predictions.csv`` as they come, in file order when all are there, then
    ``metrics.json`` (see ``summarise``); ``run.json`` holds the settings and the machine.

    Args:
        engine: what ``convert`` made.
        data: the labelled images, of classes that the model has too; see ``match_classes``.
        class_map: which output is which class, where names do not say it; see there.
        device_batch_size: images that the device gets at once.
        replicas: how many processes share the work, on this machine or on the cluster at ``ray_address``; or
            ``Replicas`` that were started before, of this engine and data.
        schedule: "async", see ``AsyncSchedule``, or "sync", see ``SyncSchedule``.
        input_path: "fast", or "reference", which decodes and resizes with PIL, as timm does; see ``fast_crop`` for the
            difference.
        limit: how many images, from the first; None is all.
        out: a new folder for the results.
        resume: go on where an interrupted run with the same settings stopped.
        ray_address: a Ray cluster, "host:port" of its head or "auto"; None is one on this machine.
        progress: whether to draw a bar.

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
    device_batch_size = min(device_batch_size, images)  # what the device gets, and what the metrics say
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
    """In which form ``images`` images are run: here, and as run.json says it; and by which rates that was chosen.

    kept: how many streams a run was begun with. It goes on with them, as on other numbers of threads sums come out in
    another order. So streams is what it says where each replica has one thread.
    """
    if kept:
        return engine if kept == 1 or replicas else engine.side_by_side(), kept, {}
    if replicas and replicas.threads == 1:
        return engine, engine.threads if has_choice(engine) else 1, {}
    form, rates = quicker_on_images(engine, data, images, **options)
    return form, form.streams or 1, rates


def _here(engine: Engine, data: Dataset, todo: Sequence[range], session: Session, **options) -> Brought:
    """The first image's number and the rows of each batch, from this process."""
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
    """The first image's number and the rows of each range, as they come back."""
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
    """Before anything is written or started."""
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
    """All that shapes the predictions: a run may be resumed only under the very same."""
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
    """How many of the scored images the engine was calibrated on, told by their bytes.

    Args:
        engine: whose card names the files that it was calibrated on.
        data: the scored images.
        images: how many of them were scored, from the first.

    Returns:
        None where it was not calibrated, or nobody knows the files.
    """
    files = {tuple(file) for file in (engine.card.get("calibration") or {}).get("files", ())}
    if not files:
        return None
    sizes, found = {size for size, _ in files}, 0  # only files of such a size need be read
    for i in (i for i, size in enumerate(data.sizes[:images]) if size in sizes or size < 0):
        with suppress(UnreadableFile):  # then it was not calibrated on either, as far as anybody can tell
            image = data[i].image
            found += (len(image), hashlib.sha256(image).hexdigest()) in files
    return found
