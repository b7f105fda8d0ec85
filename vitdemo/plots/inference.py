"""Figures of an evaluation: predictions, mistakes, accuracy by class, where the time went, what a diagnosis found."""

from collections.abc import Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitdemo.evaluation.diagnosis import Diagnosis
from vitdemo.evaluation.evaluation import Evaluation
from vitdemo.evaluation.metrics import describe_threads
from vitdemo.inference.loop import batches_of
from vitdemo.inference.schedule import SyncSchedule
from vitdemo.plots.dataset import GREY, LINE, RIGHT, WRONG, new_figure, picture_grid, says, short_names, thumbnail
from vitdemo.plots.verification import engine_look
from vitdemo.stats import unaccounted_s, wilson_interval

DECODING, WRITING = "#56B4E9", "#F0E442"  # the work around an engine's; that has the engine's own colour
STREAMS = {"in": "copies to the GPU", "compute": "the graph", "out": "copies to the host"}  # of ``Cuda``


def plot_predictions(evaluation: Evaluation, indices: Sequence[int], columns: int = 6) -> Figure:
    """Images, each with its prediction, its probability and, where wrong, the true class.

    Args:
        evaluation: of the images.
        indices: which to show.
        columns: of the grid.
    """
    names, captions, colors = short_names(evaluation.data), [], []
    for _, row in evaluation.rows.iloc[list(indices)].iterrows():
        truth = names[row["label"]]
        guess = "unreadable" if row["error"] else f"{names[row['predicted_1']]} {row['probability_1']:.0%}"
        captions.append(f"✓ {guess}" if row["correct"] else f"✗ {guess}\nis: {truth}")
        colors.append(RIGHT if row["correct"] else WRONG)
    return picture_grid([thumbnail(evaluation.data[i].image) for i in indices], captions, columns, colors)


def plot_mistakes(evaluation: Evaluation, count: int = 10) -> Figure:
    """The wrong answers given with the highest probability.

    Args:
        evaluation: of the images.
        count: how many to show at most.
    """
    rows = evaluation.rows
    wrong = rows[(rows["correct"] == 0) & (rows["error"] == "")].nlargest(count, "probability_1")
    if wrong.empty:
        return says(f"no mistakes in {len(rows)} images")
    return plot_predictions(evaluation, wrong.index, columns=5)


def plot_per_class(evaluation: Evaluation) -> Figure:
    """Top-1 of every class that has images, with 95 % Wilson intervals, the worst first (at most 40).

    Args:
        evaluation: of the images.
    """
    by_class = evaluation.rows.groupby("label")["correct"].agg(["mean", "sum", "count"])
    worst, names = by_class.sort_values(["mean", "count"])[:40], short_names(evaluation.data)
    labels = [f"{names[label]} ({n})" for label, n in worst["count"].items()]
    figure, ax = _bars(labels, worst["sum"], worst["count"], RIGHT, 0.8 + 0.24 * len(worst))
    ax.axvline(evaluation.metrics["top1"] * 100, color="black", linestyle="--", label="all classes")
    ax.set_xlabel("top-1 in % (line: 95 % interval; in brackets: images)")
    ax.legend(loc="lower left")
    return figure


def _bars(
    names: Sequence[str], correct: pd.Series, images: pd.Series, colors: str | list[str], height: float
) -> tuple[Figure, Axes]:
    """Top-1 in % as bars, the first one at the top, with a line for its 95 % Wilson interval."""
    figure, ax = new_figure(height)
    y, low_high = range(len(names)), [wilson_interval(int(c), int(n)) for c, n in zip(correct, images, strict=True)]
    ax.barh(y, correct / images * 100, color=colors, height=0.7)
    ax.hlines(y, *(100 * np.array(low_high).T), color="black", linewidth=1)
    _name_lines(ax, names)
    ax.set_xlim(0, 100)
    return figure, ax


def _name_lines(ax: Axes, names: Sequence[str]) -> None:
    """The names of what is drawn at the heights 0, 1, …, the first one at the top."""
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()


def plot_confusion(evaluation: Evaluation, most: int = 20) -> Figure:
    """How many images of each class got which answer: one row per true class, which adds up to its images.

    Args:
        evaluation: of the images.
        most: how many classes to show, those with the most wrong answers of and for them; the others, and images that
            cannot be read, share the last column.
    """
    rows, elsewhere = evaluation.rows, -1
    wrong = rows[rows["correct"] == 0]
    mixed = pd.concat([wrong["label"], wrong["predicted_1"], rows["label"]]).dropna()
    weight = pd.concat([wrong["label"], wrong["predicted_1"]]).value_counts().reindex(mixed.unique(), fill_value=0)
    shown = sorted(map(int, weight.sort_values(ascending=False, kind="stable").index[:most]))
    answered = rows["predicted_1"].where(rows["predicted_1"].isin(shown), elsewhere).astype(int)
    counts = pd.crosstab(rows["label"], answered).reindex(columns=[*shown, elsewhere], fill_value=0)
    counts = counts.reindex(sorted(set(shown) & set(rows["label"])))
    counts = counts if counts[elsewhere].any() else counts.drop(columns=elsewhere)
    names = [*short_names(evaluation.data)[:-1], "another, or none"]
    height, width = counts.shape
    figure, ax = new_figure(2.2 + 0.26 * height)
    ax.imshow(counts.div(counts.sum(axis=1), axis=0), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, x in zip(*counts.to_numpy().nonzero(), strict=True):
        right = counts.index[y] == counts.columns[x]
        shade = "white" if counts.iat[y, x] > 0.5 * counts.iloc[y].sum() else "black" if right else WRONG
        ax.text(x, y, counts.iat[y, x], ha="center", va="center", color=shade)
    ax.set_xticks(range(width), [names[k] for k in counts.columns], rotation=60, ha="right")
    ax.set_yticks(range(height), [names[k] for k in counts.index])
    ax.set(xlabel="the model's answer", ylabel="the true class")
    return figure


def plot_timeline(evaluation: Evaluation, batches: int = 12) -> Figure:
    """When each of some consecutive batches was decoded and computed: where both bars of a moment are filled, they
    overlap.

    Args:
        evaluation: of this session.
        batches: how many to show, from the middle of the run.
    """
    times = evaluation.times
    middle = max(len(times) // 2 - batches // 2, 0)
    shown = times.iloc[middle : middle + batches]
    figure, ax = new_figure(1.3 + 0.22 * len(shown))
    start = shown["decode_began"].min()
    parts = {"decoding": DECODING, "decoded, waiting": GREY, "engine": _engine_color(evaluation)}
    moments = ("decode_began", "decode_ended", "submitted", "finished")
    for (label, color), begin, end in zip(parts.items(), moments, moments[1:], strict=False):
        left, width = (shown[begin] - start) * 1e3, (shown[end] - shown[begin]) * 1e3
        ax.barh(range(len(shown)), width, left=left, color=color, height=0.7, label=label)
    _name_lines(ax, [f"batch {k}" for k in shown.index])
    ax.set(xlabel="milliseconds since the first of these batches began")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_overlap(spans: pd.DataFrame) -> Figure:
    """The times at which a GPU copied and computed some batches, one line per stream, consecutive batches in two greys.

    The upper panel waits for each batch before it submits the next one; the lower one has several in flight.

    Args:
        spans: the rows of ``Pipeline.spans``.
    """
    figure, axes = new_figure(3.6, rows=2, sharex=True)
    for ax, (in_flight, run) in zip(axes, spans.groupby("in_flight"), strict=True):
        start, batches = run["begin_ms"].min(), run["batch"].nunique()
        for y, stream in enumerate(STREAMS):
            own = run[run["stream"] == stream]
            bars = list(zip(own["begin_ms"] - start, own["end_ms"] - own["begin_ms"], strict=True))
            ax.broken_barh(bars, (y - 0.4, 0.8), facecolors=[(GREY, "#444444")[batch % 2] for batch in own["batch"]])
        _name_lines(ax, STREAMS.values())
        taken = f"{batches} batches in {run['end_ms'].max() - start:.2f} ms"
        ax.set_title(f"{taken}, {in_flight} in flight at a time", loc="left", fontsize=10)
    axes[-1].set(xlabel="milliseconds since the first copy began")
    return figure


def _engine_color(evaluation: Evaluation) -> str:
    return engine_look(evaluation.metrics["engine"], evaluation.metrics["precision"])["color"]


def plot_schedule(images: int, device_batch_size: int, replicas: int) -> Figure:
    """Which images each replica gets in each step of the synchronous schedule.

    Args:
        images: how many there are.
        device_batch_size: images that a replica gets at once.
        replicas: how many.
    """
    schedule, step = SyncSchedule(batches_of(range(images), device_batch_size), replicas), 0
    figure, ax = new_figure(1.0 + 0.45 * replicas)
    while shards := {k: indices for k in range(replicas) if (indices := schedule.take(k, 0.0))}:
        for k, indices in shards.items():
            share = len(indices) / device_batch_size  # the last, smaller one is drawn smaller
            ax.barh(k, 0.94 * share, left=step - 0.47, height=0.8, color="white", edgecolor="black")
            label = f"{indices.start}–{indices.stop - 1}" if len(indices) > 1 else f"{indices.start}"
            ax.text(step - 0.47 + 0.47 * share, k, label, ha="center", va="center")
            schedule.done(indices)
        step += 1
    _name_lines(ax, [f"replica {k}" for k in range(replicas)])
    ax.set(xlabel="step (a global batch)", xticks=range(step), xlim=(-0.6, step - 0.4))
    ax.set_title(f"{images} images, device_batch_size {device_batch_size}, {replicas} replicas", loc="left")
    return figure


def plot_replicas(evaluations: dict[str, Evaluation]) -> Figure:
    """When each replica's engine was at work, one panel per run; what is white is waiting.

    Where a replica was lost, a line says when; the work that was lost with it is hatched, from its last batch that came
    back up to that line.

    Args:
        evaluations: runs with replicas, by the title of their panel.
    """
    figure, axes = new_figure(1.3 * len(evaluations) + 1.0, len(evaluations), sharex=True, squeeze=False)
    for ax, (name, evaluation) in zip(axes[:, 0], evaluations.items(), strict=True):
        for replica, times in evaluation.times.groupby("replica"):
            spans = list(zip(times["submitted"], times["finished"] - times["submitted"], strict=True))
            ax.broken_barh(spans, (replica - 0.4, 0.8), facecolors=_engine_color(evaluation), linewidth=0)
        title = f"{name}: {evaluation.metrics['wall_s']:.1f} s"
        for replica, at_s, images in evaluation.metrics["replicas"]["losses"]:
            came_back = evaluation.times.query("replica == @replica and finished <= @at_s")["finished"]
            left = max(came_back, default=0.0)
            ax.barh(replica, at_s - left, left=left, height=0.8, color="white", edgecolor=WRONG, hatch="//")
            ax.vlines(at_s, replica - 0.5, replica + 0.5, color=WRONG, linewidth=3)
            title += f"; at {at_s:.1f} s replica {replica} lost {images} images (hatched), done again"
        each = evaluation.metrics["replicas"]["each"]
        ax.set_yticks(range(len(each)), [f"replica {k}: {slot['images']} images" for k, slot in enumerate(each)])
        ax.set_ylim(len(each) - 0.5, -0.5)
        ax.set_title(fill(title, LINE), loc="left", fontsize=10)
    axes[-1, 0].set(xlabel="seconds since the run began")
    return figure


def plot_scaling(table: pd.DataFrame, one_process: float, one_core: float) -> Figure:
    """Images/s over the number of replicas: measured, and what the cores allow.

    Args:
        table: columns replicas, cores, images_per_s.
        one_process: images/s of one process with all cores.
        one_core: images/s of one replica on one core; the ideal is that times the cores in use.
    """
    figure, ax = new_figure(3.8)
    x = table["replicas"]
    ax.plot(x, one_core * table["cores"], color=GREY, linestyle="--", marker="_", label="ideal: one core x cores used")
    ax.axhline(one_process, color="black", linestyle=":", label="one process, all cores")
    ax.plot(x, table["images_per_s"], color="black", marker="o", label="measured")
    ax.set_xscale("log", base=2)
    ax.set_xticks(x, [str(n) for n in x])
    ax.set(xlabel="replicas", ylabel="images/s")
    ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    ax.legend(loc="lower right")
    return figure


def plot_time(evaluation: Evaluation, alone: dict) -> Figure:
    """How long a run's images take: by the engine alone, and from file to answer, where the loop was meanwhile.

    Args:
        evaluation: of this session.
        alone: of the same engine, by ``run_random_input``.
    """
    m, color, x = evaluation.metrics, _engine_color(evaluation), 0.0
    alone_s, engine_s = m["session_images"] / alone["images_per_s"], m["compute_wait_s"]
    parts = {"engine, as when alone": min(alone_s, engine_s), "engine, slower than alone": max(0, engine_s - alone_s)}
    parts |= {"waiting for images": m["decode_wait_s"], "making and writing rows": m["postprocess_s"]}
    parts["the rest"] = unaccounted_s(m["wall_s"], parts.values())
    figure, ax = new_figure(3.2)
    ax.barh(0, alone_s, color=color)
    for (name, s), each in zip(parts.items(), (color, "white", DECODING, WRITING, GREY), strict=True):
        ax.barh(1, s, left=x, color=each, edgecolor=color, hatch="//" * (each == "white"), label=f"{name}: {s:.2f} s")
        x += s
    rates = f"engine alone\n{alone['images_per_s']:.0f} images/s", f"file to answer\n{m['images_per_s']:.0f} images/s"
    _name_lines(ax, rates)
    what = f"{m['model']}, {m['engine']} {m['precision']}, {describe_threads(m)}"
    ax.set_title(f"{alone_s / m['wall_s']:.0%} of the engine's rate: {what}")
    ax.set_xlabel(f"seconds for {m['session_images']} images")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def plot_diagnosis(diagnosis: Diagnosis) -> Figure:
    """Top-1 as it is and with each mistake put right, with 95 % Wilson intervals; the explanation stands out.

    Args:
        diagnosis: what ``diagnose`` found.
    """
    table, published = diagnosis.table, diagnosis.published
    colors = [RIGHT if name == diagnosis.named else GREY for name in table["hypothesis"]]
    colors[0] = WRONG
    figure, ax = _bars(table["hypothesis"], table["correct"], table["images"], colors, 0.8 + 0.3 * len(table))
    lines = "line: 95 % interval"
    if published:
        ax.axvline(published.top1 * 100, color="black", linestyle="--")
        lines += f", dashed: published {published.top1:.1%}"
    ax.set_xlabel(f"top-1 in % of {diagnosis.images} images ({lines})")
    ax.set_title(f"explains the loss: {diagnosis.named}" if diagnosis.named else "no loss explained", loc="left")
    return figure
