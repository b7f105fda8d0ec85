"""The planted bugs: a short evaluation script as people write it, with one common mistake of ``BUGS`` switched on.

The verbs of the library have no such switch. The checks that see the mistakes are in ``bug_hunt.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from vitdemo.course.looks import with_preprocessing
from vitdemo.dataset.batches import prefetched_batches
from vitdemo.dataset.dataset import Dataset, open_data
from vitdemo.dataset.devkit import devkit_of, read_devkit
from vitdemo.engines.artifacts import convert, recipe_for
from vitdemo.engines.contract import Engine
from vitdemo.errors import VitdemoError
from vitdemo.evaluation.diagnosis import NORMALISATIONS
from vitdemo.machine import cores, now
from vitdemo.models.model import Model
from vitdemo.stats import percentiles_ms

DROPPED, PADDED = "dropped last batch", "padded duplicates"
NORMALISED = "wrong mean and std"
ILSVRC, AS_TEXT = "labels in ILSVRC order", "labels sorted as text"
UNSYNCHRONISED, COMPILE = "unsynchronised clock", "compile time counted in"
CALIBRATED = "calibrated on the scored images"

BUGS = {  # name -> what the script does
    DROPPED: "it runs whole batches only (drop_last), and the images left over are never seen",
    PADDED: "it fills the last batch with the first images again, as samplers of distributed training do, and counts "
    "them twice",
    NORMALISED: "it normalises with the mean and std of other weights",
    ILSVRC: "it takes ILSVRC2012_ID - 1 for the class index",
    AS_TEXT: "it numbers the classes in the order of their numbers as text: 0, 1, 10, 11 … 19, 2",
    UNSYNCHRONISED: "it reads the clock when a batch was handed over, not when its logits were there",
    COMPILE: "its clock runs while the engine is being built, which the first batch then pays",
    CALIBRATED: "it finds the ranges of int8 on images that it is scored on",
}

SEEN_BY = {  # bug -> the check that sees it
    DROPPED: "set_faults",
    PADDED: "set_faults",
    NORMALISED: "diagnose",
    ILSVRC: "diagnose",
    AS_TEXT: "diagnose",
    UNSYNCHRONISED: "unaccounted_s",
    COMPILE: "paid_once",
    CALIBRATED: "calibrated_on_scored",
}
NEEDS_ENGINE = {COMPILE: ("openvino", "fp32"), CALIBRATED: ("openvino", "int8")}
IMAGES, BATCH, CALIBRATION = 100, 8, 32  # 12 batches of 8, and one of 4


@dataclass(frozen=True)
class BuggyRun:
    """The results that the script has at its end.

    files, labels, answers: of each answer the image's name, the class index it was held against, and the one given.
    step_s: seconds of each batch by the script's own clock. wall_s: of its whole loop, by a second clock. model,
    engine, data: what it used; ``data`` has the labels as the script read them.
    """

    files: list[str]
    labels: list[int]
    answers: list[int]
    step_s: list[float]
    wall_s: float
    model: Model
    engine: Engine
    data: Dataset

    @property
    def correct(self) -> int:
        """How many answers are the label."""
        return sum(answer == label for answer, label in zip(self.answers, self.labels, strict=True))

    @property
    def report(self) -> dict:
        """The numbers that the script prints, by its own clock.

        images, correct, top1 (a fraction), p50_ms and p99_ms of a batch, and images_per_s: all answers over all time.
        """
        images, correct, latency = len(self.files), self.correct, percentiles_ms(self.step_s)
        found = {"images": images, "correct": correct, "top1": correct / images, "p50_ms": latency["p50"]}
        return found | {"p99_ms": latency["p99"], "images_per_s": images / sum(self.step_s)}


def buggy_run(model: Model, data: Dataset, bug: str | None = None) -> BuggyRun:
    """Run ``model`` over the first IMAGES of ``data`` in batches of BATCH, with one of BUGS or none.

    Without a bug the script is plain and right: every image once, the labels of the devkit, the mean and std of the
    weights, a warm-up, and a clock that is read when the logits are there. It uses eager fp32; COMPILE needs an engine
    that is built, and CALIBRATED one that is calibrated: those are OpenVINO's (NEEDS_ENGINE).

    Args:
        model: any that has the classes of ``data``.
        data: a tar with its devkit, and at least IMAGES images.
        bug: a name of BUGS, or None.

    Raises:
        VitdemoError: for a bug that is not known, for other data, and where OpenVINO or NNCF is missing.
    """
    if bug is not None and bug not in BUGS:
        raise VitdemoError(f"bug {bug!r}: there is no such bug; there are {', '.join(map(repr, BUGS))}")
    if data.source != "tar" or len(data) < IMAGES:
        needs = f"a tar with its devkit and at least {IMAGES} images"
        raise VitdemoError(f"{data.path}: the bug hunt needs {needs}; take the bundled shapes20")
    own = model.info.preprocessing
    if bug == NORMALISED:  # ImageNet's, or 0.5 for a model that has those
        mean, std = next(pair for pair in NORMALISATIONS.values() if pair != (own.mean, own.std))
        model = with_preprocessing(model, replace(own, mean=mean, std=std))
    labels, data = _labels(data, bug), open_data(data.path)
    data.labels = labels  # as the script reads them, whatever the devkit says
    samples, batches = [data[i] for i in range(IMAGES)], _batches(bug)
    calibration = samples[:CALIBRATION] if bug == CALIBRATED else None
    make = partial(convert, model, *NEEDS_ENGINE.get(bug, ("eager", "fp32")), calibration=calibration)
    make = partial(_built_anew, model) if bug == COMPILE else make
    decoded = prefetched_batches(data, range(IMAGES), own, BATCH, input_path="fast")
    pixels = torch.cat([batch.pixels for batch in decoded])
    engine, answers, step_s, wall_s = _timed(make, pixels, batches, bug)
    seen = [samples[i] for batch in batches for i in batch]
    files, labels = [sample.file for sample in seen], [sample.label for sample in seen]
    return BuggyRun(files, labels, answers, step_s, wall_s, model, engine, data)


def _built_anew(model: Model) -> Engine:
    """The engine of COMPILE, built into a folder that is gone afterwards: the cache keeps what it has."""
    recipe = recipe_for(model, *NEEDS_ENGINE[COMPILE])
    with TemporaryDirectory() as folder:
        recipe.cls.build(model, recipe.precision, Path(folder), device=recipe.device, calibration=None)
        engine = recipe.cls(Path(folder), model.info, recipe.precision, device=recipe.device, threads=cores())
    engine.card = {"key": recipe.key, **recipe.ingredients}
    return engine


def _timed(
    make: Callable[[], Engine], pixels: torch.Tensor, batches: list[list[int]], bug: str | None
) -> tuple[Engine, list[int], list[float], float]:
    """The engine, its answers, the seconds of each batch by the script's clock, and those of the whole loop."""
    engine = None if bug == COMPILE else make()
    if engine:
        engine.submit(pixels[batches[0]]).result()
    answers, step_s, began = [], [], now()
    for indices in batches:
        batch = pixels[indices]
        start = now()
        engine = engine or make()
        future = engine.submit(batch)
        handed_over = now()
        answers += future.result().argmax(dim=1).tolist()
        step_s.append((handed_over if bug == UNSYNCHRONISED else now()) - start)
    wall_s = now() - began
    engine.close()
    return engine, answers, step_s, wall_s


def _labels(data: Dataset, bug: str | None) -> list[int]:
    if bug == ILSVRC:
        return [id - 1 for id in read_devkit(devkit_of(Path(data.path))).ground_truth]
    if bug == AS_TEXT:
        as_text = sorted(str(label) for label in range(len(data.classes)))
        return [as_text.index(str(label)) for label in data.labels]
    return data.labels


def _batches(bug: str | None) -> list[list[int]]:
    """The indices of each batch."""
    batches = [list(range(start, min(start + BATCH, IMAGES))) for start in range(0, IMAGES, BATCH)]
    if bug == PADDED:
        batches[-1] += range(BATCH - len(batches[-1]))
    return batches[:-1] if bug == DROPPED else batches
