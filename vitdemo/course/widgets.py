"""The course's widgets: each a thin skin over functions that a notebook can call as well."""

import io
from html import escape
from pathlib import Path

import ipywidgets as widgets
import pandas as pd

from vitdemo.benchmarking.choice import choose_engine
from vitdemo.benchmarking.pairs import NULL_ENGINE, choose_pairs
from vitdemo.benchmarking.tables import published_performance, styled
from vitdemo.course import view
from vitdemo.course.figures import architecture_of, measured_and_published
from vitdemo.course.panel import Panel, html_of, image_html
from vitdemo.dataset.dataset import Dataset
from vitdemo.dataset.decoding import CROP_MODES, image_facts
from vitdemo.dataset.samples import Sample, UnreadableFile
from vitdemo.engines.contract import find_engines
from vitdemo.errors import VitdemoError
from vitdemo.paths import MODELS
from vitdemo.plots.benchmarking import plot_latency_throughput, plot_speedups
from vitdemo.plots.dataset import short_names, thumbnail

ALL = "all"
TABLE, LATENCY, SPEEDUPS = "table", "latency and throughput", "speedups over eager"
STYLE = {"description_width": "initial"}
WIDE, NARROW, ONE_LINE = (widgets.Layout(width=width) for width in ("24em", "14em", "max-content"))
BUTTONS = {"layout": ONE_LINE, "style": {"button_width": "auto"}}


def image_explorer(
    data: Dataset,
    model: str = "vit_shapes20",
    engine: str = "eager",
    precision: str = "fp32",
    calibration: Path | str | None = None,
) -> Panel:
    """A picture of ``data``, of another data set, or uploaded, through a model in an engine and a precision.

    Shown: the top-5, the rollout, and both under another preprocessing or with patches hidden (``second_look``); the
    attention block by block (``plot_blocks``); or the images that two engines see most differently
    (``disagreements``). The first draws within a third of a second for vit_shapes20, once it is loaded.

    Args:
        data: the data set that it opens with.
        model: the name that it opens with, as in ``load_model``.
        engine: the engine that it opens with.
        precision: the precision that it opens with.
        calibration: images for int8, as in ``convert``.

    Raises:
        VitdemoError: for an engine or a precision that there is not.
    """
    controls = _controls(data, model, engine, precision)

    def keep_precisions(_) -> None:
        controls["precision"].options = tuple(find_engines()[controls["engine"].value].answers())

    def show_upload(change) -> None:
        if change["new"]:
            controls["picture"].value = view.UPLOAD

    def show_data(_) -> None:
        controls["picture"].value = view.DATA
        controls["upload"].value = ()  # else the same file, uploaded once more, would be no change

    controls["engine"].observe(keep_precisions, "value")
    controls["upload"].observe(show_upload, "value")
    controls["index"].observe(show_data, "value")
    lines = (
        ("data", "picture", "index", "upload"),
        ("model", "engine", "precision"),
        ("show", "against", "among"),
        ("scaling", "crop", "crop_pct"),
        ("hide", "patches", "down", "across"),
    )
    return Panel(controls, view.ImageView(data, calibration).draw, lines)


def _controls(data: Dataset, model: str, engine: str, precision: str) -> dict[str, widgets.Widget]:
    """The image explorer's, in three groups: the picture, the engines, and what is changed."""
    engines = {name: cls for name, cls in find_engines().items() if name != NULL_ENGINE}
    others = list(map(str, choose_pairs(None)))
    if engine not in engines or precision not in engines[engine].answers():
        raise VitdemoError(f"{engine}:{precision}: no such engine; there are {', '.join(others)}")
    choices = tuple(engines[engine].answers())
    beside = next(name for name in others if name != f"{engine}:{precision}")
    slide = dict(continuous_update=False, style=STYLE)
    typed = slide | {"layout": WIDE}
    crops, shows = (view.AS_TRAINED, *CROP_MODES), (view.ANSWER, view.BLOCKS, view.TWO_ENGINES)
    hides = view.NOTHING, view.MOST, view.LEAST, view.WINDOW
    return {
        "data": widgets.Text(str(data.path), description="data set", **typed),
        "picture": widgets.ToggleButtons(options=(view.DATA, view.UPLOAD), description="from", **BUTTONS),
        "index": widgets.BoundedIntText(0, 0, 10**7, description="image", layout=NARROW, continuous_update=True),
        "upload": widgets.FileUpload(accept="image/*", description="Upload, up to 10 MB", layout=ONE_LINE),
        "model": widgets.Combobox(value=model, options=tuple(MODELS), description="model", **typed),
        "engine": widgets.Dropdown(options=tuple(engines), value=engine, description="engine", layout=NARROW),
        "precision": widgets.Dropdown(options=choices, value=precision, description="precision", layout=NARROW),
        "show": widgets.ToggleButtons(options=shows, description="show", **BUTTONS),
        "against": widgets.Dropdown(options=others, value=beside, description="beside", layout=NARROW),
        "among": widgets.BoundedIntText(64, 1, 10**7, description="images", layout=NARROW),
        "scaling": widgets.Dropdown(options=tuple(view.SCALINGS), description="mean and std", style=STYLE),
        "crop": widgets.Dropdown(options=crops, description="crop", layout=WIDE),
        "crop_pct": widgets.FloatSlider(0.9, min=0.3, max=1.0, step=0.05, description="crop_pct", **slide),
        "hide": widgets.Dropdown(options=hides, description="hide", layout=WIDE),
        "patches": widgets.IntSlider(40, 1, 196, description="patches", **slide),
        "down": widgets.IntRangeSlider(value=(25, 75), min=0, max=100, step=5, description="window down, %", **slide),
        "across": widgets.IntRangeSlider(value=(25, 75), min=0, max=100, step=5, description="across, %", **slide),
    }


def benchmark_explorer(rows: pd.DataFrame, published: pd.DataFrame | None = None) -> Panel:
    """Measured rows, as ``benchmark`` or ``merge`` gives them, beside published ones: a table, or one of two figures.

    Above it the engine that ``choose_engine`` names of the measured rows, for a latency and a loss of accuracy.

    Args:
        rows: as ``benchmark`` or ``merge`` gives them.
        published: as ``published_performance()`` gives them, which is the default.
    """
    published = published_performance() if published is None else published
    table = measured_and_published(rows, published)
    models = list(dict.fromkeys(table["model"]))
    controls = {
        "model": widgets.Dropdown(options=models, description="model", layout=WIDE),
        "show": widgets.ToggleButtons(options=(TABLE, LATENCY, SPEEDUPS), description="show", **BUTTONS),
        "precision": widgets.Dropdown(options=(ALL, *dict.fromkeys(table["precision"])), description="precision"),
        "batch": widgets.Dropdown(options=(ALL, *sorted(map(int, set(table["batch"])))), description="batch"),
        "budget_ms": widgets.BoundedFloatText(100.0, min=0.1, max=1e6, description="at most, ms", style=STYLE),
        "loss": widgets.BoundedFloatText(1.0, min=0, max=100, step=0.1, description="top-1 lost, %", style=STYLE),
    }

    def draw(_, *, model: str, show: str, precision: str, batch: object, budget_ms: float, loss: float) -> str:
        own = rows[architecture_of(rows) == model]
        chosen = f"<p>{escape(_choice(own, budget_ms, loss))}</p>"
        if show == TABLE:
            shown = _only(table[table["model"] == model], precision, batch).drop(columns="model")
            look = "max-height: 32em; overflow: auto; line-height: 1.2"
            return f'{chosen}<div style="{look}">{styled(shown).to_html()}</div>'
        theirs = published[published["model"] == model]
        own = _only(own, precision, batch)
        figure = plot_latency_throughput(own) if show == LATENCY else plot_speedups(own, theirs)
        return chosen + html_of(figure, f"{show}: {model}")

    return Panel(controls, draw, (("model", "show"), ("precision", "batch"), ("budget_ms", "loss")))


def _only(table: pd.DataFrame, precision: str, batch: object) -> pd.DataFrame:
    """The rows of a precision and a batch size."""
    table = table if precision == ALL else table[table["precision"] == precision]
    return table if batch == ALL else table[table["batch"] == batch]


def _choice(rows: pd.DataFrame, budget_ms: float, loss: float) -> str:
    what = f"of all precisions and batches, within {budget_ms:g} ms and with at most {loss:g} % of top-1 lost"
    try:
        best = choose_engine(rows, budget_ms, loss / 100)
    except VitdemoError as error:
        return f"{what}: none ({error})" if len(rows) else "of this model nothing was measured here"
    found = f"{best['engine']} {best['precision']}, batch {best['batch']}, {best['images_per_s']:.1f} images/s"
    return f"{what}: {found} on {best['machine']}; {best['accuracy']}"


def dataset_browser(data: Dataset, per_page: int = 12) -> Panel:
    """The images of a data set, by class and page by page, with what their files say (``browse``).

    Args:
        data: the data set.
        per_page: images on a page.
    """
    classes = [(ALL, None), *((name, label) for label, name in enumerate(short_names(data)))]
    controls = {
        "label": widgets.Dropdown(options=classes, description="class", layout=WIDE),
        "page": widgets.BoundedIntText(1, 1, pages_of(data, None, per_page), description="page", layout=NARROW),
    }

    def first_page(_) -> None:
        controls["page"].value = 1
        controls["page"].max = pages_of(data, controls["label"].value, per_page)

    def draw(_, *, label: int | None, page: int) -> str:
        shown = browse(data, label, page, per_page)
        tiles = shown[["index", "class"]].itertuples(index=False, name=None)
        pictures = "".join(_tile(data, index, name) for index, name in tiles)
        facts = shown.to_html(index=False, border=0)
        pages = f"<p>page {page} of {pages_of(data, label, per_page)}</p>"
        return f'{pages}<div style="display: flex; flex-wrap: wrap; gap: 8px">{pictures}</div>{facts}'

    controls["label"].observe(first_page, "value")
    return Panel(controls, draw, (("label", "page"),))


def _tile(data: Dataset, index: int, name: str) -> str:
    small = io.BytesIO()
    picture = thumbnail(sample_of(data, index).image)
    picture.resize((120, 120)).save(small, "JPEG", quality=85)
    caption = f'<figcaption style="width: 120px; font-size: 80%">{index}: {escape(name)}</figcaption>'
    image = image_html(small.getvalue(), "jpeg", f"image {index}, {name}")
    return f'<figure style="margin: 0">{image}{caption}</figure>'


# A page of a data set: which images, and what their files say of themselves.


def pages_of(data: Dataset, label: int | None = None, per_page: int = 12) -> int:
    """How many pages ``browse`` has; at least 1."""
    return max(1, -(-len(_chosen(data, label)) // per_page))


def browse(data: Dataset, label: int | None = None, page: int = 1, per_page: int = 12) -> pd.DataFrame:
    """A page of the images of a class, or of all.

    Args:
        data: the data set.
        label: the class's index; None is all of them.
        page: which one, from 1.
        per_page: images on a page.

    Returns:
        One row per image, in the data set's order: index, class (its first name), and the columns of ``image_facts``.

    Raises:
        VitdemoError: for a page that is not there.
    """
    pages = pages_of(data, label, per_page)
    if not 1 <= page <= pages:
        raise VitdemoError(f"page {page}: there are 1 to {pages}")
    indices = _chosen(data, label)[(page - 1) * per_page : page * per_page]
    names = short_names(data)
    table = image_facts([sample_of(data, i) for i in indices])
    table.insert(0, "index", indices)
    table.insert(2, "class", [names[data.labels[i]] for i in indices])
    return table


def _chosen(data: Dataset, label: int | None) -> list[int]:
    return [i for i, own in enumerate(data.labels) if label is None or own == label]


def sample_of(data: Dataset, i: int) -> Sample:
    """``data[i]``, without bytes where the disk does not give them."""
    try:
        return data[i]
    except UnreadableFile as unreadable:
        return unreadable.sample
