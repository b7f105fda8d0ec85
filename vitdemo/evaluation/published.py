"""Published accuracies (``data/published/accuracy.csv``), and the comparison of a measured accuracy with them."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass

from vitdemo.dataset.decoding import Preprocessing
from vitdemo.dataset.devkit import read_devkit
from vitdemo.dataset.trees import VAL_NAME
from vitdemo.evaluation.evaluation import Evaluation
from vitdemo.models.checkpoints import WNIDS
from vitdemo.paths import DEVKIT, SHAPES20, data_path

TABLE = "published/accuracy.csv"


@dataclass(frozen=True)
class Published:
    """The published accuracy of the weights ``tag`` on ``data_set``, which has ``images`` of ``classes`` classes.

    top1, top5: fractions (top5 is None where it is not published). preprocessing: the one with which they were
    measured. source: the publisher. timm repeats its measurements from time to time, and a top-1 differs between
    versions of its table by up to 0.02 points.
    """

    tag: str
    data_set: str
    images: int
    classes: int
    top1: float
    top5: float | None
    preprocessing: Preprocessing
    source: str


def published_accuracy(tag: str) -> Published | None:
    """The published accuracy of pretrained weights in ``data/published/accuracy.csv``; None for an unknown tag.

    Args:
        tag: the full tag, such as ``resnet18.tv_in1k`` or ``hf:google/vit-base-patch16-224``.
    """
    with open(data_path(TABLE), encoding="utf-8", newline="") as file:
        row = next((row for row in csv.DictReader(file) if row["tag"] == tag.replace("hf-hub:", "hf:")), None)
    if row is None:
        return None
    side, images, classes = (int(row[name]) for name in ("input_size_px", "images", "classes"))
    mean, std = (tuple(map(float, row[name].split())) for name in ("mean", "std"))
    crop = Preprocessing((3, side, side), float(row["crop_pct"]), row["crop_mode"], row["interpolation"], mean, std)
    top1, top5 = (float(row[name]) / 100 if row[name] else None for name in ("top1_percent", "top5_percent"))
    return Published(row["tag"], row["data_set"], images, classes, top1, top5, crop, row["source"])


def comparable_published(tag: str, files: Sequence[str], wnids: Sequence[str]) -> tuple[Published | None, str]:
    """The published accuracy that is comparable on some images, or None and the reason why there is none.

    The images must be from the data set of the published accuracy: all of them, or a part that covers about as many
    classes as a random choice would.

    Args:
        tag: the tag of the weights.
        files: the images' names.
        wnids: the images' classes.
    """
    published = published_accuracy(tag)
    if published is None:
        return None, f"none is known for {tag}"
    known = read_devkit(data_path(DEVKIT)).class_names if published.data_set == SHAPES20 else WNIDS
    if not (set(wnids) <= set(known) and all(map(VAL_NAME.fullmatch, files))):
        return None, f"{tag}'s is for {published.data_set}, and these images are not from it"
    covered, expected = len(set(wnids)), published.classes * (1 - (1 - 1 / published.classes) ** len(wnids))
    # More images per class than the data set has cannot be due to a choice of classes; the labels must be wrong.
    possible = len(wnids) <= covered * published.images // published.classes
    if possible and covered < 0.8 * expected:
        return None, f"{tag}'s is for {published.classes} classes, and these images are of {covered}"
    return published, ""


@dataclass(frozen=True)
class Comparison:
    """A measured top-1 next to the published one.

    verdict: "agrees", "below" or "above" when the published value lies in, above or below the measured 95 % interval;
    otherwise "not published" or "not measured". The interval is that of a random sample. If all images of the data set
    were run, both sides saw the same images, and a difference smaller than the interval can already be a loss. The text
    therefore gives the difference in percentage points.
    """

    verdict: str
    text: str
    published: Published | None = None

    def __str__(self) -> str:
        return self.text


def compare_published(evaluation: Evaluation) -> Comparison:
    """Compare a measured top-1 with the published one of the same weights.

    Args:
        evaluation: the result of ``evaluate``.
    """
    m, rows = evaluation.metrics, evaluation.rows
    published, reason = comparable_published(m["model"], rows["file"].tolist(), rows["class_id"].tolist())
    if published is None:
        return Comparison("not published", f"published top-1: {reason}")
    own = "" if m["weights"] == "pretrained" else f"; of the published weights, these are from {m['weights']}"
    text = f"published top-1 {published.top1:.1%} on {published.data_set} ({published.source}{own})"
    if m["top1"] is None:
        return Comparison("not measured", f"{text}: not measured here", published)
    (low, high), points = m["top1_ci95"], (m["top1"] - published.top1) * 100
    verdict = "below" if high < published.top1 else "above" if low > published.top1 else "agrees"
    measured = f"{m['correct']}/{m['images']} = {m['top1']:.1%}, 95 % interval {low:.1%} to {high:.1%}"
    part = "" if m["images"] == published.images else f", on a part of its {published.images:,} images"
    says = {"agrees": "measured agrees", "below": "measured is below", "above": "measured is above"}[verdict]
    return Comparison(verdict, f"{text}: {says}: {measured}, {points:+.2f} points{part}", published)
