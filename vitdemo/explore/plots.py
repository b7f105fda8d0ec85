"""Figures of one picture: what is answered, where the model looks, and where two engines differ."""

from collections.abc import Sequence
from textwrap import shorten

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitdemo.conversion.models import Model
from vitdemo.dataset.imagenet import ImageNetVal
from vitdemo.dataset.plots import picture_grid, short_names, thumbnail
from vitdemo.errors import VitdemoError
from vitdemo.explore.attention import class_attention
from vitdemo.explore.predictions import Look, name_in

# Okabe and Ito's palette, safe for colour-blind readers.
ANSWER, OTHER, CANDIDATE, REFERENCE, NEITHER = "#0072B2", "#BBBBBB", "#0072B2", "#D55E00", "#666666"
HEAT = "inferno"


def plot_looks(looks: dict[str, Look]) -> Figure:
    """A row a look, by its name: the pixels, the rollout over them, and the top-5 as bars.

    The answer of the first row is blue in all of them.
    """
    figure, axes = plt.subplots(
        len(looks), 3, figsize=(9, 2.7 * len(looks)), squeeze=False, gridspec_kw={"width_ratios": (1, 1, 1.5)}
    )
    figure.subplots_adjust(left=0.01, right=0.97, bottom=0.17 / len(looks), top=1 - 0.1 / len(looks), wspace=0.08)
    answered = next(iter(looks.values())).top5["class"].iloc[0]
    for line, (name, look) in zip(axes, looks.items(), strict=True):
        _show(line[0], look.pixels, shorten(name, 44, placeholder=" …"))
        _show_heat(line[1], look.pixels, look.rollout, "rollout")
        plot_top5(look.top5, line[2], answered)
    return figure


def plot_top5(top5: pd.DataFrame, ax: Axes | None = None, blue: int | None = None) -> Figure:
    """The likeliest classes as bars; ``blue``: which class stands out, by default the first."""
    ax = ax or plt.figure(figsize=(4.5, 2.2)).add_axes((0.03, 0.2, 0.92, 0.78))
    blue = top5["class"].iloc[0] if blue is None else blue
    y = range(len(top5))
    ax.barh(y, 100 * top5["probability"], color=[ANSWER if k == blue else OTHER for k in top5["class"]], height=0.75)
    for k, (answer, share) in enumerate(zip(top5["answer"], top5["probability"], strict=True)):
        inside = share > 0.5
        place = dict(ha="left", va="center", fontsize=8.5, color="white" if inside else "black")
        ax.text(1 if inside else 100 * share + 1, k, f"{shorten(answer, 30, placeholder=' …')}  {share:.1%}", **place)
    ax.invert_yaxis()
    ax.set(xlim=(0, 100), yticks=[])
    ax.set_xlabel("probability in %", fontsize=8.5)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right", "left"]].set_visible(False)
    return ax.figure


def plot_blocks(model: Model, look: Look) -> Figure:
    """What the class token attends to in each block, from the first to the last, and the rollout of all of them."""
    if look.maps is None:
        raise VitdemoError(f"{model.info.tag}: has no attention to show block by block; take a ViT")
    blocks = class_attention(model, look.maps[None])[0]
    heats = {f"block {k}": heat for k, heat in enumerate(blocks)} | {"rollout": look.rollout}
    columns = min(7, len(heats))
    rows = -(-len(heats) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(9, 1.65 * rows), squeeze=False)
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=1 - 0.2 / rows, wspace=0.05, hspace=0.32)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (name, heat) in zip(axes.flat, heats.items(), strict=False):
        _show_heat(ax, look.pixels, heat, name)
    return figure


def plot_disagreements(
    table: pd.DataFrame, data: ImageNetVal, names: Sequence[str] | None = None, count: int = 6
) -> Figure:
    """The first ``count`` rows of ``disagreements``: the reference's answer, → the candidate's, and the true class.

    Blue: the candidate is right; orange: the reference is; grey: both, neither, or nobody knows. ``names``: of the
    answers by class index, as ``names_of`` gives them.
    """
    truths, shown, captions, colors = short_names(data), table.head(count), [], []
    for row in shown.itertuples(index=False):
        before = f"{_short(name_in(names, row.reference))} {row.reference_probability:.0%}"
        after = f"{_short(name_in(names, row.candidate))} {row.candidate_probability:.0%}"
        captions.append(f"image {row.index}\n{before}\n→ {after}\nis: {_short(truths[row.label])}")
        told_apart = names == truths and row.candidate != row.reference
        right = {row.candidate: CANDIDATE, row.reference: REFERENCE} if told_apart else {}
        colors.append(right.get(row.label, NEITHER))
    return picture_grid([thumbnail(data[i].jpeg) for i in shown["index"]], captions, min(6, count), colors)


def _short(name: str) -> str:
    return shorten(name, 18, placeholder=" …")


def _show(ax: Axes, pixels: torch.Tensor, title: str) -> None:
    ax.imshow(pixels.permute(1, 2, 0).numpy())
    ax.set_axis_off()
    ax.set_title(title, fontsize=8.5, loc="left", pad=3)


def _show_heat(ax: Axes, pixels: torch.Tensor, heat: torch.Tensor | None, title: str) -> None:
    """The picture in grey, and over it each patch's share in colour, from none to the picture's largest."""
    if heat is None:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no attention to show:\nnot a ViT", ha="center", va="center", fontsize=8.5)
        return
    height, width = pixels.shape[-2:]
    ax.imshow(pixels.float().mean(dim=0).numpy(), cmap="gray", vmin=0, vmax=255)
    ax.imshow(heat.numpy(), cmap=HEAT, vmin=0, alpha=0.6, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    ax.set_axis_off()
    ax.set_title(f"{title}, at most {heat.max():.1%}", fontsize=8.5, loc="left", pad=3)
