"""The differences between two computations of the same model: in the logits, the predictions, and at every layer."""

from dataclasses import dataclass, field
from math import inf, sqrt

import pandas as pd
import torch

from vitdemo.errors import VitdemoError
from vitdemo.stats import mcnemar_p, wilson_interval

LOGITS = "logits"  # the name of the last entry of ``Engine.layers``


def compare_logits(reference: torch.Tensor, candidate: torch.Tensor) -> dict[str, float]:
    """The difference between the logits of two sides, in double precision.

    Args:
        reference: float32[N, C].
        candidate: float32[N, C], the other side's logits of the same images.

    Returns:
        - ``images``: N.
        - ``max_abs``, ``mean_abs``: the largest and the mean absolute difference, in units of the logits.
        - ``relative_l2``: ``|candidate - reference| / |reference|`` over all logits.
        - ``pearson``: the correlation of all logits, after each class's mean over the images is subtracted. (With
          random weights the logits are nearly the same for every image, and this common part would always correlate.)
          NaN for a single image, which is its own mean.
        - ``top1_agree``, ``top5_agree``: the number of images where the reference's top-1 class is the candidate's, or
          is among the candidate's first five.
        - ``not_finite``: the number of logits that are NaN or infinite on either side.
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
    """The classes of each image, int64[N, C], the likeliest first; equal logits rank by class index."""
    return logits.sort(dim=1, descending=True, stable=True).indices


def compare_answers(answers: pd.DataFrame) -> dict:
    """The accuracy of two sides on the same images.

    Args:
        answers: one row per image; the columns label, reference and candidate are class indices.

    Returns:
        Counts, with 95 % Wilson score intervals as fractions. ``worse``, ``better``: the number of images that only the
        reference, or only the candidate, got right. ``mcnemar_p``: the two-sided p-value of McNemar's exact test: how
        often two equally good sides give counts at least this uneven.
    """
    right = {side: answers[side] == answers["label"] for side in ("reference", "candidate")}
    worse = int((right["reference"] & ~right["candidate"]).sum())
    better = int((right["candidate"] & ~right["reference"]).sum())
    counts = {side: int(correct.sum()) for side, correct in right.items()}
    sides = {side: {"correct": n, "ci95": wilson_interval(n, len(answers))} for side, n in counts.items()}
    both = {"worse": worse, "better": better, "mcnemar_p": mcnemar_p(better, worse)}
    return {"images": len(answers), **sides, **both}


class LayerErrors:
    """The relative L2 error of each layer over any number of batches; only two sums per layer are kept."""

    def __init__(self):
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, reference: dict[str, torch.Tensor], candidate: dict[str, torch.Tensor]) -> None:
        """Add one batch of outputs by layer. The candidate may lack layers, because some runtimes fuse them.

        Raises VitdemoError where the reference lacks a layer or has another shape.
        """
        for name, found in candidate.items():
            expected = reference.get(name)
            if expected is None or found.shape != expected.shape:
                shape = "unknown" if expected is None else list(expected.shape)
                shapes = f"{list(found.shape)} in the engine, {shape} in the model"
                raise VitdemoError(f"layer {name}: {shapes}; give verify the model that the engine was made from")
            error, size = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = error + _squares(found - expected), size + _squares(expected)

    def relative_l2(self) -> dict[str, float]:
        """``|candidate - reference| / |reference|`` by layer, in the order of the layers; 0 without any difference."""
        return {name: _relative(*sums) for name, sums in self._sums.items()}


def _squares(x: torch.Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2


def _relative(error: float, reference: float) -> float:
    """The square root of the ratio of two sums of squares; NaN stays NaN."""
    if error == 0:
        return 0.0
    return sqrt(error / reference) if reference else inf


@dataclass
class Comparison:
    """The measurements on one kind of images.

    indices: the indices of the images in the data set, if they are from one. reference, candidate: the logits, one
    tensor per batch. layers: the errors of the engine's layers. twin: some engines show layers only through a second
    copy of the graph; this is the error of that copy's logits relative to the engine's own. floors: the errors of other
    ways to compute the reference, by the way's name.
    """

    indices: list[int] = field(default_factory=list)
    reference: list[torch.Tensor] = field(default_factory=list)
    candidate: list[torch.Tensor] = field(default_factory=list)
    layers: LayerErrors = field(default_factory=LayerErrors)
    twin: LayerErrors = field(default_factory=LayerErrors)
    floors: dict[str, LayerErrors] = field(default_factory=dict)
