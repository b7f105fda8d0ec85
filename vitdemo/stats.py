"""Percentiles and intervals of measured numbers."""

from collections.abc import Iterable

import numpy as np


def percentiles_ms(seconds: Iterable[float]) -> dict[str, float]:
    """p50, p90, p99 and mean in milliseconds, and the count they rest on.

    ``seconds``: durations in seconds. Empty input gives ``{"count": 0}``.
    """
    values = np.asarray(list(seconds), dtype=np.float64) * 1e3
    if not len(values):
        return {"count": 0}
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    rounded = {name: round(float(v), 3) for name, v in dict(p50=p50, p90=p90, p99=p99, mean=values.mean()).items()}
    return {"count": len(values), **rounded}


def median_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """The median, and the two of ``values`` that hold the true median between them with 95 %.

    Order statistics by the binomial distribution, which assumes no shape. NaN for both where there are fewer than six
    values, whose whole range holds it less often than that.
    """
    from scipy.stats import binom  # here, as it takes longer to import than what most callers of this file do

    ordered = np.sort(np.asarray(list(values), dtype=np.float64))
    outside = int(binom.ppf(0.025, len(ordered), 0.5))
    bounds = (ordered[outside - 1], ordered[-outside]) if outside else (np.nan, np.nan)
    return float(np.median(ordered)), *map(float, bounds)
