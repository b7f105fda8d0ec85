"""Samples, and what measured numbers say: percentiles, intervals, and McNemar's test."""

from collections.abc import Iterable, Sequence

import numpy as np


def spread(length: int, count: int) -> list[int]:
    """Evenly spread indices.

    Args:
        length: of what they are indices.
        count: how many; all where there are fewer.
    """
    return [i * length // count for i in range(count)] if count < length else list(range(length))


def percentiles_ms(seconds: Iterable[float]) -> dict[str, float]:
    """p50, p90, p99 and mean in milliseconds, and the count they rest on; ``{"count": 0}`` for no durations.

    Args:
        seconds: durations in seconds.
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

    Args:
        values: independent measurements of one quantity.
    """
    from scipy.stats import binom  # here, as it takes longer to import than what most callers of this file do

    ordered = np.sort(np.asarray(list(values), dtype=np.float64))
    outside = int(binom.ppf(0.025, len(ordered), 0.5))
    bounds = (ordered[outside - 1], ordered[-outside]) if outside else (np.nan, np.nan)
    return float(np.median(ordered)), *map(float, bounds)


def wilson_interval(correct: int, images: int) -> list[float]:
    """The 95 % Wilson score interval of ``correct / images``, as [low, high] fractions.

    Args:
        correct: images that were right.
        images: all of them.
    """
    from scipy.stats import binomtest

    interval = binomtest(correct, images).proportion_ci(0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


def mcnemar_p(better: int, worse: int, alternative: str = "two-sided") -> float:
    """The p of McNemar's exact test: how often two sides that are equally good come to counts as uneven as these.

    Args:
        better: images that only the one side got right.
        worse: images that only the other got right.
        alternative: "two-sided", or "greater" where only a better one side counts.
    """
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse, alternative=alternative).pvalue) if better + worse else 1.0


def paid_once(seconds: Sequence[float]) -> float:
    """The share of all the time that the first call took beyond the median of the others, 0 for fewer than two calls.

    Near 0 where the first call was like the others, near 1 where nearly all the time was spent on getting ready.

    Args:
        seconds: of each call, in the order of the calls.
    """
    if len(seconds) < 2:
        return 0.0
    return max(0.0, seconds[0] - float(np.median(seconds[1:]))) / sum(seconds)


def unaccounted_s(wall_s: float, parts_s: Iterable[float]) -> float:
    """What a loop whose parts are timed one by one spent where nobody looked, in seconds.

    Args:
        wall_s: seconds of the whole loop.
        parts_s: seconds of its parts, which follow one another.
    """
    return max(0.0, wall_s - sum(parts_s))
