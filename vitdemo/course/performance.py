"""Measured rows and published ones as one table, in the same units."""

import pandas as pd

from vitdemo.benchmarking.others import COMPARED, published_performance
from vitdemo.benchmarking.pairs import EAGER
from vitdemo.benchmarking.rows import OK

MEASURED, PUBLISHED = "measured", "published"


def measured_and_published(rows: pd.DataFrame, published: pd.DataFrame | None = None) -> pd.DataFrame:
    """What ``benchmark`` or ``merge`` gave beside what others have published (default: ``published_performance()``).

    - ``origin``: measured, or published. ``hardware``: on what, the processor and its cores. ``system``: by what.
    - ``model``, ``precision``, ``batch``: the architecture; images in the whole batch.
    - ``latency_ms``: a batch's, the median where measured. ``images_per_s``: all images over all seconds.
    - ``speedup``: over eager PyTorch at equal precision, same hardware, model and batch; NaN where there is none.
    - ``accuracy``: as it was given, or that it was not measured or not published.

    Rates of different hardware cannot be compared; speedups at equal precision sooner can. Rows without a measurement
    are left out.
    """
    published = published_performance() if published is None else published
    tables = [_measured(rows[rows["status"] == OK]), _published(published[published["images_per_s"].notna()])]
    return pd.concat([table for table in tables if len(table)], ignore_index=True)


def architecture_of(rows: pd.DataFrame) -> pd.Series:
    """Each row's model without the tag of its weights."""
    return rows["model"].str.split(".").str[0]


def _measured(rows: pd.DataFrame) -> pd.DataFrame:
    equal = rows["speedup_equal_precision"].where(rows["engine"] != EAGER.engine, 1.0)
    return pd.DataFrame(
        {
            "origin": MEASURED,
            "hardware": rows["machine"].str.split(", ").str[:2].str.join(", "),
            "system": rows["engine"],
            "model": architecture_of(rows),
            "precision": rows["precision"],
            "batch": rows["batch"],
            "latency_ms": rows["p50_ms"],
            "images_per_s": rows["images_per_s"],
            "speedup": equal,
            "accuracy": rows["accuracy"].str.replace("not measured.*", "not measured", regex=True),
        }
    )


def _published(rows: pd.DataFrame) -> pd.DataFrame:
    base = rows[rows["baseline"]].drop_duplicates(COMPARED).set_index(COMPARED)
    own = pd.MultiIndex.from_frame(rows[COMPARED])
    of_base = base[["images_per_s", "precision"]].reindex(own).set_axis(rows.index)
    equal = of_base["precision"] == rows["precision"]
    percent = rows["top1_percent"].map(lambda share: "not published" if pd.isna(share) else f"{share:.1f} % top-1")
    return pd.DataFrame(
        {
            "origin": PUBLISHED,
            "hardware": rows["hardware"],
            "system": rows["system"],
            "model": rows["model"],
            "precision": rows["precision"],
            "batch": rows["batch"],
            "latency_ms": rows["latency_ms"],
            "images_per_s": rows["images_per_s"],
            "speedup": (rows["images_per_s"] / of_base["images_per_s"]).where(equal),
            "accuracy": percent,
        }
    )
