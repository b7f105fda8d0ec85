"""Measured rows and published ones as one table, in the same units."""

import pandas as pd

from vitdemo.benchmarking.others import COMPARED, published_performance
from vitdemo.benchmarking.pairs import EAGER
from vitdemo.benchmarking.rows import OK

MEASURED, PUBLISHED = "measured", "published"
COLUMNS = ["origin", "hardware", "system", "model", "precision", "batch", "latency_ms", "images_per_s", "speedup"]
COLUMNS += ["accuracy"]


def measured_and_published(rows: pd.DataFrame, published: pd.DataFrame | None = None) -> pd.DataFrame:
    """Rows that were measured here beside those that others have published.

    Rates of different hardware cannot be compared; speedups at equal precision sooner can. Rows without a measurement
    are left out.

    Args:
        rows: as ``benchmark`` or ``merge`` gives them.
        published: as ``published_performance()`` gives them, which is the default.

    Returns:
        One row per measurement or publication.

        - ``origin``: measured, or published. ``hardware``: on what, the processor and its cores. ``system``: by what.
        - ``model``, ``precision``, ``batch``: the architecture; images in the whole batch.
        - ``latency_ms``: a batch's, the median where measured. ``images_per_s``: all images over all seconds.
        - ``speedup``: over eager PyTorch at equal precision, same hardware, model and batch; NaN where there is none.
        - ``accuracy``: as it was given, or that it was not measured or not published.
    """
    published = published_performance() if published is None else published
    tables = [_measured(rows[rows["status"] == OK]), _published(published[published["images_per_s"].notna()])]
    return pd.concat([table for table in tables if len(table)], ignore_index=True)


def architecture_of(rows: pd.DataFrame) -> pd.Series:
    """Each row's model without the tag of its weights."""
    return rows["model"].str.split(".").str[0]


def _measured(rows: pd.DataFrame) -> pd.DataFrame:
    said = rows["accuracy"].str.replace("not measured.*", "not measured", regex=True)
    return rows.rename(columns={"engine": "system", "p50_ms": "latency_ms"}).assign(
        origin=MEASURED,
        hardware=rows["machine"].str.split(", ").str[:2].str.join(", "),
        model=architecture_of(rows),
        speedup=rows["speedup_equal_precision"].where(rows["engine"] != EAGER.engine, 1.0),
        accuracy=said,
    )[COLUMNS]


def _published(rows: pd.DataFrame) -> pd.DataFrame:
    base = rows[rows["baseline"]].drop_duplicates(COMPARED).set_index(COMPARED)
    own = pd.MultiIndex.from_frame(rows[COMPARED])
    of_base = base[["images_per_s", "precision"]].reindex(own).set_axis(rows.index)
    equal = of_base["precision"] == rows["precision"]
    return rows.assign(
        origin=PUBLISHED,
        speedup=(rows["images_per_s"] / of_base["images_per_s"]).where(equal),
        accuracy=rows["top1_percent"].map("{:.1f} % top-1".format).where(rows["top1_percent"].notna(), "not published"),
    )[COLUMNS]
