"""diagnose: why is the accuracy off? Hypotheses measured on the spot, and the one that explains the loss."""

from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from math import ceil, log2
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from timm.data import constants
from tqdm.auto import tqdm

from vitdemo.dataset.batches import prefetched_batches
from vitdemo.dataset.dataset import Dataset
from vitdemo.dataset.decoding import Preprocessing, is_rotated, upright
from vitdemo.dataset.devkit import devkit_of, read_devkit
from vitdemo.dataset.samples import Sample, UnreadableFile
from vitdemo.dataset.trees import CLASSES, Synset, read_classes
from vitdemo.engines.contract import Engine
from vitdemo.engines.eager import EagerEngine
from vitdemo.errors import EngineFailure, VitdemoError, at_least_1, reason_of
from vitdemo.evaluation.published import Published, comparable_published
from vitdemo.machine import now
from vitdemo.models.classes import match_classes
from vitdemo.models.model import Model
from vitdemo.stats import mcnemar_p, spread, wilson_interval

# Class orders that are mistaken for the order of the wnids, and the devkit that tells them apart.


class Numbering(NamedTuple):
    """The devkit's side of a data set.

    ids: int[classes], the ILSVRC2012_ID of each label. truth: file name -> label, by the devkit. ``missing`` says why
    where one of them is None.
    """

    ids: np.ndarray | None
    truth: dict[str, int] | None
    missing: str = ""


def read_numbering(data: Dataset) -> Numbering:
    """From the devkit beside a tar or beside ``val/``; the IDs alone also from ``classes.csv`` beside ``val/``."""
    path = Path(data.path)
    try:
        devkit = read_devkit(devkit_of(path if path.is_file() else path.parent))
    except VitdemoError as error:
        listed = path.parent / CLASSES
        synsets = read_classes(listed) if listed.exists() else []
        return Numbering(_ids(synsets, data.classes), None, f"it needs the devkit: {error}")
    ids = _ids(devkit.synsets, data.classes)
    if ids is None:
        return Numbering(None, None, "it needs the devkit, and the one here is of other classes")
    return Numbering(ids, {f"ILSVRC2012_val_{k:08d}.JPEG": label for k, label in enumerate(devkit.labels, start=1)})


def _ids(synsets: list[Synset], classes: Sequence[str]) -> np.ndarray | None:
    """The ID of each class, provided that they are 1 to the number of classes."""
    by_wnid = {synset.wnid: synset.id for synset in synsets}
    ids = [by_wnid.get(wnid, 0) for wnid in classes]
    return np.array(ids) if sorted(ids) == list(range(1, len(classes) + 1)) else None


# The usual mistakes that cost accuracy: each is put right in turn, and the same images are counted again.


NORMALISATIONS = {
    "with ImageNet's mean/std": (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD),
    "with mean/std 0.5": (constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD),
    "with CLIP's mean/std": (constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD),
}
# crop_pct of Hugging Face's and of timm's ViT
OTHER_CROP = {"center": ("squash", 1.0), "center_floor": ("squash", 1.0), "squash": ("center", 0.9)}
AS_IT_IS, UPRIGHT = "as it is", "with images turned as their EXIF says"
SIGNIFICANCE = 0.05
EXTRACT = "get the labels anew with vitdemo extract, from the original archives"


@dataclass(frozen=True)
class Hypothesis:
    """One mistake put right; ``name`` says what was changed.

    correct, before: bool[images], which images are right with the mistake put right, and which without; None where
    it was not tested, and ``not_tested`` says why. cure: what to do if this is it. took_s: the seconds that its answers
    took, 0 for those that were only counted anew.
    """

    name: str
    cure: str
    correct: np.ndarray | None = None
    before: np.ndarray | None = None
    took_s: float = 0.0
    not_tested: str = ""

    @property
    def gained(self) -> int:
        """Images that were wrong before and are right now."""
        return int((self.correct & ~self.before).sum())

    @property
    def lost(self) -> int:
        """Images that were right before and are wrong now."""
        return int((self.before & ~self.correct).sum())

    @property
    def p(self) -> float:
        """McNemar's exact test on these images, one-sided: only a better accuracy explains a loss."""
        return mcnemar_p(self.gained, self.lost, "greater")


@dataclass
class Variant:
    """An engine and the crops it is given, which is ``crop`` in all but mean and std; those lie in the engine.

    upright: whether the images are turned as their EXIF says. answers: int[images], the index of the largest logit, -1
    for an unreadable image. took_s: with the decoding, where no run before it had decoded the same crops.
    """

    name: str
    cure: str
    engine: Engine
    crop: Preprocessing
    swap_channels: bool = False
    upright: bool = False
    answers: list[int] = field(default_factory=list)
    took_s: float = 0.0


def planned_variants(engine: Engine, model: Model) -> list[Variant]:
    """The engine as it is, the eager fp32 reference of ``model``, then that reference with each other preprocessing."""
    usual = model.info.preprocessing

    def reference(preprocessing: Preprocessing) -> Engine:
        changed = Model(model.module, replace(model.info, preprocessing=preprocessing))
        return EagerEngine(changed, "fp32", device=engine.device, threads=engine.threads)

    eager = reference(usual)
    mode, crop_pct = OTHER_CROP[usual.crop_mode]
    cure = "give the model a Preprocessing with {}"
    swap_cure = "the weights expect blue first: swap the channels of the patch embedding's weights"
    crop_cure = cure.format(f"crop_mode={mode!r}, crop_pct={crop_pct}")
    scaled = (
        Variant(name, cure.format(f"mean={mean}, std={std}"), reference(replace(usual, mean=mean, std=std)), usual)
        for name, (mean, std) in NORMALISATIONS.items()
        if (usual.mean, usual.std) != (mean, std)
    )
    return [
        Variant(AS_IT_IS, "", engine, usual),
        Variant("on the reference engine", "the conversion loses it: vitdemo verify says where", eager, usual),
        *scaled,
        Variant("with red and blue swapped", swap_cure, eager, usual, swap_channels=True),
        Variant(f"with crop mode {mode}", crop_cure, eager, replace(usual, crop_mode=mode, crop_pct=crop_pct)),
    ]


class Upright:
    """Samples turned as their EXIF says."""

    def __init__(self, samples: Dataset):
        self.samples = samples

    def __getitem__(self, i: int) -> Sample:
        sample = self.samples[i]
        try:
            return sample._replace(image=upright(sample.image))
        except Exception:  # what cannot be decoded gets its error from the decoder
            return sample


def answer(runs: list[Variant], sample: Dataset, device_batch_size: int, progress: bool) -> None:
    """Fill in the runs' answers. Crops that runs share are decoded once."""
    with tqdm(total=len(sample) * len(runs), unit="image", disable=not progress, desc="diagnose") as bar:
        for crop, turned in dict.fromkeys((run.crop, run.upright) for run in runs):
            sharing, start = [run for run in runs if (run.crop, run.upright) == (crop, turned)], now()
            source = Upright(sample) if turned else sample
            batches = prefetched_batches(source, range(len(sample)), crop, device_batch_size)
            with closing(batches):
                for batch in batches:
                    readable = np.array([not error for error in batch.errors])
                    for run in sharing:
                        run.answers += np.where(readable, _answers(run, batch.pixels), -1).tolist()
                        run.took_s, start = run.took_s + now() - start, now()
                        bar.update(len(readable))


def _answers(run: Variant, pixels: torch.Tensor) -> np.ndarray:
    try:
        return run.engine(pixels.flip(1) if run.swap_channels else pixels).argmax(1).numpy()
    except Exception as error:  # each runtime has its own
        raise EngineFailure(f"the {run.engine.name} engine failed in a diagnosis: {reason_of(error)}") from error


def preprocessing_hypotheses(runs: list[Variant], labels: np.ndarray) -> list[Hypothesis]:
    """What each of ``planned_runs`` says: another preprocessing against the reference, that against the engine."""
    own, reference, *others = ((run, np.array(run.answers) == labels) for run in runs)
    pairs = [*((run, reference[1]) for run in others), (reference, own[1])]
    return [Hypothesis(run.name, run.cure, correct, before, run.took_s) for (run, correct), before in pairs]


def order_hypotheses(answers: np.ndarray, data: Dataset, numbering: Numbering) -> list[Hypothesis]:
    """The outputs, or the labels, stand in another order than that of the wnids; told by counting anew."""
    hypotheses, labels = [], np.array(data.labels)
    classes = range(len(data.classes))
    orders = {  # that get mistaken for the lexicographic one of the wnids: the rank of each label, None if not known
        "ILSVRC order": None if numbering.ids is None else numbering.ids - 1,
        "the order of numbers as text": np.argsort(sorted(classes, key=str)),  # 0, 1, 10, 100, 101 …
        "the order of the class names": np.argsort(sorted(classes, key=data.class_names.__getitem__)),
    }
    for name, ranks in orders.items():
        outputs = (f"outputs read in {name}", "put the rows of the model's last layer into the order of the wnids")
        wrong_labels = (f"labels read in {name}", EXTRACT)
        if ranks is None or (ranks == np.arange(len(ranks))).all():
            reason = numbering.missing if ranks is None else "it is the order of the wnids"
            hypotheses += [Hypothesis(*both, not_tested=reason) for both in (outputs, wrong_labels)]
            continue
        before = answers == labels
        hypotheses.append(Hypothesis(*outputs, answers == ranks[labels], before))
        hypotheses.append(Hypothesis(*wrong_labels, answers == np.argsort(ranks)[labels], before))
    return hypotheses


def devkit_hypothesis(answers: np.ndarray, data: Dataset, numbering: Numbering) -> Hypothesis:
    """The labels are not those that the devkit has for these files, for whatever reason."""
    name = "labels read from the devkit"
    if numbering.truth is None:
        return Hypothesis(name, EXTRACT, not_tested=numbering.missing)
    truth = [numbering.truth.get(file) for file in data.files]
    if None in truth:
        return Hypothesis(name, EXTRACT, not_tested="the devkit here has no label for these files")
    if truth == data.labels:
        return Hypothesis(name, EXTRACT, not_tested="the labels are the devkit's")
    return Hypothesis(name, EXTRACT, answers == np.array(truth), answers == np.array(data.labels))


def diagnose(
    engine: Engine, model: Model, data: Dataset, *, images: int = 256, device_batch_size: int = 8, progress: bool = True
) -> "Diagnosis":
    """Look for what costs ``engine`` accuracy, on ``images`` of ``data`` (all if fewer), evenly spread over it.

    Each hypothesis is one usual mistake put right, measured on the same images: outputs or labels in another order
    than that of the wnids; labels that are not the devkit's; the other mean and std; red and blue swapped; the other
    crop mode; a conversion that loses something. Orders and labels need no new answers of the engine, they are counted
    anew. Preprocessing lies within an engine, so it is changed in the eager fp32 reference of ``model`` and held
    against that reference unchanged, as the engine is too. All images are decoded on the reference path.

    A loss may have two causes: put right the one that is named, then diagnose again.

    Args:
        engine: whose accuracy is off.
        model: from which it was made.
        data: images with labels, of the model's classes.
        images: how many of them.
        device_batch_size: images at once.
        progress: show a bar.

    Raises:
        VitdemoError: for bad input, and for answers that mean nothing (random weights, the null engine).
        EngineFailure: when the engine breaks.
    """
    at_least_1(images=images, device_batch_size=device_batch_size)
    if engine.info != model.info:
        raise VitdemoError(f"{engine.info.tag}: the engine was not made from this model; give the one it was made from")
    if model.info.weights == "random" or engine.name == "null":
        what = "random weights" if model.info.weights == "random" else "the null engine"
        raise VitdemoError(f"{model.info.tag}: answers of {what} mean nothing, so there is no accuracy to diagnose")
    data = match_classes(model.info, data)
    start, runs, sample = now(), planned_variants(engine, model), data.take(spread(len(data), images))
    rotated = 0
    for i in range(len(sample)):
        with suppress(UnreadableFile):
            rotated += is_rotated(sample[i].image)
    if rotated:
        cure = f"turn the files for good, as mogrify -auto-orient does: {rotated} of these images carry an orientation"
        runs.append(Variant(UPRIGHT, cure, runs[1].engine, runs[1].crop, upright=True))
    answer(runs, sample, device_batch_size, progress)
    labels, answers, numbering = np.array(sample.labels), np.array(runs[0].answers), read_numbering(data)
    hypotheses = [
        *order_hypotheses(answers, sample, numbering),
        devkit_hypothesis(answers, sample, numbering),
        *preprocessing_hypotheses(runs, labels),
    ]
    if not rotated:
        hypotheses.append(Hypothesis(UPRIGHT, "", not_tested="no image carries an EXIF orientation"))
    ids = [data.classes[label] for label in data.labels]
    published, _ = comparable_published(model.info.tag, data.files, ids)
    as_it_is = Hypothesis(AS_IT_IS, "", answers == labels, answers == labels, runs[0].took_s)
    return Diagnosis(as_it_is, hypotheses, published, int((answers < 0).sum()), now() - start)


@dataclass
class Diagnosis:
    """What ``diagnose`` found.

    as_it_is: the engine's own answers. hypotheses: each mistake put right, or why it was not tested. published: the
    published accuracy that these images may be held against, or None. unreadable: images that count as wrong whatever
    is put right. took_s: all of it, in seconds.
    """

    as_it_is: Hypothesis
    hypotheses: list[Hypothesis]
    published: Published | None
    unreadable: int
    took_s: float

    @property
    def images(self) -> int:
        """How many images each hypothesis was measured on."""
        return len(self.as_it_is.correct)

    @property
    def tested(self) -> list[Hypothesis]:
        """The hypotheses that were measured."""
        return [h for h in self.hypotheses if h.correct is not None]

    def p_corrected(self, hypothesis: Hypothesis) -> float:
        """Its p times the number of hypotheses tested (Bonferroni): with many, one would look good by luck."""
        return min(1.0, hypothesis.p * len(self.tested))

    @property
    def explanation(self) -> Hypothesis | None:
        """Of the hypotheses that are significantly better (corrected p < 0.05) the best, of equals the first."""
        better = [h for h in self.tested if self.p_corrected(h) < SIGNIFICANCE]
        return max(better, key=lambda h: h.correct.sum(), default=None)

    @property
    def named(self) -> str | None:
        """The name of the explanation, or None."""
        return self.explanation.name if self.explanation else None

    @property
    def explained(self) -> float | None:
        """What the explanation regains, as a fraction of what was missing to the published top-1.

        It may exceed 1, as both are measured on a sample. None without an explanation, without a published top-1, or
        where none was missing.
        """
        found = self.explanation
        if found is None or self.published is None:
            return None
        missing = self.published.top1 - found.before.mean()
        return float((found.gained - found.lost) / self.images / missing) if missing > 0 else None

    @property
    def table(self) -> pd.DataFrame:
        """A row for things as they are and for each hypothesis tested.

        top1 and its 95 % Wilson interval (ci95_low, ci95_high) as fractions; gained, lost: images right only after, or
        only before, the mistake was put right; p: McNemar's, p_corrected: times the number of hypotheses; took_s.
        """
        rows = []
        for h in (self.as_it_is, *self.tested):
            correct = int(h.correct.sum())
            low, high = wilson_interval(correct, self.images)
            row = {"hypothesis": h.name, "correct": correct, "images": self.images, "top1": correct / self.images}
            row |= {"ci95_low": low, "ci95_high": high, "gained": h.gained, "lost": h.lost}
            rows.append(row | {"p": h.p, "p_corrected": self.p_corrected(h), "took_s": h.took_s})
        table = pd.DataFrame(rows)
        table.loc[0, ["p", "p_corrected"]] = np.nan
        return table

    @property
    def verdict(self) -> str:
        """One line: what explains the loss, by how much, and what to do; or that nothing tested does."""
        text = self._explained(self.explanation) if self.explanation else self._unexplained()
        if self.unreadable:
            text += f"; {self.unreadable} of the {self.images} images cannot be read and count as wrong"
        return text

    def _explained(self, found: Hypothesis) -> str:
        before, after = found.before.mean(), found.correct.mean()
        text = (
            f"{found.name}: top-1 {before:.1%} -> {after:.1%} on the same {self.images} images (gained {found.gained}, "
            f"lost {found.lost}, p = {self.p_corrected(found):.1g} among {len(self.tested)} hypotheses)"
        )
        if self.explained is None:
            return f"{text}; {found.cure}"
        missing, (_, high) = self.published.top1 - before, wilson_interval(int(found.correct.sum()), self.images)
        text += f", {(after - before) * 100:+.1f} points where {missing * 100:.1f} were missing to the published "
        text += f"{self.published.top1:.1%}; {found.cure}"
        return text if high >= self.published.top1 else f"{text}, then diagnose again: more is wrong"

    def _unexplained(self) -> str:
        n, correct, count = self.images, int(self.as_it_is.correct.sum()), len(self.tested)
        low, high = wilson_interval(correct, n)
        text = f"top-1 {correct / n:.1%} ({correct}/{n}, 95 % interval {low:.1%} to {high:.1%})"
        if self.published is None:
            text += f": none of {count} hypotheses is significantly better, and nothing published to hold it against"
        elif high < self.published.top1:
            text += f": below the published {self.published.top1:.1%}, and none of {count} hypotheses explains it"
        else:
            text += f": no loss to explain, published is {self.published.top1:.1%}"
        least = ceil(log2(count / SIGNIFICANCE))  # so many images gained and none lost are just significant
        if least > n:
            return f"{text}; {n} images are too few to show anything, give more"
        return f"{text}; a mistake that costs fewer than {least} of {n} images ({least / n:.1%}) would not show"

    def __str__(self) -> str:
        formats = {name: "{:.1%}".format for name in ("top1", "ci95_low", "ci95_high")}
        formats |= {"p_corrected": "{:.1g}".format, "took_s": "{:.1f}".format}
        table = self.table[["hypothesis", "correct", *formats, "gained", "lost"]]
        not_tested = [f"not tested: {h.name}: {h.not_tested}" for h in self.hypotheses if h.correct is None]
        lines = [self.verdict, table.to_string(index=False, formatters=formats, na_rep=""), *not_tested]
        return "\n".join([*lines, f"{self.images} images, {self.took_s:.1f} s in all"])
