"""Figures of one picture: what is answered, where the model looks, and where two engines differ."""

from collections.abc import Sequence
from html import escape
from textwrap import fill, shorten

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.core.pylabtools import print_figure
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitdemo.course.attention import class_attention
from vitdemo.course.looks import PictureResult, name_in
from vitdemo.dataset.dataset import Dataset
from vitdemo.errors import VitdemoError
from vitdemo.models.model import Model
from vitdemo.plots.dataset import picture_grid, short_names, shortened, thumbnail

# Okabe and Ito's palette, safe for colour-blind readers.
ANSWER, OTHER, CANDIDATE, REFERENCE, NEITHER = "#0072B2", "#BBBBBB", "#0072B2", "#D55E00", "#666666"
HEAT = "inferno"
DPI = 72  # of a figure in a widget


def plot_looks(looks: dict[str, PictureResult], blue: int | None = None) -> Figure:
    """Looks side by side, one column each: the pixels, the rollout over them, and below both the top-5 as bars.

    Args:
        looks: as ``look_at`` gives them, by the name that stands above each.
        blue: which class (its index) stands out in all of them, by default the answer of the first look.
    """
    blue = next(iter(looks.values())).top5["class"].iloc[0] if blue is None else blue
    figure, width = plt.figure(figsize=(4.4 * len(looks), 4.6)), 1 / len(looks)
    for k, (name, look) in enumerate(looks.items()):
        left = k * width
        figure.text(left + 0.02 * width, 0.92, fill(shorten(name, 100, placeholder=" …"), 52), fontsize=10.5)
        tiles = {"what the model gets": _pixels(look), _rollout_title(look): _heated(look, look.rollout)}
        pictures = figure.add_axes((left + 0.02 * width, 0.43, 0.96 * width, 0.47))
        _show_tiles(pictures, tiles, columns=2, width=34)
        _show_top5(look.top5, figure.add_axes((left + 0.02 * width, 0.1, 0.94 * width, 0.32)), blue)
    return figure


def _show_top5(top5: pd.DataFrame, ax: Axes, blue: int) -> None:
    """The likeliest classes as bars, of which the class ``blue`` stands out."""
    y = range(len(top5))
    ax.barh(y, 100 * top5["probability"], color=[ANSWER if k == blue else OTHER for k in top5["class"]], height=0.75)
    for k, (answer, share) in enumerate(zip(top5["answer"], top5["probability"], strict=True)):
        inside = share > 0.5
        place = dict(ha="left", va="center", fontsize=10, color="white" if inside else "black")
        ax.text(1 if inside else 100 * share + 1, k, f"{shortened(answer, 24)}  {share:.1%}", **place)
    ax.invert_yaxis()
    ax.set(xlim=(0, 100), yticks=[])
    ax.set_xlabel("probability in %", fontsize=10)
    ax.tick_params(labelsize=10)
    ax.spines[["top", "right", "left"]].set_visible(False)


def plot_blocks(model: Model, look: PictureResult) -> Figure:
    """The attention of the class token in each block, from the first to the last, and the rollout of all of them.

    Args:
        model: a Vision Transformer.
        look: at one picture, by ``look_at``.

    Raises:
        VitdemoError: for a look without attention.
    """
    if look.maps is None:
        raise VitdemoError(f"{model.info.tag}: has no attention to show block by block; take a ViT")
    heats = class_attention(model, look.maps[None])[0]
    tiles = {f"block {k}, at most {heat.max():.0%}": _heated(look, heat) for k, heat in enumerate(heats)}
    tiles[_rollout_title(look)] = _heated(look, look.rollout)
    columns = min(4, len(tiles))
    rows = -(-len(tiles) // columns)
    figure = plt.figure(figsize=(9, 2.35 * rows))
    _show_tiles(figure.add_axes((0.005, 0.005, 0.99, 0.985)), tiles, columns, width=30)
    return figure


def plot_disagreements(
    table: pd.DataFrame, data: Dataset, names: Sequence[str] | None = None, count: int = 6
) -> Figure:
    """The first ``count`` rows of ``disagreements``: the reference's answer, → the candidate's, and the true class.

    Blue: the candidate is right; orange: the reference is; grey: both, neither, or nobody knows.

    Args:
        table: as ``disagreements`` gives it.
        data: its data set.
        names: of the answers by class index, as ``names_of`` gives them.
        count: how many images to show.
    """
    truths, shown, captions, colors = short_names(data), table.head(count), [], []
    for row in shown.itertuples(index=False):
        before = f"{_short(name_in(names, row.reference))} {row.reference_probability:.0%}"
        after = f"{_short(name_in(names, row.candidate))} {row.candidate_probability:.0%}"
        captions.append(f"image {row.index}\n{before}\n→ {after}\nis: {_short(truths[row.label])}")
        told_apart = names == truths[:-1] and row.candidate != row.reference
        right = {row.candidate: CANDIDATE, row.reference: REFERENCE} if told_apart else {}
        colors.append(right.get(row.label, NEITHER))
    return picture_grid([thumbnail(data[i].image) for i in shown["index"]], captions, min(6, count), colors)


def _short(name: str) -> str:
    return shortened(name, 18)


def _pixels(look: PictureResult) -> np.ndarray:
    return look.pixels.permute(1, 2, 0).numpy()


def _rollout_title(look: PictureResult) -> str:
    return "no attention: not a ViT" if look.rollout is None else f"rollout, at most {look.rollout.max():.1%}"


def _heated(look: PictureResult, heat: torch.Tensor | None) -> np.ndarray:
    """The picture in grey, and over it each patch's share in colour, from none to the largest: uint8[H, W, 3]."""
    grey = _pixels(look).mean(axis=2, keepdims=True).repeat(3, axis=2)
    if heat is None:
        return grey.astype(np.uint8)
    down, across = (side // patches for side, patches in zip(grey.shape, heat.shape, strict=False))
    shares = (heat / heat.max().clamp(min=1e-12)).numpy().repeat(down, axis=0).repeat(across, axis=1)
    return (0.4 * grey + 0.6 * 255 * plt.get_cmap(HEAT)(shares)[..., :3]).astype(np.uint8)


def _show_tiles(ax: Axes, tiles: dict[str, np.ndarray], columns: int, width: int) -> None:
    """Pictures of one size in one image, which is drawn several times as fast as axes for each; titles above them."""
    height, side, _ = next(iter(tiles.values())).shape
    gap, head = side // 25, height // 9
    rows = -(-len(tiles) // columns)
    canvas = np.full((rows * (height + head), columns * (side + gap) - gap, 3), 255, np.uint8)
    for k, (title, tile) in enumerate(tiles.items()):
        top, left = (k // columns) * (height + head) + head, (k % columns) * (side + gap)
        canvas[top : top + height, left : left + side] = tile
        ax.text(left, top - 0.25 * head, shorten(title, width, placeholder=" …"), fontsize=10, va="bottom")
    ax.imshow(canvas)
    ax.set_axis_off()
    ax.set_anchor("W")


def html_of(figure: Figure, alt: str) -> str:
    """A figure as an HTML image; the figure is closed.

    Args:
        figure: matplotlib's.
        alt: its text for those who cannot see it.
    """
    how = dict(dpi=DPI, bbox_inches=None, pil_kwargs={"compress_level": 3})  # of 9: time before size
    data = print_figure(figure, base64=True, **how)
    plt.close(figure)
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}" style="max-width: 100%">'
