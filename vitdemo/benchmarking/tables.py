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
# Columns by which a row finds the eager row to compare with; `file` is there after merge only.
SAME_RUN = ["model", "weights", "replicas", "device_batch_size", "machine", "file"]


def ttmetal_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows as tt-metal's performance files have them, in seconds and images/s.

    The CPU columns, the model in plain PyTorch there, are eager fp32 at the same batch.

    Args:
        rows: of ``benchmark`` or ``merge``.

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
    """The rows as AITemplate's and FX2AIT's tables have them, in ms and images/s: eager (PT) beside the engine.

    Eager is in the engine's precision where it has that, else in fp32: then the speedup is a mixed one, and says so.

    Args:
        rows: of ``benchmark`` or ``merge``.

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
    """The columns of a sweep that fit on a screen; of what was skipped or failed, why.

    Args:
        rows: of ``benchmark`` or ``merge``.
    """
    names = ["model", "engine", "precision", "batch", "p50_ms", "p90_ms", "calls", "images_per_s"]
    names += ["speedup_equal_precision", "speedup_over_eager_fp32", "speedup_over_eager_fp32_pairs", "of_roof"]
    measured = rows["status"] == OK
    note = rows["status"].mask(measured, rows["turns"].replace("together", ""))
    return rows[[*names, "top1", "agreement", "relative_l2"]].assign(note=note).rename(columns=SHORT)


def laid_out(rows: pd.DataFrame, layout: str) -> pd.DataFrame:
    """``rows`` in another project's layout.

    Args:
        rows: of ``benchmark`` or ``merge``.
        layout: one of LAYOUTS, by its name.

    Raises:
        VitdemoError: for a layout that there is not, and for rows that lack a column of it.
    """
    if layout not in LAYOUTS:
        raise VitdemoError(f"layout {layout!r}: there are {', '.join(LAYOUTS)}")
    try:
        return LAYOUTS[layout](rows)
    except KeyError as missing:
        raise VitdemoError(f"layout {layout!r}: these rows have no column {missing}; measure them anew") from None


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write ``table`` as CSV, Markdown or a styled page.

    Args:
        table: of any columns.
        path: its ending says as what: .csv, .md or .html.

    Raises:
        VitdemoError: for another ending.
    """
    writers = {".csv": lambda: table.to_csv(index=False), ".md": lambda: markdown(table), ".html": lambda: page(table)}
    if path.suffix not in writers:
        raise VitdemoError(f"{path}: give it an ending, one of {', '.join(writers)}")
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(writers[path.suffix]())


def markdown(table: pd.DataFrame) -> str:
    """As a table of Markdown, numbers with four significant digits."""
    return table.map(_digits).to_markdown(index=False, disable_numparse=True) + "\n"


def styled(table: pd.DataFrame) -> Styler:
    """As a pandas Styler: four significant digits, a bar behind each speedup, half transparent for dark pages."""
    ratios = [name for name in RATIOS if name in table and table[name].notna().any()]
    style = table.style.format(lambda value: escape(_digits(value)), escape=None).hide(axis="index")
    return style.bar(subset=ratios, color="#4A90C480", vmin=0) if ratios else style


def page(table: pd.DataFrame) -> str:
    """As a web page of its own."""
    return styled(table).to_html(doctype_html=True)


def _measured(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that hold a measurement. Raises VitdemoError where none does."""
    found = rows[rows["status"] == OK].reset_index(drop=True)
    if found.empty:
        raise VitdemoError("no row of these holds a measurement: all were skipped or failed; see their column status")
    return found


def _eager_beside(rows: pd.DataFrame, precision: pd.Series | str) -> pd.DataFrame:
    """For each row that of eager in the given precision, of the same run; NaN where there is none."""
    same = [name for name in SAME_RUN if name in rows]
    eager = rows[rows["engine"] == EAGER.engine].drop_duplicates([*same, "precision"])
    return rows[same].assign(precision=precision).merge(eager, on=[*same, "precision"], how="left")


def _digits(value: object) -> str:
    """Four significant digits of a number, nothing for none."""
    if value is None or value != value:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


TABLE = "published/performance.csv"
TEXT = ["source", "system", "hardware", "model", "precision", "note"]
COUNTS = ["devices", "batch"]
COMPARED = ["source", "hardware", "model", "batch"]  # the sides of one comparison have these in common


def published_performance() -> pd.DataFrame:
    """The published performance of ViTs and a ResNet-18, one row per side of a comparison; NaN: nothing is printed.

    From ``data/published/performance.csv``; ``data/README.md`` names the documents and says what was changed.

    - ``source``, ``system``: the document; what computed. ``baseline``: whether the others are held against this row.
    - ``hardware``, ``devices``, ``model``, ``precision``: how many devices shared a batch; models by timm's names.
    - ``batch``: images in the whole batch, over all devices.
    - ``latency_ms``, ``images_per_s``: of one batch; of inference alone (FlagPerf's p_val_core or p_infer_core).
    - ``images_per_s_whole``: of the whole loop, with loading and scoring (FlagPerf's p_val_whole or p_infer_whole).
    - ``first_run_s``, ``second_run_s``, ``compile_s``, ``e2e_s``: seconds; e2e is the whole job, validation included.
    - ``speedup``: over the baseline, where the document prints it.
    - ``mfu_percent``: of the device's peak, a multiply-accumulate counted as one operation: half of the usual number.
    - ``top1_percent``: on ILSVRC2012 val. ``memory_gib``, ``memory_total_gib``: the device's, used and there.
    """
    # A number is whatever is neither text nor a count.
    dtypes = defaultdict(lambda: "float64", dict.fromkeys(TEXT, "str") | dict.fromkeys(COUNTS, "Int64"))
    table = pd.read_csv(data_path(TABLE), dtype=dtypes)
    return table.assign(baseline=table["baseline"].notna(), **table[TEXT].fillna(""))
