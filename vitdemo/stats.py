"""Statistics: evenly spread indices, percentiles, confidence intervals, and McNemar's test."""

from collections.abc import Iterable, Sequence

import numpy as np


def spread(length: int, count: int) -> list[int]:
    """Evenly spread indices.

    Args:
        length: the length of the sequence that they index.
        count: how many indices; all of them where the sequence is shorter.
    """
    return [i * length // count for i in range(count)] if count < length else list(range(length))


def percentiles_ms(seconds: Iterable[float]) -> dict[str, float]:
    """p50, p90, p99 and mean in milliseconds, and the number of durations; ``{"count": 0}`` for no durations.

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
    """The median, and the two of ``values`` that are the bounds of its 95 % interval.

    The bounds are order statistics chosen by the binomial distribution, so the values may have any distribution. Both
    bounds are NaN for fewer than six values, because even their whole range contains the true median less often.

    Args:
        values: independent measurements of one quantity.
    """
    from scipy.stats import binom  # imported here: the import takes longer than most callers of this file run

    ordered = np.sort(np.asarray(list(values), dtype=np.float64))
    outside = int(binom.ppf(0.025, len(ordered), 0.5))
    bounds = (ordered[outside - 1], ordered[-outside]) if outside else (np.nan, np.nan)
    return float(np.median(ordered)), *map(float, bounds)


def wilson_interval(correct: int, images: int) -> list[float]:
    """The 95 % Wilson score interval of ``correct / images``, as [low, high] fractions.

    Args:
        correct: the number of correctly classified images.
        images: the number of all images.
    """
    from scipy.stats import binomtest

    interval = binomtest(correct, images).proportion_ci(0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


def mcnemar_p(better: int, worse: int, alternative: str = "two-sided") -> float:
    """The p-value of McNemar's exact test: how often two equally good classifiers give counts at least this uneven.

    Args:
        better: the number of images that only the first classifier got right.
        worse: the number of images that only the second classifier got right.
        alternative: "two-sided", or "greater" to test only whether the first classifier is better.
    """
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse, alternative=alternative).pvalue) if better + worse else 1.0


def paid_once(seconds: Sequence[float]) -> float:
    """The share of the total time that the first call took beyond the median of the others, 0 for fewer than two calls.

    It is near 0 where the first call took as long as the others, and near 1 where nearly all the time was warm-up.

    Args:
        seconds: the seconds of each call, in the order of the calls.
    """
    if len(seconds) < 2:
        return 0.0
    return max(0.0, seconds[0] - float(np.median(seconds[1:]))) / sum(seconds)


def unaccounted_s(wall_s: float, parts_s: Iterable[float]) -> float:
    """The seconds of a loop that the timings of its parts do not cover.

    Args:
        wall_s: the seconds of the whole loop.
        parts_s: the seconds of its parts, which run one after the other.
    """
    return max(0.0, wall_s - sum(parts_s))
