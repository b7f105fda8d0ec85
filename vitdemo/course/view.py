"""What the image explorer shows: one picture, one model, an engine or two, loaded when first asked for."""

from collections.abc import Callable
from dataclasses import replace
from html import escape
from math import ceil
from pathlib import Path

import pandas as pd
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vitdemo.benchmarking.pairs import EAGER, Pair
from vitdemo.course.attention import attention_maps, mask_patches, most_looked_at, patch_grid, rollout
from vitdemo.course.figures import plot_blocks, plot_disagreements, plot_looks
from vitdemo.course.looks import PictureResult, disagreements, look_at, names_of, reference_of, with_preprocessing
from vitdemo.course.panel import html_of
from vitdemo.dataset.decoding import Preprocessing, crop_picture
from vitdemo.dataset.imagenet import ImageNetVal
from vitdemo.engines.artifacts import convert
from vitdemo.engines.contract import Engine
from vitdemo.errors import VitdemoError
from vitdemo.models.model import Model, load_model, shapes_of
from vitdemo.plots.dataset import short_names
from vitdemo.verification.comparison import compare_answers

OWN = "as the weights want it"
ANSWER, BLOCKS, TWO_ENGINES = "answer", "block by block", "two engines"
DATA, UPLOAD = "data set", "upload"
AS_TRAINED = "the weights' own"
SCALINGS = {
    AS_TRAINED: {},
    "ImageNet's": {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD},
    "0.5 and 0.5": {"mean": (0.5,) * 3, "std": (0.5,) * 3},
    "none (0 and 1)": {"mean": (0.0,) * 3, "std": (1.0,) * 3},
}
NOTHING, MOST, LEAST, WINDOW = "nothing", "what is looked at most", "what is looked at least", "a window"

KEPT_ENGINES = 3  # each holds its weights
Say = Callable[[str], None]


class ImageView:
    """Holds what took long to get: the data set, the model and its engines, and the last look and comparison."""

    def __init__(self, data: ImageNetVal, calibration: Path | str | None = None):
        self._calibration = calibration
        self._data = {str(data.path): data}
        self._models: dict[str, Model] = {}
        self._engines: dict[Pair, Engine] = {}
        self._looked: dict[tuple, PictureResult] = {}
        self._drawn: tuple[str, PictureResult | None, str] = ("", None, "")  # the first look, its file and its HTML
        self._uploaded: tuple = ()
        self._compared: dict[tuple, pd.DataFrame] = {}

    def data(self, path: str, say: Say) -> ImageNetVal:
        if path not in self._data:
            say(f"opening {path} …")
            self._data = {path: ImageNetVal(path, progress=False)}
        return self._data[path]

    def model(self, name: str, say: Say) -> Model:
        if name not in self._models:
            say(f"loading {name} …")
            shapes_of(name)  # a mistyped name says so, and costs nothing of what is loaded
            self._models, self._engines, self._looked, self._compared = {}, {}, {}, {}  # before the next takes room
            self._models[name] = load_model(name)
        return self._models[name]

    def engine(self, model: Model, pair: Pair, say: Say) -> Engine:
        if pair not in self._engines:
            say(f"getting {pair} of {model.info.tag} ready; building it takes seconds to minutes, once …")
            kept = list(self._engines.items())[1 - KEPT_ENGINES :]
            self._engines = {**dict(kept), pair: convert(model, *pair, calibration=self._calibration)}
        return self._engines[pair]

    def draw(self, say: Say, *, data: str, model: str, engine: str, precision: str, show: str, **rest) -> str:
        """HTML of what the controls ask for; their names are the arguments."""
        self._uploaded = rest["upload"] or self._uploaded
        images, vit = self.data(data, say), self.model(model, say)
        pair = Pair(engine, precision)
        if show == TWO_ENGINES:
            return self._engines_apart(images, vit, pair, rest["against"], rest["among"], say)
        file, content, truth = picture_of(images, rest["picture"], rest["index"], self._uploaded)
        names, ready = names_of(vit.info, images), self.engine(vit, pair, say)
        first = self._first_look(ready, vit, images, file, content)
        changed = second_look(first, ready, vit, file, content, names, **_asked(rest))
        head = f"<p>{escape(file)}{escape(truth)}. Answered by {pair}; attention: {EAGER}.</p>"
        if show == BLOCKS:
            how, last = next(iter(changed.items()), (OWN, first))
            text = f"attention of the class token, block by block: {file}, {how}"
            return head + f"<p>{escape(how)}</p>" + html_of(plot_blocks(vit, last), text)
        blue = first.top5["class"].iloc[0]
        drawn_file, drawn, html = self._drawn
        if drawn is not first or drawn_file != file:  # it is drawn once for all that is changed beside it
            html = look_html(OWN, first, file, blue)
            self._drawn = file, first, html
        return head + html + "".join(look_html(name, look, file, blue) for name, look in changed.items())

    def _first_look(self, engine: Engine, vit: Model, images: ImageNetVal, file: str, content: bytes) -> PictureResult:
        key = engine, images.path, content  # the classes' names are the data set's
        if key not in self._looked:
            pixels = crop_picture(file, content, vit.info.preprocessing)
            self._looked = {key: look_at(engine, vit, pixels, names_of(vit.info, images))}
        return self._looked[key]

    def _engines_apart(self, images: ImageNetVal, vit: Model, pair: Pair, against: str, among: int, say: Say) -> str:
        other = Pair(*against.split(":"))
        if other == pair:
            raise VitdemoError(f"two engines: {pair} is the one above; choose another beside it")
        key = images.path, pair, other, among
        engines = [self.engine(vit, each, say) for each in (other, pair)]
        if key not in self._compared:
            say(f"comparing {other} with {pair} on {min(among, len(images))} images …")
            self._compared = {key: disagreements(*engines, images, limit=among, progress=False)}
        table = self._compared[key]
        same = int((table["candidate"] == table["reference"]).sum())
        text = f"{other} gives the answer of {pair} for {same} of {len(table)} images; furthest apart are these."
        if vit.info.classes == tuple(images.classes):
            counts = compare_answers(table)
            text += f" Only {pair} is right {counts['worse']} times, only {other} {counts['better']} times."
        figure = plot_disagreements(table, images, names_of(vit.info, images))
        return f"<p>{escape(text)}</p>" + html_of(figure, text)


def look_html(name: str, look: PictureResult, file: str, blue: int) -> str:
    """``plot_looks`` of one look, with its answers in words."""
    top = (f"{row.answer} {row.probability:.1%}" for row in look.top5.itertuples())
    alt = f"{file}, {name}: {', '.join(top)}; the attention rollout over it"
    return f"<div>{html_of(plot_looks({name: look}, blue), alt)}</div>"


def picture_of(images: ImageNetVal, picture: str, index: int, upload: tuple) -> tuple[str, bytes, str]:
    """File name, bytes, and what it is, where that is known. Raises VitdemoError where nothing was uploaded yet."""
    if picture == UPLOAD:
        if not upload:
            raise VitdemoError("upload: no picture yet; press Upload and choose a file")
        return upload[0]["name"], bytes(upload[0]["content"]), ""
    if index >= len(images):
        raise VitdemoError(f"image {index}: the data set has 0 to {len(images) - 1}")
    sample = images[index]
    return sample.file, sample.jpeg, f", is: {short_names(images)[sample.label]}"


def second_look(
    first: PictureResult,
    engine: Engine,
    model: Model,
    file: str,
    content: bytes,
    names: list[str] | None,
    *,
    preprocessing: dict,
    hide: str,
    patches: int,
    down: tuple[int, int],
    across: tuple[int, int],
) -> dict[str, PictureResult]:
    """The picture of ``first`` once more with something changed, by the name of what; nothing where nothing is.

    preprocessing: what to replace in the weights' own. hide: which patches; ``patches`` of them, or those of a window
    of ``down`` and ``across``, in % of the sides. It is ``engine``'s look, unless mean or std is another: those are
    part of an engine, so it is eager fp32's.
    """
    own = model.info.preprocessing
    changed, pixels, seen = replace(own, **preprocessing), first.pixels, first.rollout
    if changed == own and hide == NOTHING:
        return {}
    said = _said(own, changed)
    if (changed.mean, changed.std) != (own.mean, own.std):
        model = with_preprocessing(model, changed)
        engine = reference_of(model)
        said.append(f"answered by {EAGER}")
    if changed != own:
        pixels = crop_picture(file, content, changed)
    if hide != NOTHING:
        if changed != own and hide != WINDOW:
            seen = rollout(model, attention_maps(model, pixels[None]))[0]
        places = patches_to_hide(model, seen, hide, patches, down, across)
        pixels = mask_patches(model, pixels, places)
        said.append(f"{len(places)} patches hidden")
    return {f"changed: {', '.join(said)}": look_at(engine, model, pixels, names)}


def patches_to_hide(
    model: Model, seen: torch.Tensor | None, hide: str, patches: int, down: tuple[int, int], across: tuple[int, int]
) -> list[tuple[int, int]]:
    """The (row, column) of what ``second_look`` hides; arguments as there, and ``seen``, the rollout."""
    rows, columns = patch_grid(model)
    if hide == WINDOW:
        return [(row, column) for row in _share(rows, down) for column in _share(columns, across)]
    order = most_looked_at(seen)
    return (order if hide == MOST else order[::-1])[:patches]


def _share(count: int, percent: tuple[int, int]) -> range:
    return range(int(count * percent[0] / 100), ceil(count * percent[1] / 100))


def _said(own: Preprocessing, changed: Preprocessing) -> list[str]:
    said = []
    if (changed.crop_mode, changed.crop_pct) != (own.crop_mode, own.crop_pct):
        said.append(f"{changed.crop_mode} crop {changed.crop_pct:g}")
    if (changed.mean, changed.std) != (own.mean, own.std):
        said.append(f"mean {changed.mean[0]:g} std {changed.std[0]:g}")
    return said


def _asked(values: dict) -> dict:
    """The arguments of ``second_look`` among the controls' values."""
    preprocessing = dict(SCALINGS[values["scaling"]])
    if values["crop"] != AS_TRAINED:
        preprocessing |= {"crop_mode": values["crop"], "crop_pct": values["crop_pct"]}
    return {"preprocessing": preprocessing} | {name: values[name] for name in ("hide", "patches", "down", "across")}
