"""Figures of a verification: the error over a model's depth, and the images whose answer flipped."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from vitdemo.conversion.verdict import RANDOM, REAL, Report
from vitdemo.dataset.imagenet import ImageNetVal
from vitdemo.dataset.plots import picture_grid, short_names, thumbnail
from vitdemo.errors import VitdemoError

# Okabe and Ito's palette, safe for colour-blind readers; markers and dashes tell the lines apart without it.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = "os^Dv<P", ("-", "--", "-.")
CANDIDATE, REFERENCE, GREY = "#0072B2", "#D55E00", "#666666"  # whose answer is right
SMALLEST = 1e-8  # no error at all is drawn here, as there is no zero on a logarithmic axis


def plot_error_over_depth(reports: Sequence[Report] | dict[str, Report]) -> Figure:
    """Relative L2 error of each layer, from the input on, a line a report; dotted: each precision's tolerance.

    On real images where all reports have some, else on random ones. A dict names the lines, which are otherwise called
    by engine and precision. Raises VitdemoError where the reports do not show the same layers.
    """
    if not isinstance(reports, dict):
        reports = {f"{report.engine} {report.precision}": report for report in reports}
    kind = REAL if all(REAL in set(report.layers["kind"]) for report in reports.values()) else RANDOM
    tables = {name: report.layers[report.layers["kind"] == kind] for name, report in reports.items()}
    names = [list(table["layer"]) for table in tables.values()]
    if not names or not names[0] or any(other != names[0] for other in names):
        raise VitdemoError("error over depth: give reports of engines that show the same layers")
    figure, ax = plt.subplots(figsize=(9, 4.8), layout="constrained")
    x = range(len(names[0]))
    for k, (name, table) in enumerate(tables.items()):
        look = dict(color=COLORS[k % len(COLORS)], marker=MARKERS[k % len(MARKERS)], linestyle=DASHES[k % len(DASHES)])
        ax.plot(x, table["relative_l2"].clip(lower=SMALLEST), **look, markersize=4, linewidth=1.3, label=name)
    tolerances = {reports[name].precision: table["tolerance"] for name, table in tables.items()}
    for precision, tolerance in tolerances.items():
        ax.plot(x, tolerance, color=GREY, linestyle=":", linewidth=1.2)
        ax.text(x[-1], tolerance.iloc[-1], f"{precision} tolerance", color=GREY, fontsize=8, ha="right", va="bottom")
    ax.set_yscale("log")
    ax.set_ylim(bottom=SMALLEST)
    ax.set_xticks(x, names[0], rotation=90, fontsize=8)
    ax.set(ylabel=f"relative L2 error, {kind} images", title="Error over depth, against eager fp32")
    ax.grid(axis="y", alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def plot_flips(report: Report, data: ImageNetVal, count: int = 12) -> Figure:
    """Up to ``count`` images whose answer flipped, with both answers and the true class.

    Blue: the candidate is right; orange: the reference was; grey: neither. data: the set that was verified on.
    """
    if report.flips.empty:
        figure = plt.figure(figsize=(5, 1))
        images = report.overall.set_index("kind")["images"].get(REAL, 0)
        figure.text(0.5, 0.5, f"no answer flipped in {images} images", ha="center", va="center")
        return figure
    labelled = report.info.classes is not None  # else nobody knows what its outputs mean
    names, captions, colors = short_names(data), [], []
    for flip in report.flips.head(count).itertuples():
        before, after = (names[k] if labelled else f"class {k}" for k in (flip.reference, flip.candidate))
        captions.append(f"{before}\n→ {after}" + (f"\nis: {names[flip.label]}" if labelled else ""))
        right = {flip.candidate: CANDIDATE, flip.reference: REFERENCE} if labelled else {}
        colors.append(right.get(flip.label, GREY))
    pictures = [thumbnail(data[i].jpeg) for i in report.flips["index"].head(count)]
    return picture_grid(pictures, captions, min(6, len(pictures)), colors)
