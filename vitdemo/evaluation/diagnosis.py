"""``diagnose``: tests the usual mistakes that cost accuracy, and names the one that explains a measured loss."""

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
from vitdemo.dataset.trees import Synset, listed_classes
from vitdemo.engines.contract import Engine
from vitdemo.engines.eager import EagerEngine
from vitdemo.errors import EngineFailure, VitdemoError, at_least_1, reason_of
from vitdemo.evaluation.published import Published, comparable_published
from vitdemo.machine import now
from vitdemo.models.classes import match_classes
from vitdemo.models.model import Model
from vitdemo.stats import mcnemar_p, spread, wilson_interval

# Orders of the classes that are mistaken for the order of the wnids; the devkit shows which one is right.


class Numbering(NamedTuple):
    """The devkit's information about a data set.

    ids: int[classes], the ILSVRC2012_ID of each label. truth: file name -> label, from the devkit. missing: the reason
    why one of them is None.
    """

    ids: np.ndarray | None
    truth: dict[str, int] | None
    missing: str = ""


def read_numbering(data: Dataset) -> Numbering:
    """Read the devkit next to a tar or next to ``val/``, or only the IDs from ``classes.csv`` next to ``val/``."""
    path = Path(data.path)
    try:
        devkit = read_devkit(devkit_of(path if path.is_file() else path.parent))
    except VitdemoError as error:
        return Numbering(_ids(listed_classes(path), data.classes), None, f"it needs the devkit: {error}")
    ids = _ids(devkit.synsets, data.classes)
    if ids is None:
        return Numbering(None, None, "it needs the devkit, and the one here is of other classes")
    return Numbering(ids, {f"ILSVRC2012_val_{k:08d}.JPEG": label for k, label in enumerate(devkit.labels, start=1)})


def _ids(synsets: list[Synset], classes: Sequence[str]) -> np.ndarray | None:
    """The ID of each class; None unless the IDs are exactly 1 to the number of classes."""
    by_wnid = {synset.wnid: synset.id for synset in synsets}
    ids = [by_wnid.get(wnid, 0) for wnid in classes]
    return np.array(ids) if sorted(ids) == list(range(1, len(classes) + 1)) else None


# The usual mistakes that cost accuracy. They are corrected one at a time, and the same images are counted again.


NORMALISATIONS = {
    "with ImageNet's mean/std": (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD),
    "with mean/std 0.5": (constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD),
    "with CLIP's mean/std": (constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD),
}
# The crop modes and values of crop_pct that Hugging Face and timm use for ViT
OTHER_CROP = {"center": ("squash", 1.0), "center_floor": ("squash", 1.0), "squash": ("center", 0.9)}
AS_IT_IS, UPRIGHT = "as it is", "with images turned as their EXIF says"
SIGNIFICANCE = 0.05
EXTRACT = "get the labels again with vitdemo extract, from the original archives"


@dataclass(frozen=True)
class Hypothesis:
    """A supposed mistake and its correction; ``name`` describes the correction.

    correct, before: bool[images], the images that are right with the correction, and without it; None where the
    hypothesis was not tested, for the reason ``not_tested``. cure: what the user can do if the hypothesis is true.
    took_s: the seconds to compute the predictions, 0 where existing predictions were only counted again.
    """

    name: str
    cure: str
    correct: np.ndarray | None = None
    before: np.ndarray | None = None
    took_s: float = 0.0
    not_tested: str = ""

    @property
    def gained(self) -> int:
        """The number of images that were wrong before the correction and are right after it."""
        return int((self.correct & ~self.before).sum())

    @property
    def lost(self) -> int:
        """The number of images that were right before the correction and are wrong after it."""
        return int((self.before & ~self.correct).sum())

    @property
    def p(self) -> float:
        """The one-sided p-value of McNemar's exact test, because only a gain in accuracy can explain a loss."""
        return mcnemar_p(self.gained, self.lost, "greater")


@dataclass
class Variant:
    """An engine and the preprocessing of its images.

    crop: the preprocessing, except mean and std, which are part of the engine. upright: whether images are rotated by
    their EXIF orientation. answers: int[images], the index of the largest logit, -1 for an unreadable image. took_s:
    the seconds of the run; they include the decoding unless an earlier run has decoded the same crops.
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
    """The unchanged engine, the eager fp32 reference of ``model``, and the reference with each other preprocessing."""
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
    """Samples with their images rotated by the EXIF orientation."""

    def __init__(self, samples: Dataset):
        self.samples = samples

    def __getitem__(self, i: int) -> Sample:
        sample = self.samples[i]
        try:
            return sample._replace(image=upright(sample.image))
        except Exception:  # the image cannot be decoded, which the decoder will report
            return sample


def answer(runs: list[Variant], sample: Dataset, device_batch_size: int, progress: bool) -> None:
    """Fill in the answers of the runs. Crops that several runs share are decoded once."""
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
    except Exception as error:  # each runtime raises its own types
        raise EngineFailure(f"the {run.engine.name} engine failed in a diagnosis: {reason_of(error)}") from error


def preprocessing_hypotheses(runs: list[Variant], labels: np.ndarray) -> list[Hypothesis]:
    """The hypotheses of ``planned_variants``.

    Each other preprocessing is compared with the reference, and the reference with the engine.
    """
    own, reference, *others = ((run, np.array(run.answers) == labels) for run in runs)
    pairs = [*((run, reference[1]) for run in others), (reference, own[1])]
    return [Hypothesis(run.name, run.cure, correct, before, run.took_s) for (run, correct), before in pairs]


def order_hypotheses(answers: np.ndarray, data: Dataset, numbering: Numbering) -> list[Hypothesis]:
    """Hypotheses that the outputs or the labels have another order than the wnids, tested by counting again."""
    hypotheses, labels = [], np.array(data.labels)
    classes = range(len(data.classes))
    orders = {  # orders that are mistaken for that of the wnids: the rank of each label, None if unknown
        "ILSVRC order": None if numbering.ids is None else numbering.ids - 1,
        "the order of numbers as text": np.argsort(sorted(classes, key=str)),  # 0, 1, 10, 100, 101 …
        "the order of the class names": np.argsort(sorted(classes, key=data.class_names.__getitem__)),
    }
    cures = "put the rows of the model's last layer into the order of the wnids", EXTRACT
    if data.decided.startswith(("by order", "by numbers", "by the file")):
        cures = ("give another --class-map: sorted, natural, or a file",) * 2
    for name, ranks in orders.items():
        outputs, wrong_labels = (f"outputs read in {name}", cures[0]), (f"labels read in {name}", cures[1])
        if ranks is None or (ranks == np.arange(len(ranks))).all():
            reason = numbering.missing if ranks is None else "it is the order of the wnids"
            hypotheses += [Hypothesis(*both, not_tested=reason) for both in (outputs, wrong_labels)]
            continue
        before = answers == labels
        hypotheses.append(Hypothesis(*outputs, answers == ranks[labels], before))
        hypotheses.append(Hypothesis(*wrong_labels, answers == np.argsort(ranks)[labels], before))
    return hypotheses


def devkit_hypothesis(answers: np.ndarray, data: Dataset, numbering: Numbering) -> Hypothesis:
    """The hypothesis that the labels differ from the devkit's labels for these files."""
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
    """Look for the cause of ``engine``'s loss of accuracy, on ``images`` of ``data``, evenly spread (all if fewer).

    Each hypothesis corrects one usual mistake, and is measured on the same images: outputs or labels in another order
    than the wnids; labels that differ from the devkit's; another mean and std; red and blue swapped; another crop mode;
    a loss in the conversion; images that need rotating by their EXIF orientation. For orders and labels, the engine's
    predictions are only counted again. Preprocessing is part of an engine, so it is changed in the eager fp32 reference
    of ``model`` and compared with the unchanged reference, which is compared with the engine. All images are decoded on
    the reference path.

    A loss may have two causes: correct the named one, then diagnose again.

    Args:
        engine: the engine with the loss of accuracy.
        model: the model from which it was made.
        data: images with labels, in the model's classes.
        images: the number of images.
        device_batch_size: images per batch.
        progress: show a progress bar.

    Returns:
        The diagnosis.

    Raises:
        VitdemoError: for bad input, and where predictions mean nothing (random weights, the null engine).
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
        cure = f"rotate the files, as mogrify -auto-orient does: {rotated} of these images carry an orientation"
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
    """The result of ``diagnose``.

    as_it_is: the engine's own predictions. hypotheses: all hypotheses, tested or with the reason why not. published:
    the published accuracy that is comparable on these images, or None. unreadable: the number of unreadable images,
    which count as wrong in every hypothesis. took_s: the seconds of the whole diagnosis.
    """

    as_it_is: Hypothesis
    hypotheses: list[Hypothesis]
    published: Published | None
    unreadable: int
    took_s: float

    @property
    def images(self) -> int:
        """The number of images on which each hypothesis was measured."""
        return len(self.as_it_is.correct)

    @property
    def tested(self) -> list[Hypothesis]:
        """The hypotheses that were measured."""
        return [h for h in self.hypotheses if h.correct is not None]

    def p_corrected(self, hypothesis: Hypothesis) -> float:
        """Its p-value times the number of tested hypotheses (Bonferroni): of many, one looks good by luck."""
        return min(1.0, hypothesis.p * len(self.tested))

    @property
    def explanation(self) -> Hypothesis | None:
        """The best of the hypotheses that are significantly better (corrected p < 0.05), the first of equal ones."""
        better = [h for h in self.tested if self.p_corrected(h) < SIGNIFICANCE]
        return max(better, key=lambda h: h.correct.sum(), default=None)

    @property
    def named(self) -> str | None:
        """The name of the explanation, or None."""
        return self.explanation.name if self.explanation else None

    @property
    def explained(self) -> float | None:
        """The gain of the explanation, as a fraction of the loss against the published top-1.

        It may exceed 1, because both are measured on a sample. None without an explanation, without a published top-1,
        or without a loss.
        """
        found = self.explanation
        if found is None or self.published is None:
            return None
        missing = self.published.top1 - found.before.mean()
        return float((found.gained - found.lost) / self.images / missing) if missing > 0 else None

    @property
    def table(self) -> pd.DataFrame:
        """One row for the unchanged engine, and one row per tested hypothesis.

        top1 and its 95 % Wilson interval (ci95_low, ci95_high) are fractions. gained, lost: the number of images that
        are right only after, or only before, the correction. p: of McNemar's test; p_corrected: p times the number of
        hypotheses. took_s: seconds.
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
        """One line: the explanation of the loss, its size, and what to do; or that no tested hypothesis explains it."""
        text = self._explained(self.explanation) if self.explanation else self._unexplained()
        if self.unreadable:
            text += f"; {self.unreadable} of the {self.images} images cannot be read and count as wrong"
        return text

    def _explained(self, found: Hypothesis) -> str:
        before, after, count = found.before.mean(), found.correct.mean(), len(self.tested)
        text = f"{found.name}: top-1 {before:.1%} -> {after:.1%} on the same {self.images} images (gained "
        text += f"{found.gained}, lost {found.lost}, p = {self.p_corrected(found):.1g} among {count} hypotheses)"
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
            text += f": none of {count} hypotheses is significantly better, and no published accuracy is comparable"
        elif high < self.published.top1:
            text += f": below the published {self.published.top1:.1%}, and none of {count} hypotheses explains it"
        else:
            text += f": no loss to explain, published is {self.published.top1:.1%}"
        least = ceil(log2(count / SIGNIFICANCE))  # the smallest significant number of images gained with none lost
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
