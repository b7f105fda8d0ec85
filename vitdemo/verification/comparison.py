"""How far two computations of the same model lie apart: in their logits, their answers, and at every layer."""

from dataclasses import dataclass, field
from math import inf, sqrt

import pandas as pd
import torch

from vitdemo.errors import VitdemoError
from vitdemo.stats import mcnemar_p, wilson_interval

LOGITS = "logits"  # what engines call the last of their layers


def compare_logits(reference: torch.Tensor, candidate: torch.Tensor) -> dict[str, float]:
    """The distance of two sides' logits, in double precision.

    Args:
        reference: float32[N, C].
        candidate: the same images' on the other side.

    Returns:
        - ``images``: N.
        - ``max_abs``, ``mean_abs``: of the differences, in units of the logits.
        - ``relative_l2``: ``|candidate - reference| / |reference|`` over all logits.
        - ``pearson``: the correlation of all logits, after each class's mean over the images is taken off: with random
          weights the logits are nearly the same for every image, and what is the same would correlate by itself. NaN
          for one image, which is its own mean.
        - ``top1_agree``, ``top5_agree``: for how many images the reference's answer is the candidate's, or is among its
          first five.
        - ``not_finite``: how many logits are NaN or infinite on either side.
    """
    difference = candidate.double() - reference.double()
    a, b = (logits.double() - logits.double().mean(dim=0) for logits in (reference, candidate))
    answers, ranked = ranking(reference)[:, :1], ranking(candidate)
    return {
        "images": len(reference),
        "max_abs": difference.abs().max().item(),
        "mean_abs": difference.abs().mean().item(),
        "relative_l2": _relative(difference.square().sum().item(), reference.double().square().sum().item()),
        "pearson": ((a * b).sum() / (a.norm() * b.norm())).item(),
        "top1_agree": (ranked[:, :1] == answers).sum().item(),
        "top5_agree": (ranked[:, :5] == answers).sum().item(),
        "not_finite": (~(reference.isfinite() & candidate.isfinite())).sum().item(),
    }


def ranking(logits: torch.Tensor) -> torch.Tensor:
    """The classes of each image, int64[N, C], the likeliest first; of equal ones the lowest, as in ``evaluate``."""
    return logits.sort(dim=1, descending=True, stable=True).indices


def compare_answers(answers: pd.DataFrame) -> dict:
    """Accuracy of two sides on the same images.

    Args:
        answers: one row per image; columns label, reference and candidate, class indices.

    Returns:
        Counts, with 95 % Wilson score intervals as fractions. ``worse``, ``better``: images that only the reference, or
        only the candidate, got right. ``mcnemar_p``: the two-sided p of McNemar's exact test: how often two sides that
        are equally good come to counts as uneven as these.
    """
    right = {side: answers[side] == answers["label"] for side in ("reference", "candidate")}
    worse = int((right["reference"] & ~right["candidate"]).sum())
    better = int((right["candidate"] & ~right["reference"]).sum())
    counts = {side: int(correct.sum()) for side, correct in right.items()}
    sides = {side: {"correct": n, "ci95": wilson_interval(n, len(answers))} for side, n in counts.items()}
    both = {"worse": worse, "better": better, "mcnemar_p": mcnemar_p(better, worse)}
    return {"images": len(answers), **sides, **both}


class LayerErrors:
    """The relative L2 error of each layer over any number of batches, of which it keeps two sums per layer."""

    def __init__(self):
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, reference: dict[str, torch.Tensor], candidate: dict[str, torch.Tensor]) -> None:
        """One batch, by layer, of what the candidate shows; a runtime that fuses layers may not show them all.

        Raises VitdemoError where a layer is not like the reference's.
        """
        for name, found in candidate.items():
            expected = reference.get(name)
            if expected is None or found.shape != expected.shape:
                shape = "unknown" if expected is None else list(expected.shape)
                raise VitdemoError(
                    f"layer {name}: {list(found.shape)} in the engine, {shape} in the model; give verify the model "
                    "that the engine was made from"
                )
            error, size = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = error + _squares(found - expected), size + _squares(expected)

    def relative_l2(self) -> dict[str, float]:
        """``|candidate - reference| / |reference|`` by layer, in the order of the layers; 0 where nothing differs."""
        return {name: _relative(*sums) for name, sums in self._sums.items()}


def _squares(x: torch.Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2


def _relative(error: float, reference: float) -> float:
    """The root of the ratio of two sums of squares; NaN stays NaN."""
    if error == 0:
        return 0.0
    return sqrt(error / reference) if reference else inf


@dataclass
class Comparison:
    """What was gathered of one kind of images.

    indices: of the images in the data set, where they are from one. reference, candidate: logits, one tensor per batch.
    layers: the engine's. twin: some engines show layers only through a second copy of the graph;
    this is the error of that copy's logits against the engine's own. floors: of other ways to compute
    the reference, by their name.
    """

    indices: list[int] = field(default_factory=list)
    reference: list[torch.Tensor] = field(default_factory=list)
    candidate: list[torch.Tensor] = field(default_factory=list)
    layers: LayerErrors = field(default_factory=LayerErrors)
    twin: LayerErrors = field(default_factory=LayerErrors)
    floors: dict[str, LayerErrors] = field(default_factory=dict)
