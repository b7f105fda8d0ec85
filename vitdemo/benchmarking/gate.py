"""A gate for CI: checks whether an engine's speed relative to eager has dropped since a baseline was measured.

The ratio to eager is compared, because on a busy machine both sides slow down together. Another machine has other
ratios.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd

from vitdemo.benchmarking.pairs import EAGER, Pair
from vitdemo.benchmarking.rows import OK
from vitdemo.errors import VitdemoError
from vitdemo.models.model import ModelInfo

RATIO = "speedup_over_eager_fp32"
SAME = ["model", "weights", "engine", "precision", "replicas", "device_batch_size"]
WORSE_BY = 0.2
FINE, WORSE, STALE, GONE = "fine", "worse", "better: measure the baseline again", "not measured any more"


def compare(rows: pd.DataFrame, baseline: pd.DataFrame, worse_by: float = WORSE_BY) -> pd.DataFrame:
    """Each ratio to eager fp32 next to the baseline's, with a ``verdict``.

    WORSE: below ``(1 - worse_by)`` of the baseline's ratio. STALE: above ``1 / (1 - worse_by)`` of it. GONE: the
    baseline has a ratio and these rows have none. ``change``: ratio / baseline - 1.

    Args:
        rows: the rows of the sweep that was just measured.
        baseline: the rows of an earlier sweep, see ``check_baseline``.
        worse_by: a fraction, see ``check_share``.

    Raises:
        VitdemoError: where the baseline has no row with the same model, engine, precision and batch.
    """
    before = _ratios(baseline).dropna(subset=RATIO).merge(rows[SAME].drop_duplicates(), on=SAME)
    both = before.merge(_ratios(rows), on=SAME, how="left", suffixes=("_baseline", ""))
    if both.empty:
        raise VitdemoError("against: the baseline has no row of the same model, engine, precision and batch as these")
    both["change"] = both[RATIO] / both[f"{RATIO}_baseline"] - 1
    found = [both[RATIO].isna(), both["change"] < -worse_by, both["change"] > 1 / (1 - worse_by) - 1]
    return both.assign(verdict=np.select(found, [GONE, WORSE, STALE], FINE))


def check_baseline(baseline: pd.DataFrame) -> None:
    """Check that rows can be compared with this baseline.

    Raises:
        VitdemoError: where a column is missing, or the rows are from several machines.
    """
    if missing := [name for name in (*SAME, RATIO, "status", "machine") if name not in baseline]:
        raise VitdemoError(f"against: the baseline has no column {missing[0]!r}; measure it with `vitdemo benchmark`")
    if baseline["machine"].nunique() > 1:
        raise VitdemoError("against: the baseline holds the rows of several machines; give one sweep's file")


def check_overlap(
    baseline: pd.DataFrame, models: list[ModelInfo], pairs: list[Pair], sizes: Sequence[int], replicas: int | None
) -> None:
    """Check that the baseline has at least one of the rows that will be measured.

    Args:
        baseline: see ``check_baseline``.
        models: the infos of the models.
        pairs: the pairs of engine and precision.
        sizes: the batch sizes.
        replicas: the number of replicas that share each batch; None is no replicas.

    Raises:
        VitdemoError: where the baseline has none of them.
    """
    known = [(info.tag, info.weights) for info in models]
    asked = [(*model, *pair, replicas or 1, size) for model, pair, size in product(known, pairs, sizes)]
    if _ratios(baseline).merge(pd.DataFrame(asked, columns=SAME), on=SAME).empty:
        same = "model, weights, engine, precision, batch size and replicas"
        raise VitdemoError(f"against: the baseline has no row of the same {same}")


def check_share(worse_by: float) -> None:
    """Check ``worse_by``, the fraction of speed that may be lost.

    Raises:
        VitdemoError: where it is not between 0 and 1.
    """
    if not 0 < worse_by < 1:
        raise VitdemoError(f"worse_by {worse_by!r}: must be a fraction between 0 and 1")


def passes(compared: pd.DataFrame) -> bool:
    """Whether no ratio became worse and none is missing; a stale baseline passes."""
    return not compared["verdict"].isin([WORSE, GONE]).any()


def _ratios(rows: pd.DataFrame) -> pd.DataFrame:
    reference = (rows["engine"] == EAGER.engine) & (rows["precision"] == EAGER.precision)
    found = rows.loc[(rows["status"] == OK) & ~reference, [*SAME, RATIO]].copy()
    for name in (RATIO, "replicas", "device_batch_size"):
        found[name] = pd.to_numeric(found[name], errors="coerce")
    return found.dropna(subset=SAME).drop_duplicates(SAME, keep="last")
