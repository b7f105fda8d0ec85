"""Figures and views of a data set, and what all figures share: their size, and what a colour means."""

from collections.abc import Sequence
from contextlib import suppress
from math import ceil
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from vitdemo.dataset.dataset import Dataset
from vitdemo.dataset.decoding import Preprocessing, open_image, reference_crop, refusal
from vitdemo.models import classes

THUMBNAIL = 240  # pixels of the longer side: a gallery of full photographs would make the report heavy
# Okabe and Ito's palette, safe for colour-blind readers. In every figure of the course blue is right, vermilion is
# wrong or lost, and grey is what a result is compared with, or waiting. `engine_look` has the colours of engines.
RIGHT, WRONG, GREY = "#0072B2", "#D55E00", "#999999"
WIDTH, DPI = 7.5, 120  # inches, and pixels of each: on a page of 900 pixels matplotlib's 10 points are 12 of the page's
LINE = 100  # letters of that size in a line as wide as the figure


def new_figure(height: float, rows: int = 1, columns: int = 1, **how):
    """A figure as wide as a page, and its axes, as ``subplots`` gives them.

    Args:
        height: in inches.
        rows, columns: of its axes.
        how: what ``subplots`` takes besides.
    """
    return plt.subplots(rows, columns, figsize=(WIDTH, height), dpi=DPI, layout="constrained", **how)


def says(text: str) -> Figure:
    """A figure that only says something."""
    figure = plt.figure(figsize=(5, 1), dpi=DPI)
    figure.text(0.5, 0.5, text, ha="center", va="center")
    return figure


def thumbnail(jpeg: bytes) -> Image.Image:
    """The picture as RGB, its longer side 240 px, centred on a white square so that captions line up.

    Args:
        jpeg: the file's bytes.

    Returns:
        A picture of 240 x 240 px; a grey one where the file cannot be read, or is enormous.
    """
    image = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "lightgrey")
    with suppress(Exception), open_image(jpeg) as whole:  # as in reference_crop: decoders raise a dozen types
        if not refusal(*whole.size, jpeg, whole.mode):
            image = whole.convert("RGB")
    return ImageOps.pad(image, (THUMBNAIL, THUMBNAIL), color="white")


def short_names(data: Dataset) -> list[str]:
    """The first synonym of each class's name, by label: what fits under a picture. The last, -1, is of no label."""
    return [*classes.short_names(data.class_names), "?"]


def shortened(name: str, width: int) -> str:
    """``name``, or its first letters and … where it is longer than ``width`` letters."""
    return name if len(name) <= width else f"{name[: width - 2].rstrip()} …"


def picture_grid(pictures: Sequence, captions: Sequence[str], columns: int = 6, colors: Sequence[str] | None = None):
    """Pictures in rows, a caption under each.

    Args:
        pictures: PIL's, or uint8[H, W, 3].
        captions: one per picture.
        columns: how many pictures stand in a row.
        colors: of the captions, matplotlib's names, one per picture; black by default.

    Returns:
        The Figure.
    """
    rows, side = max(1, ceil(len(pictures) / columns)), WIDTH / columns
    wrapped = ["\n".join(fill(line, LINE // columns) for line in each.splitlines()) for each in captions]
    height = side + 0.17 * (1.5 + max((text.count("\n") for text in wrapped), default=0))
    figure, axes = new_figure(rows * height, rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    colors = colors or ["black"] * len(pictures)
    for ax, picture, caption, color in zip(axes.flat, pictures, wrapped, colors, strict=False):
        ax.imshow(picture)
        ax.text(0.5, -0.03, caption, color=color, ha="center", va="top", transform=ax.transAxes)
    return figure


def plot_gallery(data: Dataset, indices: Sequence[int], columns: int = 6) -> Figure:
    """Images with their class names.

    Args:
        data: the data set.
        indices: which of its images.
        columns: how many stand in a row.
    """
    names, samples = short_names(data), [data[i] for i in indices]
    return picture_grid([thumbnail(s.image) for s in samples], [names[s.label] for s in samples], columns)


def plot_crops(jpeg: bytes, preprocessings: dict[str, Preprocessing]) -> Figure:
    """One image as it is, then as each preprocessing hands it to a model.

    Args:
        jpeg: the file's bytes.
        preprocessings: by the names that are to stand under the crops.

    Raises:
        UnreadableImage: where the file cannot be read, or is enormous.
    """
    crops = [reference_crop(jpeg, p).permute(1, 2, 0).numpy() for p in preprocessings.values()]
    with open_image(jpeg) as image:
        sizes = [image.size, *(crop.shape[1::-1] for crop in crops)]
    named = zip(("the file", *preprocessings), sizes, strict=True)
    captions = [f"{name}\n{width} x {height} px" for name, (width, height) in named]
    return picture_grid([thumbnail(jpeg), *crops], captions, columns=1 + len(crops))


def folder_preview(path: Path | str, entries: int = 4) -> str:
    """The top of a folder tree as text, three levels deep.

    Args:
        path: the folder.
        entries: how many of each level are shown.
    """
    lines = [f"{Path(path).name}/"]

    def add(folder: Path, indent: str, depth: int):
        found = sorted(folder.iterdir())
        for entry in found[:entries]:
            size = "" if entry.is_dir() else f"  {entry.stat().st_size:,} bytes"
            lines.append(f"{indent}{entry.name}{'/' if entry.is_dir() else ''}{size}")
            if entry.is_dir() and depth < 3:
                add(entry, indent + "    ", depth + 1)
        if len(found) > entries:
            lines.append(f"{indent}... {len(found) - entries} more")

    add(Path(path), "    ", 1)
    return "\n".join(lines)
