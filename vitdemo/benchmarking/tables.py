"""A sweep's rows in the layouts of other projects' tables, and as CSV, Markdown or a styled page."""

from collections import defaultdict
from html import escape
from pathlib import Path

import pandas as pd
from pandas.io.formats.style import Styler

from vitdemo.benchmarking.pairs import EAGER
from vitdemo.benchmarking.rows import OK
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.paths import data_path, replacing

SHORT = {"speedup_equal_precision": "over eager, equal precision", "speedup_over_eager_fp32": "over eager fp32"}
RATIOS = ("speedup", *SHORT.values())  # the columns whose rows may be compared, whatever the model and the batch
SHORT |= {"speedup_over_eager_fp32_pairs": "rounds"}
# Columns by which a row finds the eager row to compare with; `file` exists only after merge.
SAME_RUN = ["model", "weights", "replicas", "device_batch_size", "machine", "file"]


def ttmetal_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows in the layout of tt-metal's performance files, in seconds and images/s.

    The CPU columns, which are the model in plain PyTorch there, are eager fp32 at the same batch size.

    Args:
        rows: rows of ``benchmark`` or ``merge``.

    Raises:
        VitdemoError: where no row holds a measurement.
    """
    rows = _measured(rows)
    eager = _eager_beside(rows, EAGER.precision)
    columns = {
        "Model": rows["model"],
        "Setting": rows["engine"] + " " + rows["precision"],
        "Batch": rows["batch"],
        "First Run (sec)": rows["first_run_s"],
        "Second Run (sec)": rows["second_run_s"],
        "Compile Time (sec)": rows["compile_s"],
        "Inference Time (sec)": rows["mean_ms"] / 1e3,
        "Throughput (batch*inf/sec)": rows["images_per_s"],
        "Inference Time CPU (sec)": eager["mean_ms"] / 1e3,
        "Throughput CPU (batch*inf/sec)": eager["images_per_s"],
        "Accuracy": rows["accuracy"],
        "Machine": rows["machine"],
    }
    return pd.DataFrame(columns)


def aitemplate_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows in the layout of AITemplate's and FX2AIT's tables, in ms and images/s: eager (PT) next to the engine.

    Eager is in the engine's precision where it was measured in that; otherwise it is in fp32, and the speedup is
    labelled mixed.

    Args:
        rows: rows of ``benchmark`` or ``merge``.

    Raises:
        VitdemoError: where no row holds a measurement.
    """
    rows = _measured(rows)
    equal = _eager_beside(rows, rows["precision"])["images_per_s"].notna()
    eager = _eager_beside(rows, rows["precision"].where(equal, EAGER.precision))
    columns = {
        "Model": rows["model"],
        "Engine": rows["engine"] + " " + rows["precision"],
        "Batch size": rows["batch"],
        "PT Latency (ms)": eager["mean_ms"],
        "PT QPS (im/s)": eager["images_per_s"],
        "Latency (ms)": rows["mean_ms"],
        "QPS (im/s)": rows["images_per_s"],
        "Speedup": rows["speedup_equal_precision"].where(equal, rows["speedup_over_eager_fp32"]),
        "Precision": equal.map({True: "equal", False: "mixed (PT in fp32)"}),
        "Accuracy": rows["accuracy"],
        "Machine": rows["machine"],
    }
    return pd.DataFrame(columns)[rows["engine"] != EAGER.engine]


LAYOUTS = {"ttmetal": ttmetal_table, "aitemplate": aitemplate_table}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """The columns of a sweep that fit on a screen, with a GPU's energy where it was measured, and reasons for failures.

    Args:
        rows: rows of ``benchmark`` or ``merge``.
    """
    names = ["model", "engine", "precision", "batch", "p50_ms", "p90_ms", "calls", "images_per_s"]
    names += ["speedup_equal_precision", "speedup_over_eager_fp32", "speedup_over_eager_fp32_pairs", "of_roof"]
    measured = rows["status"] == OK
    note = rows["status"].mask(measured, rows["turns"].replace("together", ""))
    names += [name for name in ("joules_per_image",) if name in rows and rows[name].notna().any()]
    return rows[[*names, "top1", "agreement", "relative_l2"]].assign(note=note).rename(columns=SHORT)


def laid_out(rows: pd.DataFrame, layout: str) -> pd.DataFrame:
    """``rows`` in another project's layout.

    Args:
        rows: rows of ``benchmark`` or ``merge``.
        layout: the name of one of LAYOUTS.

    Raises:
        VitdemoError: for an unknown layout, and for rows that lack one of its columns.
    """
    if layout not in LAYOUTS:
        raise VitdemoError(f"layout {layout!r}: there are {', '.join(LAYOUTS)}")
    try:
        return LAYOUTS[layout](rows)
    except KeyError as missing:
        raise VitdemoError(f"layout {layout!r}: these rows have no column {missing}; measure them again") from None


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write ``table`` as CSV, Markdown or a styled page.

    Args:
        table: a table with any columns.
        path: the file, whose suffix gives the format: .csv, .md or .html.

    Raises:
        VitdemoError: for another suffix.
    """
    writers = {".csv": lambda: table.to_csv(index=False), ".md": lambda: markdown(table), ".html": lambda: page(table)}
    if path.suffix not in writers:
        raise VitdemoError(f"{path}: give it one of the suffixes {', '.join(writers)}")
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(writers[path.suffix]())


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown, with numbers of four significant digits."""
    return table.map(_digits).to_markdown(index=False, disable_numparse=True) + "\n"


def styled(table: pd.DataFrame) -> Styler:
    """The table as a pandas Styler: four significant digits, and a bar for each speedup, transparent for dark pages."""
    ratios = [name for name in RATIOS if name in table and table[name].notna().any()]
    style = table.style.format(lambda value: escape(_digits(value)), escape=None).hide(axis="index")
    return style.bar(subset=ratios, color="#4A90C480", vmin=0) if ratios else style


def page(table: pd.DataFrame) -> str:
    """The table as a complete web page."""
    return styled(table).to_html(doctype_html=True)


def _measured(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that hold a measurement. Raises VitdemoError where none does."""
    found = rows[rows["status"] == OK].reset_index(drop=True)
    if found.empty:
        raise VitdemoError("no row of these holds a measurement: all were skipped or failed; see their column status")
    return found


def _eager_beside(rows: pd.DataFrame, precision: pd.Series | str) -> pd.DataFrame:
    """For each row, the row of eager in the given precision in the same run; NaN where there is none."""
    same = [name for name in SAME_RUN if name in rows]
    eager = rows[rows["engine"] == EAGER.engine].drop_duplicates([*same, "precision"])
    return rows[same].assign(precision=precision).merge(eager, on=[*same, "precision"], how="left")


def _digits(value: object) -> str:
    """A number with four significant digits; "" for a missing value."""
    if value is None or value != value:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


TABLE = "published/performance.csv"
TEXT = ["source", "system", "hardware", "model", "precision", "note"]
COUNTS = ["devices", "batch"]
COMPARED = ["source", "hardware", "model", "batch"]  # columns that are equal for all sides of one comparison


def published_performance() -> pd.DataFrame:
    """The published performance of ViTs and a ResNet-18, one row per side of a comparison; NaN for missing values.

    The table is ``data/published/performance.csv``; ``data/README.md`` lists the documents and the changes to them.

    - ``source``, ``system``: the document, and the software. ``baseline``: whether the other rows are compared with
      this one.
    - ``hardware``, ``devices``, ``model``, ``precision``: devices is the number of devices that shared a batch; models
      have timm's names.
    - ``batch``: images in the whole batch, over all devices.
    - ``latency_ms``: of one batch. ``images_per_s``: of inference alone (FlagPerf's p_val_core or p_infer_core).
    - ``images_per_s_whole``: of the whole loop, with loading and scoring (FlagPerf's p_val_whole or p_infer_whole).
    - ``first_run_s``, ``second_run_s``, ``compile_s``, ``e2e_s``: seconds; e2e is the whole job, including validation.
    - ``speedup``: over the baseline, where the document prints it.
    - ``mfu_percent``: of the device's peak, with a multiply-accumulate counted as one operation, which gives half of
      the usual number.
    - ``top1_percent``: on ILSVRC2012 val. ``memory_gib``, ``memory_total_gib``: the device's used and total memory.
    """
    # Every column that is neither text nor a count holds numbers.
    dtypes = defaultdict(lambda: "float64", dict.fromkeys(TEXT, "str") | dict.fromkeys(COUNTS, "Int64"))
    table = pd.read_csv(data_path(TABLE), dtype=dtypes)
    return table.assign(baseline=table["baseline"].notna(), **table[TEXT].fillna(""))
