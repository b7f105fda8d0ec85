"""Whether a published table adds up: what it says of itself, recomputed within its printed digits."""

from dataclasses import dataclass
from decimal import Decimal

import pandas as pd

from vitdemo import data_path
from vitdemo.benchmarking.tables import COMPARED, TABLE


@dataclass(frozen=True)
class _Bounded:
    """Positive numbers, and how low and how high they can be for all that their printed digits say."""

    value: pd.Series
    low: pd.Series
    high: pd.Series

    def __sub__(self, other: "_Bounded") -> "_Bounded":
        return _Bounded(self.value - other.value, self.low - other.high, self.high - other.low)

    def __truediv__(self, other: "_Bounded") -> "_Bounded":
        return _Bounded(self.value / other.value, self.low / other.high, self.high / other.low)


def arithmetic_errors(table: pd.DataFrame) -> pd.DataFrame:
    """What a published table says of itself that cannot be so: a row for each number, indexed as in ``table``.

    table: ``published_performance()`` or rows of it, by their index there: it leads to the digits that were printed.

    A printed number may be off by half a unit in its last place, and so may those that it is computed from. Checked:

    - ``images_per_s``: batch / ``latency_ms`` x 1,000
    - ``compile_s``: ``first_run_s`` - ``second_run_s``
    - ``speedup``: the baseline's latency over this one, and this rate over the baseline's: two checks

    ``what``, ``printed``: such a column and its number. ``recomputed``: from the others. ``off``: recomputed / printed
    - 1, a fraction.
    """
    latency, rate = _printed(table, "latency_ms"), _printed(table, "images_per_s")
    thousand_images = table["batch"].astype("float64") * 1e3
    checks = [
        ("images_per_s", _Bounded(thousand_images, thousand_images, thousand_images) / latency),
        ("compile_s", _printed(table, "first_run_s") - _printed(table, "second_run_s")),
        ("speedup", _of_baseline(table, latency) / latency),
        ("speedup", rate / _of_baseline(table, rate)),
    ]
    return pd.concat([_off(table, what, recomputed) for what, recomputed in checks]).sort_index(kind="stable")


def _printed(table: pd.DataFrame, name: str) -> _Bounded:
    texts = pd.read_csv(data_path(TABLE), usecols=[name], dtype="str")[name].loc[table.index]
    half = texts.map(lambda text: 0.5 * 10.0 ** Decimal(text).as_tuple().exponent, na_action="ignore").astype("float64")
    return _Bounded(table[name], table[name] - half, table[name] + half)


def _of_baseline(table: pd.DataFrame, numbers: _Bounded) -> _Bounded:
    keys = [table[name] for name in COMPARED]

    def of_baseline(series: pd.Series) -> pd.Series:
        return series.where(table["baseline"]).groupby(keys).transform("first")

    return _Bounded(of_baseline(numbers.value), of_baseline(numbers.low), of_baseline(numbers.high))


def _off(table: pd.DataFrame, what: str, recomputed: _Bounded) -> pd.DataFrame:
    printed = _printed(table, what)
    # Where something is not printed, the bounds are NaN, and neither comparison holds.
    rows = (recomputed.high < printed.low) | (recomputed.low > printed.high)
    return table.loc[rows, ["source", "system", "hardware", "model", "batch"]].assign(
        what=what,
        printed=printed.value[rows],
        recomputed=recomputed.value[rows],
        off=recomputed.value[rows] / printed.value[rows] - 1,
    )
