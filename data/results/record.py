"""The recorded tables and their figure: ``python -m data.results.record``, from what was recorded here or is now.

The README has six rows of one model, docs/numbers.md all rows at a batch size of 8. With ``--measure NAME`` it first
measures, half an hour or so, into ``data/results/NAME``.
"""

import argparse
import re
import sys
from pathlib import Path

import matplotlib
import pandas as pd

from vitdemo.benchmarking.files import merge
from vitdemo.benchmarking.pairs import EAGER
from vitdemo.benchmarking.sweeps import benchmark
from vitdemo.benchmarking.tables import markdown
from vitdemo.errors import VitdemoError
from vitdemo.paths import REPOSITORY, data_path, replacing
from vitdemo.plots.benchmarking import plot_latency_throughput

README, NUMBERS = REPOSITORY / "README.md", REPOSITORY / "docs" / "numbers.md"
FIGURE = REPOSITORY / "notebooks" / "img" / "benchmark.png"
BEGIN, END = "<!-- the recorded benchmark: {} -->\n", "<!-- its end -->\n"  # with the folder below data/results
SHOWN_BATCH = 8
README_MODEL = "vit_shapes20"  # its accuracy is known
README_ENGINES = ("eager fp32", "onnx fp32", "openvino fp32", "eager bf16", "openvino bf16", "openvino int8")


def measure(folder: Path) -> None:
    """Sweep the bundled model with its accuracy, and a ViT-B/16 with random weights, in every engine."""
    benchmark("vit_shapes20", device_batch_sizes=[1, 2, 4, 8, 16, 32, 64], out=folder)
    benchmark("vit_base_patch16_224", weights="random", device_batch_sizes=[1, 2, 4, 8, 16], out=folder)


def shown() -> str:
    """The folder below data/results that the README shows."""
    found = re.search(BEGIN.format(r"([\w.-]+)"), README.read_text(encoding="utf-8"))
    if not found:
        raise VitdemoError(
            f"{README}: has no place for the table; put {BEGIN.format('NAME').strip()} and {END.strip()} into it"
        )
    return found[1]


def recorded(name: str) -> pd.DataFrame:
    """The rows that were recorded on a machine, of each model the last sweep's."""
    rows = merge([data_path(f"results/{name}")])
    time = rows["file"].str.extract(r"_([\d-]+_\d+_\d+)\.csv$", expand=False)  # the names end in it
    return rows[time == time.groupby(rows["model"]).transform("max")].reset_index(drop=True)


def full_table(rows: pd.DataFrame) -> str:
    """The table of docs/numbers.md, in Markdown, with the machine and the commit below it."""
    rows = rows[rows["device_batch_size"] == SHOWN_BATCH].sort_values("model", ascending=False, kind="stable")
    shown = {
        "model": rows["model"],
        "engine": _engine(rows),
        "batch": rows["batch"],
        "latency p50, ms": rows["p50_ms"],
        "images/s": rows["images_per_s"],
        "over eager, equal precision (95 %)": _with_interval(rows, "speedup_equal_precision"),
        "over eager fp32": rows["speedup_over_eager_fp32"].map("{:.2f}".format, na_action="ignore"),
        "of the roof": rows["of_roof"].map("{:.0%}".format, na_action="ignore"),
        "top-1": _top1(rows),
    }
    return _table(rows, shown)


def readme_table(rows: pd.DataFrame) -> str:
    """The table of the README: README_ENGINES, their speed over eager's in the same precision, and their accuracy."""
    rows = rows[(rows["device_batch_size"] == SHOWN_BATCH) & (rows["model"] == README_MODEL)]
    rows = rows.assign(engine_precision=_engine(rows)).set_index("engine_precision", drop=False).loc[[*README_ENGINES]]
    shown = {
        "engine": rows["engine_precision"],
        "images/s": rows["images_per_s"],
        "over eager in the same precision (95 %)": _with_interval(rows, "speedup_equal_precision").fillna(
            "eager has none"
        ),
        "top-1": _top1(rows),
    }
    return _table(rows, shown)


def _table(rows: pd.DataFrame, shown: dict[str, pd.Series]) -> str:
    where = "; ".join(dict.fromkeys(rows["machine"] + ", commit " + rows["commit"]))
    return f"{markdown(pd.DataFrame(shown))}\n{where}.\n"


def _engine(rows: pd.DataFrame) -> pd.Series:
    return rows["engine"] + " " + rows["precision"]


def _top1(rows: pd.DataFrame) -> pd.Series:
    return rows["top1"].map("{:.1%}".format, na_action="ignore").fillna("not measured")


def _with_interval(rows: pd.DataFrame, name: str) -> pd.Series:
    """``1.06 (0.94 to 1.14)``; the ratio alone where there were too few rounds, or where it is eager's over itself."""
    text = rows[name].map("{:.2f}".format, na_action="ignore")
    known = rows[f"{name}_low"].notna() & (rows["engine"] != EAGER.engine)
    low, high = (rows[f"{name}_{end}"].map("{:.2f}".format, na_action="ignore") for end in ("low", "high"))
    return text.where(~known, text + " (" + low + " to " + high + ")")


def write_tables(name: str) -> None:
    """Put a machine's tables between the two marks of the README and of docs/numbers.md, and draw the figure anew."""
    matplotlib.use("agg")
    rows, before = recorded(name), BEGIN.format(shown())
    for path, table in ((README, readme_table), (NUMBERS, full_table)):
        head, _, rest = path.read_text(encoding="utf-8").partition(before)
        with replacing(path) as file:
            file.write(head + BEGIN.format(name) + table(rows) + END + rest.partition(END)[2])
    with replacing(FIGURE, "wb") as file:
        plot_latency_throughput(rows).savefig(file, format="png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", metavar="NAME", help="a folder below data/results, named by the machine")
    arguments = parser.parse_args()
    try:
        if arguments.measure is not None:
            if not re.fullmatch(r"[\w.-]+", arguments.measure):
                raise VitdemoError(f"--measure {arguments.measure}: give a plain name, such as {shown()}")
            measure(data_path("results") / arguments.measure)
        write_tables(arguments.measure or shown())
    except VitdemoError as error:
        sys.exit(f"vitdemo: {error}")
