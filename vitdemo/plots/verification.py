"""Figures of a verification: the error over a model's depth, and the images whose answer flipped."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from vitdemo.dataset.dataset import Dataset
from vitdemo.errors import VitdemoError
from vitdemo.models.classes import match_classes
from vitdemo.plots.dataset import GREY, RIGHT, WRONG, new_figure, picture_grid, says, short_names, shortened, thumbnail
from vitdemo.verification.tolerances import RANDOM, REAL, Report

# One colour per engine, of the palette that ``plots.dataset`` begins with; one line and marker per precision.
COLORS = {"eager": "#000000", "inductor": "#CC79A7", "onnx": "#009E73", "openvino": "#E69F00"}
OTHER = "#882255"
DASHES = {"fp32": "-", "bf16": "--", "int8": ":"}
MARKERS = {"fp32": "o", "bf16": "s", "int8": "^"}
SMALLEST = 1e-8  # no error at all is drawn here, as there is no zero on a logarithmic axis


def engine_look(engine: str, precision: str) -> dict:
    """How every figure of the course draws an engine in a precision: what matplotlib's ``plot`` takes, label included.

    Args:
        engine: its name; one without a colour of its own gets the colour of wine.
        precision: one without a line of its own gets dashes and dots, and diamonds.
    """
    known = dict(color=COLORS.get(engine, OTHER), linestyle=DASHES.get(precision, "-."))
    return known | dict(marker=MARKERS.get(precision, "D"), markersize=5, linewidth=1.3, label=f"{engine} {precision}")


def plot_error_over_depth(reports: Sequence[Report]) -> Figure:
    """Relative L2 error of each layer, from the input on, one line per report; grey: each precision's tolerance.

    On real images where all reports have some, else on random ones. An engine that fuses a layer with the next does not
    show it: its line passes by.

    Args:
        reports: of one model.

    Raises:
        VitdemoError: for reports without layers, or with those of different models.
    """
    kind = REAL if all(REAL in set(report.layers["kind"]) for report in reports) else RANDOM
    tables = {(each.engine, each.precision): each.layers[each.layers["kind"] == kind] for each in reports}
    layers = max((list(table["layer"]) for table in tables.values()), key=len, default=[])
    if not layers or any(table.empty or not set(table["layer"]) <= set(layers) for table in tables.values()):
        raise VitdemoError("error over depth: give reports of one model, of engines that show their layers")
    place = {layer: x for x, layer in enumerate(layers)}
    figure, ax = new_figure(4.8)
    for pair, table in tables.items():
        ax.plot(table["layer"].map(place), table["relative_l2"].clip(lower=SMALLEST), **engine_look(*pair))
    for precision, table in {precision: table for (_, precision), table in tables.items()}.items():
        ax.plot(table["layer"].map(place), table["tolerance"], color=GREY, linestyle=":", linewidth=1.2)
        text = dict(color="#666666", va="center", transform=ax.get_yaxis_transform())
        ax.text(1.01, table["tolerance"].iloc[-1], f"{precision}\ntolerance", **text)
    ax.set_yscale("log")
    ax.set_ylim(bottom=SMALLEST)
    ax.set_xticks(range(len(layers)), layers, rotation=90)
    ax.set(ylabel=f"relative L2 error, {kind} images", title="Error over depth, against eager fp32")
    ax.grid(axis="y", alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_flips(report: Report, data: Dataset, count: int = 12) -> Figure:
    """Images whose answer flipped: the reference's answer, → the candidate's, and the true class.

    Blue: the candidate is right; orange: the reference is, so the candidate is wrong; grey: neither.

    Args:
        report: of one engine.
        data: the set that was verified on.
        count: images at most.
    """
    if report.flips.empty:
        images = report.overall.set_index("kind")["images"].get(REAL, 0)
        return says(f"no answer flipped in {images} images")
    known = data.matched_with == report.info.weights_sha256  # by a class map, perhaps
    labelled = known or report.info.classes is not None  # else nobody knows what its outputs mean
    data = match_classes(report.info, data) if labelled else data
    names, captions, colors = [shortened(name, 22) for name in short_names(data)], [], []
    for flip in report.flips.head(count).itertuples():
        before, after = (names[k] if labelled else f"class {k}" for k in (flip.reference, flip.candidate))
        captions.append(f"{before}\n→ {after}" + (f"\nis: {names[flip.label]}" if labelled else ""))
        right = {flip.candidate: RIGHT, flip.reference: WRONG} if labelled else {}
        colors.append(right.get(flip.label, "#666666"))
    pictures = [thumbnail(data[i].image) for i in report.flips["index"].head(count)]
    return picture_grid(pictures, captions, colors=colors)
