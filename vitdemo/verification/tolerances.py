"""The tolerances of each precision, and the report that applies them.

A layer is judged by its relative L2 error, ``|candidate - reference| / |reference|`` over all its numbers. Unlike a
correlation, it detects a scaled output. Layers are compared where an error is still large: at each block's attention
and MLP before they are added to the residual stream, in which an error of 5 % shrinks to 0.4 %.

A layer's tolerance lies between two errors that were measured on vit_shapes20, on real images / on random ones:

- the largest error of any layer from rounding alone, in any engine: fp32 6e-7 / 6e-7, bf16 7e-3 / 7e-3, int8 4e-2 /
  7e-2, and in eager fp16, on a CPU, 8e-4 / 8e-4;
- the smallest error of a branch when one of its weight matrices is scaled: by 1.05 (fp32, bf16) 5e-2 / 3e-2, by 1.5
  (int8) 0.5 / 0.26.

ViT-B/16 with random weights has an error of 1.2e-2 in bf16. For a model with still larger rounding errors the tolerance
follows the noise floor that ``verify`` measures, see ``loosened``.
"""

from dataclasses import dataclass
from math import inf

import pandas as pd
import torch

from vitdemo.dataset.dataset import Dataset
from vitdemo.engines.contract import Engine
from vitdemo.models.model import ModelInfo
from vitdemo.verification.comparison import LOGITS, Comparison, compare_answers, compare_logits, ranking

REAL, RANDOM = "real", "random"  # the kinds of images
NEXT = "next: build it again with `vitdemo convert … --force`; if it fails again, take another precision or engine"
NEXT_INT8 = (
    "next: take another precision or engine, or calibrate on other images; `vitdemo evaluate` says what int8 costs"
)


@dataclass(frozen=True)
class Tolerance:
    """The limits for an engine of one precision; None means that a value is not judged.

    layer_l2, logits_l2: the largest relative L2 error of a layer, and of the logits. pearson: the smallest correlation
    of the centred logits. agreement: the smallest fraction of real images with the reference's top-1 class; one
    different image is always allowed.
    """

    layer_l2: float
    logits_l2: float | None = None
    pearson: float | None = None
    agreement: float | None = None


TOLERANCES = {
    "fp32": Tolerance(layer_l2=1e-4, logits_l2=1e-4),
    "fp16": Tolerance(layer_l2=2.5e-3, logits_l2=2.5e-3),
    "bf16": Tolerance(layer_l2=2e-2, logits_l2=2e-2),
    "int8": Tolerance(layer_l2=0.15, pearson=0.98, agreement=0.98),
}


def loosened(start: float, floor: float) -> float:
    """The tolerance for a noise floor: twice ``floor``, but at least ``start`` and at most twice ``start``."""
    return min(max(start, 2 * floor), 2 * start)


@dataclass
class Report:
    """The result of ``verify``.

    engine, precision: the candidate's. info: the info of its model.
    overall: the result of ``compare_logits``, one row per kind of images, real and random.
    layers: from input to output, the logits last, one row per layer and kind: relative_l2, floor, tolerance.
    floors: the errors of other ways to compute the reference, one row per way, kind and layer.
    twin_l2: relative L2 error of the logits that came with the layers, relative to the engine's own logits; None for
    an engine that shows no layers.
    accuracy: see ``compare_answers``; None without labels and with random weights.
    flips: one row per real image whose top-1 class differs: its index in the data set, file, label, and both classes as
    indices. failures: one line per failure; empty if the engine passed.
    """

    engine: str
    precision: str
    info: ModelInfo
    overall: pd.DataFrame
    layers: pd.DataFrame
    floors: pd.DataFrame
    twin_l2: float | None
    accuracy: dict | None
    flips: pd.DataFrame
    failures: list[str]

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def first_bad_layer(self) -> str | None:
        """The first layer, from the input, that exceeds its tolerance on either kind of images."""
        bad = self.layers[~(self.layers["relative_l2"] <= self.layers["tolerance"])]
        return None if bad.empty else bad["layer"].iloc[0]

    def __str__(self) -> str:
        formats = dict.fromkeys(("max_abs", "mean_abs", "relative_l2"), "{:.1e}".format) | {"pearson": "{:.5f}".format}
        lines = [
            f"{self.info.tag}, weights: {self.info.weights}; {self.engine} {self.precision} against eager fp32",
            self.overall.to_string(index=False, formatters=formats),
            *self._floor_lines(),
            *self._layer_lines(),
        ]
        if self.accuracy:
            lines.append(_accuracy_line(**self.accuracy))
        after = NEXT_INT8 if self.precision == "int8" else NEXT
        ends = ["passed"] if self.ok else [*(f"FAILED: {failure}" for failure in self.failures), after]
        return "\n".join([*lines, *ends])

    def _floor_lines(self) -> list[str]:
        lines = []
        for way, rows in self.floors.groupby("way", sort=False):
            logits = rows[rows["layer"] == LOGITS].itertuples()
            moved = ", ".join(f"{row.relative_l2:.1e} on {row.kind} images" for row in logits)
            lines.append(f"noise floor, {way}: logits {moved}; any layer at most {rows['relative_l2'].max():.1e}")
        return lines

    def _layer_lines(self) -> list[str]:
        if self.twin_l2 is None:
            return ["layers: this engine shows none"]
        nearest = self.layers.loc[(self.layers["relative_l2"] / self.layers["tolerance"]).fillna(inf).idxmax()]
        return [
            f"layers: nearest to its tolerance is {nearest['layer']}, {nearest['relative_l2']:.1e} of "
            f"{nearest['tolerance']:.1e} on {nearest['kind']} images",
            f"twin that shows the layers: its logits are {self.twin_l2:.1e} from the engine's own",
        ]


def _accuracy_line(images: int, reference: dict, candidate: dict, worse: int, better: int, mcnemar_p: float) -> str:
    sides = (
        f"{name} {side['correct']}/{images} ({side['ci95'][0]:.1%} to {side['ci95'][1]:.1%})"
        for name, side in (("reference", reference), ("candidate", candidate))
    )
    return (
        f"top-1: {', '.join(sides)}; {worse} images only the reference got right, {better} only the candidate: "
        f"McNemar's p {mcnemar_p:.2g}"
    )


def make_report(engine: Engine, model: ModelInfo, data: Dataset | None, comparisons: dict[str, Comparison]) -> Report:
    """Make the report from the measurements, and judge it by the tolerances.

    Args:
        engine: the candidate.
        model: the info of the reference model.
        data: the data set of the real images.
        comparisons: the measurements by kind of images.
    """
    logits = {kind: (torch.cat(c.reference), torch.cat(c.candidate)) for kind, c in comparisons.items()}
    answers = _answers(data, comparisons[REAL].indices, logits[REAL]) if data is not None else NO_ANSWERS
    trained = model.weights != "random"  # the predictions of random weights mean nothing
    floors = _floors(comparisons)
    twins = pd.Series([error for c in comparisons.values() for error in c.twin.relative_l2().values()])
    report = Report(
        engine=engine.name,
        precision=engine.precision,
        info=engine.info,
        overall=pd.DataFrame([{"kind": kind, **compare_logits(*sides)} for kind, sides in logits.items()]),
        layers=_layers(comparisons, floors, TOLERANCES[engine.precision].layer_l2),
        floors=floors,
        twin_l2=None if twins.empty else float(twins.max(skipna=False)),
        accuracy=compare_answers(answers) if len(answers) and trained and data.decided else None,
        flips=answers[answers["reference"] != answers["candidate"]].reset_index(drop=True),
        failures=[],
    )
    report.failures += _failures(report, trained)
    return report


NO_ANSWERS = pd.DataFrame(columns=["index", "file", "label", "reference", "candidate"])


def _answers(data: Dataset, indices: list[int], logits: tuple[torch.Tensor, torch.Tensor]) -> pd.DataFrame:
    reference, candidate = (ranking(side)[:, 0].tolist() for side in logits)
    known = ((i, data.files[i], data.labels[i]) for i in indices)
    rows = [(*image, a, b) for image, a, b in zip(known, reference, candidate, strict=True)]
    return pd.DataFrame(rows, columns=NO_ANSWERS.columns)


def _floors(comparisons: dict[str, Comparison]) -> pd.DataFrame:
    rows = [
        (way, kind, layer, error)
        for kind, comparison in comparisons.items()
        for way, errors in comparison.floors.items()
        for layer, error in errors.relative_l2().items()
    ]
    return pd.DataFrame(rows, columns=["way", "kind", "layer", "relative_l2"])


def _layers(comparisons: dict[str, Comparison], floors: pd.DataFrame, start: float) -> pd.DataFrame:
    errors = {kind: comparison.layers.relative_l2() for kind, comparison in comparisons.items()}
    floor = floors.groupby(["layer", "kind"])["relative_l2"].max()
    rows = [
        (layer, kind, errors[kind][layer], floor[layer, kind], loosened(start, floor[layer, kind]))
        for layer in errors[RANDOM]
        for kind in errors
    ]
    return pd.DataFrame(rows, columns=["layer", "kind", "relative_l2", "floor", "tolerance"])


def _failures(report: Report, trained: bool) -> list[str]:
    """One line per value that exceeds its tolerance; NaN exceeds every tolerance."""
    tolerance, lines = TOLERANCES[report.precision], []
    floor = report.floors[report.floors["layer"] == LOGITS].groupby("kind")["relative_l2"].max()
    for row in report.overall.itertuples():
        on = f"on {row.kind} images"
        if row.not_finite:
            lines.append(f"{row.not_finite} logits {on} are NaN or infinite, the reference's or the candidate's")
        if tolerance.logits_l2 and not row.relative_l2 <= (most := loosened(tolerance.logits_l2, floor[row.kind])):
            lines.append(f"logits: relative L2 {row.relative_l2:.1e} {on}, more than {most:.1e}")
        if tolerance.pearson and row.images > 1 and not row.pearson >= tolerance.pearson:
            lines.append(f"logits: Pearson correlation {row.pearson:.4f} {on}, less than {tolerance.pearson}")
        if tolerance.agreement and row.kind == REAL and trained:
            flips = row.images - row.top1_agree
            if flips > max(1, (1 - tolerance.agreement) * row.images):
                lines.append(f"{flips} of {row.images} answers differ {on}, more than {1 - tolerance.agreement:.0%}")
    bad = report.layers[report.layers["layer"] == report.first_bad_layer]
    for row in bad.itertuples():
        lines.append(
            f"layer {row.layer} is the first out of its tolerance: relative L2 {row.relative_l2:.1e} on {row.kind} "
            f"images, where {row.tolerance:.1e} is allowed"
        )
    twin = loosened(tolerance.layer_l2, floor.max())
    if report.twin_l2 is not None and not report.twin_l2 <= twin:
        lines.append(f"twin that shows the layers: its logits are {report.twin_l2:.1e} from the engine's own")
    return lines
