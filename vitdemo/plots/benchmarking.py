"""Figures of sweeps. Rows of several machines are never mixed: each machine has a panel of its own."""

from collections.abc import Callable, Iterator
from math import ceil
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from vitdemo.benchmarking.pairs import EAGER
from vitdemo.benchmarking.rows import OK
from vitdemo.errors import VitdemoError
from vitdemo.plots.dataset import GREY, LINE, new_figure
from vitdemo.plots.verification import DASHES, engine_look
from vitdemo.precisions import BYTES
from vitdemo.stats import wilson_interval

PUBLISHED = "x+*1"  # the markers of what others have published, all in grey


def plot_latency_throughput(rows: pd.DataFrame) -> Figure:
    """Images/s over the median latency of a batch, one line per engine and precision, one point per batch size.

    Args:
        rows: of ``benchmark`` or ``merge``.

    Raises:
        VitdemoError: where no row was measured.
    """
    figure, panels = _panels(rows, "images/s over latency")
    for ax, own in panels:
        for pair, line in _lines(own):
            ax.plot(line["p50_ms"], line["images_per_s"], **engine_look(*pair))
            for point in line.iloc[[0, -1] if len(line) > 1 else [0]].itertuples():
                ax.annotate(point.batch, (point.p50_ms, point.images_per_s), (3, 3), textcoords="offset points")
        ax.set(xscale="log", yscale="log", xlabel="median latency of a batch, ms", ylabel="images/s")
        _plain_numbers(ax.xaxis, ax.yaxis)
    return _with_legend(figure, panels)


def plot_speedups(rows: pd.DataFrame, published: pd.DataFrame | None = None) -> Figure:
    """Speedup over eager by batch: on the left at equal precision, with published ones; on the right mixed.

    Args:
        rows: of ``benchmark`` or ``merge``.
        published: rows of ``published_performance`` of the model; their baselines and engines have equal precision.

    Raises:
        VitdemoError: where no row was measured.
    """
    figure, panels = _panels(rows, "speedup over eager", titles=("equal precision", "mixed: over eager fp32"))
    for (equal, own), (mixed, _) in zip(panels[::2], panels[1::2], strict=True):
        _with_intervals(equal, own[own["engine"] != EAGER.engine], "speedup_equal_precision")
        _with_intervals(mixed, own[own["precision"] != EAGER.precision], "speedup_over_eager_fp32")
        for (name, line), marker in zip(_published_speedups(published), PUBLISHED, strict=False):
            equal.plot(line.index, line, color=GREY, marker=marker, linewidth=1, label=f"published: {name}")
        for ax in (equal, mixed):
            ax.axhline(1, color=GREY, linewidth=0.8)
            _batch_axis(ax)
            ax.set(ylabel="times eager's images/s", ylim=(0, None))
    return _with_legend(figure, panels)


def plot_roofline(rows: pd.DataFrame, bytes_per_s: float) -> Figure:
    """The rate reached over the operations that a byte allows, below the roofs: the products' and the memory's.

    A batch reads at least the weights once, and its pixels: a layer's intermediate results, which may stay in a cache,
    are not counted, so a point may lie too far right.

    Args:
        rows: of ``benchmark`` or ``merge``.
        bytes_per_s: what the memory gives (``memory_bandwidth``).

    Raises:
        VitdemoError: where no row was measured together with a roof.
    """
    figure, panels = _panels(rows, "roofline", needed="roof_tflops")
    for ax, own in panels:
        x = np.geomspace(0.5, 4 * _intensity(own).max(), 50)
        for precision, roof in own.groupby("precision")["roof_tflops"].median().items():
            ceiling = np.minimum(x * bytes_per_s / 1e12, roof)
            ax.plot(x, ceiling, color=GREY, linestyle=DASHES.get(precision, "-."), linewidth=1)
            ax.annotate(f"roof {precision}", (x[-1], roof), (-2, 3), textcoords="offset points", ha="right")
        for pair, line in _lines(own):
            ax.plot(_intensity(line), line["tflops"], **engine_look(*pair) | {"linestyle": ""})
        ax.set(xscale="log", yscale="log", xlabel="FLOPs per byte of weights and pixels", ylabel="TFLOP/s")
        _plain_numbers(ax.xaxis, ax.yaxis)
    return _with_legend(figure, panels)


def plot_accuracy_speed(rows: pd.DataFrame) -> Figure:
    """Top-1, with its 95 % Wilson interval, over the best images/s of each engine and precision: a point each.

    Args:
        rows: of ``benchmark`` or ``merge``.

    Raises:
        VitdemoError: where no row has an accuracy.
    """
    figure, panels = _panels(rows, "accuracy and speed", needed="top1")
    for ax, own in panels:
        best = own.loc[own.groupby(["engine", "precision"])["images_per_s"].idxmax()]
        for point in best.itertuples():
            low, high = wilson_interval(round(point.top1 * point.images), int(point.images))
            look = engine_look(point.engine, point.precision) | {"linestyle": ""}
            error = [[100 * (point.top1 - low)], [100 * (high - point.top1)]]
            ax.errorbar(point.images_per_s, 100 * point.top1, yerr=error, elinewidth=0.8, **look)
        ax.set(xlabel="images/s at its best batch", ylabel=f"top-1 in % of {int(own['images'].max())} images")
        ax.set_xlim(left=0)
    return _with_legend(figure, panels)


def plot_prediction(rows: pd.DataFrame, predicted_ms: Callable[[pd.Series], float]) -> Figure:
    """Measured latencies by batch, and over them predicted ones, as crosses.

    Args:
        rows: of ``benchmark`` or ``merge``.
        predicted_ms: the prediction for a row.

    Raises:
        VitdemoError: where no row was measured.
    """
    figure, panels = _panels(rows, "predicted (x) and measured latency")
    for ax, own in panels:
        for pair, line in _lines(own):
            look = engine_look(*pair)
            ax.plot(line["batch"], line["p50_ms"], **look)
            thin = look | {"marker": "x", "markersize": 9, "linewidth": 0.7, "label": None}
            ax.plot(line["batch"], line.apply(predicted_ms, axis=1), **thin)
        _batch_axis(ax)
        ax.set(yscale="log", ylabel="latency of a batch, ms")
        _plain_numbers(ax.yaxis)
    return _with_legend(figure, panels)


def _panels(rows: pd.DataFrame, title: str, needed: str = "images_per_s", titles=("",)):
    """A figure, and its axes with the rows of each: a line of panels a sweep, so a machine and a model."""
    good = rows[(rows["status"] == OK) & rows[needed].notna()]
    if good.empty:
        raise VitdemoError(f"{title}: no row has {needed}; measure some first")
    for name, default in {"weights": "not recorded", "replicas": 1}.items():  # columns that others' files may lack
        good = good.assign(**{name: good[name].fillna(default) if name in good else default})
    apart = [name for name in ("machine", "model", "weights", "replicas", "file") if name in good]
    groups = [(own.iloc[0], own) for _, own in good.groupby(apart, sort=False)]
    figure, axes = new_figure(3.8 * len(groups), len(groups), len(titles), squeeze=False)
    panels = []
    for line, (first, own) in zip(axes, groups, strict=True):
        shared = f", {first['replicas']} replicas" if first["replicas"] > 1 else ""
        what = f"{first['model']}, weights: {first['weights']}{shared}: {title}"
        text = "\n".join(fill(each, LINE) for each in (what, first["machine"]))
        line[0].set_title(text, loc="left", fontsize=10)
        for ax, name in zip(line, titles, strict=True):
            panels.append((ax, own))
            if not name:
                ax.grid(alpha=0.3)
            else:
                ax.text(0.98, 0.98, name, transform=ax.transAxes, ha="right", va="top")
    return figure, panels


def _lines(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, str], pd.DataFrame]]:
    for pair, line in rows.groupby(["engine", "precision"], sort=False):
        yield pair, line.sort_values("batch")


def _with_intervals(ax: Axes, rows: pd.DataFrame, name: str) -> None:
    for pair, line in _lines(rows[rows[name].notna()]):
        look = engine_look(*pair)
        ax.plot(line["batch"], line[name], **look)
        ax.vlines(line["batch"], line[f"{name}_low"], line[f"{name}_high"], color=look["color"], linewidth=0.8)


def _published_speedups(published: pd.DataFrame | None) -> Iterator[tuple[str, pd.Series]]:
    """By system, hardware and precision, the engine's rate over its baseline's, joined on the batch."""
    if published is None:
        return
    for (_, hardware, precision), table in published.groupby(["source", "hardware", "precision"], sort=False):
        base, engine = table[table["baseline"]], table[~table["baseline"]]
        ratio = (engine.set_index("batch")["images_per_s"] / base.set_index("batch")["images_per_s"]).dropna()
        if len(ratio):
            over = "" if "eager" in base["system"].iloc[0] else f" over {base['system'].iloc[0]}"
            one = engine.iloc[0]
            yield f"{one['system']} {precision} of {one['model']}{over}, {hardware}", ratio


def _intensity(rows: pd.DataFrame) -> pd.Series:
    """FLOPs per byte: of the weights in the row's precision, read once per batch, and of its pixels."""
    moved = rows["parameters"] * rows["precision"].map(BYTES) + rows["batch"] * rows["input_bytes"]
    return rows["batch"] * rows["flops_per_image"] / moved


def _batch_axis(ax: Axes) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.set_xlabel("images per batch")


def _plain_numbers(*axes: Axis) -> None:
    """200, and not 2 x 10^2."""
    for axis in axes:
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def _with_legend(figure: Figure, panels: list[tuple[Axes, pd.DataFrame]]) -> Figure:
    handles = {label: handle for ax, _ in panels for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    columns = max(1, LINE // (max(map(len, handles)) + 9))
    figure.set_figheight(figure.get_figheight() + 0.2 * ceil(len(handles) / columns))  # the axes keep their height
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    return figure
