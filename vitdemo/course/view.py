"""The image explorer's content: one picture, one model, an engine or two, loaded when first asked for."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from html import escape
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vitdemo.benchmarking.pairs import EAGER, Pair
from vitdemo.course.attention import attention_maps, mask_patches, most_looked_at, patch_grid, rollout
from vitdemo.course.figures import html_of, plot_blocks, plot_disagreements, plot_looks
from vitdemo.course.looks import PictureResult, disagreements, look_at, names_of, reference_of, with_preprocessing
from vitdemo.dataset.dataset import Dataset, open_data
from vitdemo.dataset.decoding import CROP_MODES, Preprocessing, crop_picture
from vitdemo.engines.artifacts import convert
from vitdemo.engines.contract import Engine
from vitdemo.errors import VitdemoError
from vitdemo.models.model import Model, load_model, shapes_of
from vitdemo.plots.dataset import short_names
from vitdemo.verification.comparison import compare_answers

OWN = "the model's own preprocessing"
ANSWER, BLOCKS, TWO_ENGINES = "answer", "block by block", "two engines"
AS_TRAINED = "the weights' own"
SCALINGS = {
    AS_TRAINED: {},
    "ImageNet's": {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD},
    "0.5 and 0.5": {"mean": (0.5,) * 3, "std": (0.5,) * 3},
    "none (0 and 1)": {"mean": (0.0,) * 3, "std": (1.0,) * 3},
}
NOTHING, MOST, LEAST, WINDOW = "nothing", "what is looked at most", "what is looked at least", "a window"

ALWAYS = ("data", "model", "engine", "precision", "show")  # these controls count in any case
COUNTS_AT = {  # these only at such values of another control, the others only for a single picture
    "against": ("show", (TWO_ENGINES,)),
    "among": ("show", (TWO_ENGINES,)),
    "crop_pct": ("crop", CROP_MODES),
    "patches": ("hide", (MOST, LEAST)),
    "down": ("hide", (WINDOW,)),
    "across": ("hide", (WINDOW,)),
}

KEPT_ENGINES = 3  # each holds its weights
Say = Callable[[str], None]
Picture = tuple[Engine, Model, Dataset, str, bytes]  # what looks at it, for which data set; its file's name, and bytes


class ImageView:
    """Holds what took long to get: the data set, the model and its engines, and the last look and comparison."""

    def __init__(self, data: Dataset, calibration: Path | str | None = None):
        self._data, self._calibration = {str(data.path): data}, calibration
        last = lru_cache(maxsize=1)
        self.model, self.engine = last(self._model), lru_cache(KEPT_ENGINES)(self._engine)
        self.apart = last(self._apart)
        self.first_look, self.first_html = last(self._first_look), last(self._first_html)

    def draw(self, say: Say, **values: Any) -> str:
        """HTML of what the controls ask for.

        Args:
            say: shows a line while something takes long.
            values: of the controls in ``image_explorer``, by their names.
        """
        self._say, asked = say, SimpleNamespace(**values)
        data, model, pair = self._opened(asked.data), self.model(asked.model), Pair(asked.engine, asked.precision)
        if asked.show == TWO_ENGINES:
            return self._engines_apart(data, model, pair, Pair(*asked.against.split(":")), asked.among)
        file, content, truth = picture_of(data, asked.index, asked.upload)
        picture = self.engine(model, pair), model, data, file, content
        first = self.first_look(*picture)
        wanted = replace(model.info.preprocessing, **SCALINGS[asked.scaling])
        if asked.crop != AS_TRAINED:
            wanted = replace(wanted, crop_mode=asked.crop, crop_pct=asked.crop_pct)
        places = dict(patches=asked.patches, down=asked.down, across=asked.across)
        changed = second_look(first, picture, wanted, asked.hide, **places)
        head = f"<p>{escape(file)}{escape(truth)}. Answered by {pair}; attention: {EAGER}.</p>"
        if asked.show == BLOCKS:
            how, last = next(iter(changed.items()), (OWN, first))
            text = f"attention of the class token, block by block: {file}, {how}"
            return head + f"<p>{escape(how)}</p>" + html_of(plot_blocks(model, last), text)
        blue = first.top5["class"].iloc[0]
        # The first is drawn once for all changes next to it.
        looks = [look_html(name, look, file, blue) for name, look in changed.items()]
        beside = "".join(looks) or "<p>Change <i>mean and std</i> or <i>crop</i>, or <i>hide</i> patches.</p>"
        return f'{head}<div style="display: flex; flex-wrap: wrap">{self.first_html(*picture)}{beside}</div>'

    def _opened(self, path: str) -> Dataset:
        if path not in self._data:
            self._say(f"opening {path} …")
            self._data = {path: open_data(path, progress=False)}
        return self._data[path]

    def _model(self, name: str) -> Model:
        self._say(f"loading {name} …")
        shapes_of(name)  # a mistyped name says so, and costs nothing of what is loaded
        for kept in (self.model, self.engine, self.first_look, self.first_html, self.apart):
            kept.cache_clear()  # before the next takes room
        return load_model(name)

    def _engine(self, model: Model, pair: Pair) -> Engine:
        self._say(f"getting {pair} of {model.info.tag} ready; building it takes seconds to minutes, once …")
        return convert(model, *pair, calibration=self._calibration)

    def _first_look(self, engine: Engine, model: Model, data: Dataset, file: str, content: bytes) -> PictureResult:
        pixels = crop_picture(file, content, model.info.preprocessing)
        return look_at(engine, model, pixels, names_of(model.info, data))

    def _first_html(self, *picture: Any) -> str:
        first = self.first_look(*picture)
        return look_html(OWN, first, picture[-2], first.top5["class"].iloc[0])

    def _apart(self, other: Pair, pair: Pair, model: Model, data: Dataset, among: int) -> pd.DataFrame:
        engines = [self.engine(model, each) for each in (other, pair)]
        self._say(f"comparing {other} with {pair} on {min(among, len(data))} images …")
        return disagreements(*engines, data, limit=among, progress=False)

    def _engines_apart(self, data: Dataset, model: Model, pair: Pair, other: Pair, among: int) -> str:
        if other == pair:
            raise VitdemoError(f"two engines: {pair} is the one above; choose another one")
        table = self.apart(other, pair, model, data, among)
        same = int((table["candidate"] == table["reference"]).sum())
        text = f"{other} gives the answer of {pair} for {same} of {len(table)} images; furthest apart are these."
        if model.info.classes == tuple(data.classes):
            counts = compare_answers(table)
            text += f" Only {pair} is right {counts['worse']} times, only {other} {counts['better']} times."
        figure = plot_disagreements(table, data, names_of(model.info, data))
        return f"<p>{escape(text)}</p>" + html_of(figure, text)


def look_html(name: str, look: PictureResult, file: str, blue: int) -> str:
    """``plot_looks`` of one look, with its answers in words."""
    top = (f"{row.answer} {row.probability:.1%}" for row in look.top5.itertuples())
    alt = f"{file}, {name}: {', '.join(top)}; the attention rollout over it"
    return f"<div>{html_of(plot_looks({name: look}, blue), alt)}</div>"


def counts(name: str, values: dict[str, Any]) -> bool:
    """Whether a control changes what is shown.

    Args:
        name: the control's, in ``image_explorer``.
        values: of all controls, by their names.
    """
    if name in ALWAYS:
        return True
    other, wanted = COUNTS_AT.get(name, ("show", (ANSWER, BLOCKS)))
    return values[other] in wanted and (other == "show" or values["show"] != TWO_ENGINES)


def picture_of(images: Dataset, index: int, upload: tuple) -> tuple[str, bytes, str]:
    """File name, bytes, and what it is, where that is known.

    Args:
        images: the data set.
        index: of the image in the data set.
        upload: the value of the upload's control: where it holds a picture, that is taken.

    Raises:
        VitdemoError: for an index that is not there.
    """
    if upload:
        return upload[0]["name"], bytes(upload[0]["content"]), ""
    if index >= len(images):
        raise VitdemoError(f"image {index}: the data set has 0 to {len(images) - 1}")
    sample = images[index]
    return sample.file, sample.image, f", is: {short_names(images)[sample.label]}"


def second_look(
    first: PictureResult, picture: Picture, wanted: Preprocessing, hide: str = NOTHING, **places: Any
) -> dict[str, PictureResult]:
    """The picture of ``first`` once more with something changed, by the name of what; nothing where nothing is.

    Args:
        first: what the picture's engine says of it under the model's own preprocessing.
        picture: its engine's look the second one is as well, unless mean or std is another: those are part of an
            engine, so it is eager fp32's.
        wanted: the preprocessing.
        hide: which patches: NOTHING, MOST, LEAST or WINDOW.
        places: how many, or where, see ``patches_to_hide``.
    """
    engine, model, data, file, content = picture
    own, names = model.info.preprocessing, names_of(model.info, data)
    if wanted == own and hide == NOTHING:
        return {}
    said, pixels, seen = [], first.pixels, first.rollout
    if (wanted.crop_mode, wanted.crop_pct) != (own.crop_mode, own.crop_pct):
        said.append(f"{wanted.crop_mode} crop {wanted.crop_pct:g}")
    if (wanted.mean, wanted.std) != (own.mean, own.std):
        model = with_preprocessing(model, wanted)
        engine = reference_of(model)
        said += [f"mean {wanted.mean[0]:g} std {wanted.std[0]:g}", f"answered by {EAGER}"]
    if wanted != own:
        pixels = crop_picture(file, content, wanted)
    if hide != NOTHING:
        if wanted != own and hide != WINDOW:
            seen = rollout(model, attention_maps(model, pixels[None]))[0]
        hidden = patches_to_hide(model, seen, hide, **places)
        pixels = mask_patches(model, pixels, hidden)
        said.append(f"{len(hidden)} patches hidden")
    return {f"changed: {', '.join(said)}": look_at(engine, model, pixels, names)}


def patches_to_hide(
    model: Model, seen: torch.Tensor | None, hide: str, patches: int, down: tuple[int, int], across: tuple[int, int]
) -> list[tuple[int, int]]:
    """The (row, column) of what ``second_look`` hides.

    Args:
        model: whose patches.
        seen: float32[rows, columns], the rollout; not needed for WINDOW.
        hide: MOST, LEAST or WINDOW.
        patches: how many of them for MOST and LEAST.
        down: from where to where in the height for WINDOW, in %.
        across: the same in the width.
    """
    rows, columns = patch_grid(model)
    if hide == WINDOW:
        return [(row, column) for row in _share(rows, down) for column in _share(columns, across)]
    order = most_looked_at(seen)
    return (order if hide == MOST else order[::-1])[:patches]


def _share(count: int, percent: tuple[int, int]) -> range:
    return range(int(count * percent[0] / 100), ceil(count * percent[1] / 100))
