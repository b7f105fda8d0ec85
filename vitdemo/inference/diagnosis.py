"""diagnose: why is the accuracy off? Hypotheses measured on the spot, and the one that explains the loss."""

from dataclasses import dataclass
from math import ceil, log2

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from vitdemo.conversion.engines.contract import Engine
from vitdemo.conversion.models import Model
from vitdemo.dataset.imagenet import ImageNetVal
from vitdemo.errors import VitdemoError
from vitdemo.inference.hypotheses import (
    EXTRACT,
    FLAT,
    Hypothesis,
    Spread,
    answer,
    devkit_hypothesis,
    is_flat,
    order_hypotheses,
    planned_runs,
    preprocessing_hypotheses,
)
from vitdemo.inference.metrics import wilson_interval
from vitdemo.inference.published import Published, published_for
from vitdemo.inference.relabelling import read_numbering
from vitdemo.measure.clock import now

SIGNIFICANCE = 0.05
AS_IT_IS = "as it is"


def diagnose(
    engine: Engine,
    model: Model,
    data: ImageNetVal,
    *,
    images: int = 256,
    device_batch_size: int = 8,
    progress: bool = True,
) -> "Diagnosis":
    """Look for what costs ``engine`` accuracy, on ``images`` of ``data`` (all if fewer), evenly spread over it.

    Each hypothesis is one usual mistake put right, measured on the same images: outputs or labels in another order
    than that of the wnids; labels that are not the devkit's, as those of a flat folder; the other mean and std; red
    and blue swapped; the other crop mode; a conversion that loses something. Orders and labels need no new answers of
    the engine, they are counted anew. Preprocessing lies within an engine, so it is changed in the eager fp32 reference
    of ``model`` and held against that reference unchanged, as the engine is too. All images are decoded on the
    reference path.

    A loss may have two causes: put right the one that is named, then diagnose again. Raises VitdemoError for bad input
    and for answers that mean nothing (random weights, the null engine), EngineFailure when the engine breaks.
    """
    _check_input(engine, model, data, images, device_batch_size)
    start, sample, runs = now(), Spread(data, images), planned_runs(engine, model)
    unreadable = answer(runs, sample, device_batch_size, progress)
    answers, labels, numbering = np.array(runs[0].answers), np.array(sample.labels), read_numbering(data)
    hypotheses = [
        *order_hypotheses(answers, labels, data, numbering),
        devkit_hypothesis(answers, sample, data, numbering),
        *preprocessing_hypotheses(runs, labels),
    ]
    wnids = [data.classes[label] for label in data.labels]
    published, _ = published_for(model.info.tag, data.files, wnids)
    as_it_is = Hypothesis(AS_IT_IS, "", answers == labels, answers == labels, runs[0].took_s)
    flat = len(data.classes) if is_flat(data) else None
    return Diagnosis(as_it_is, hypotheses, published, unreadable, flat, now() - start)


def _check_input(engine: Engine, model: Model, data: ImageNetVal, images: int, device_batch_size: int) -> None:
    for name, value in (("images", images), ("device_batch_size", device_batch_size)):
        if not isinstance(value, int) or value < 1:
            raise VitdemoError(f"{name} {value!r}: must be a whole number of at least 1")
    if engine.info != model.info:
        raise VitdemoError(f"{engine.info.tag}: the engine was not made from this model; give the one it was made from")
    if model.info.weights == "random" or engine.name == "null":
        what = "random weights" if model.info.weights == "random" else "the null engine"
        raise VitdemoError(f"{model.info.tag}: answers of {what} mean nothing, so there is no accuracy to diagnose")
    if list(model.info.classes or ()) != list(data.classes):
        raise VitdemoError(f"{data.path}: its classes are not those of {model.info.tag}; take that model's data set")


@dataclass
class Diagnosis:
    """What ``diagnose`` found.

    as_it_is: the engine's own answers. hypotheses: each mistake put right, or why it was not tested. published: the
    published accuracy that these images may be held against, or None. unreadable: images that count as wrong whatever
    is put right. flat_classes: where all images carry one label, how many classes there should be. took_s: all of it,
    in seconds.
    """

    as_it_is: Hypothesis
    hypotheses: list[Hypothesis]
    published: Published | None
    unreadable: int
    flat_classes: int | None
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
        return max(better, key=lambda h: h.correct.sum(), default=None) or self._flat()

    def _flat(self) -> Hypothesis | None:
        """A flat folder without a devkit leaves only this to see: one label, and no more right than by luck."""
        if self.flat_classes is None:
            return None
        correct = int(self.as_it_is.correct.sum())
        luck = binomtest(correct, self.images, 1 / self.flat_classes, alternative="greater")
        plainly_wrong = wilson_interval(correct, self.images)[1] < 0.5
        return Hypothesis(FLAT, EXTRACT) if luck.pvalue > SIGNIFICANCE and plainly_wrong else None

    @property
    def named(self) -> str | None:
        """The name of the explanation, or None."""
        return self.explanation.name if self.explanation else None

    @property
    def explained(self) -> float | None:
        """What the explanation regains, as a fraction of what was missing to the published top-1.

        It may exceed 1, as both are measured on a sample. None without an explanation that was measured, without a
        published top-1, or where none was missing.
        """
        found = self.explanation
        if found is None or found.correct is None or self.published is None:
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
        found = self.explanation
        if found is None:
            text = self._unexplained()
        elif found.correct is None:
            text = f"{FLAT}: all images carry one label, and the answers hit it no oftener than luck; {found.cure}"
        else:
            text = self._explained(found)
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
