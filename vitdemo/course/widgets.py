"""The image explorer: controls, and next to them the picture that their values give, drawn between two cells."""

import asyncio
import io
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from html import escape
from pathlib import Path
from threading import current_thread, main_thread

import ipywidgets as widgets
import matplotlib.pyplot as plt
from IPython.display import Javascript, display

from vitdemo.benchmarking.pairs import NULL_ENGINE, choose_pairs
from vitdemo.course import view
from vitdemo.dataset.dataset import Dataset
from vitdemo.dataset.decoding import CROP_MODES
from vitdemo.engines.contract import find_engines
from vitdemo.errors import VitdemoError, reason_of
from vitdemo.machine import now
from vitdemo.paths import MODELS

REST_S = 0.02  # how long the controls must rest: of a rapid series of changes only the last is drawn
# JupyterLab takes arrows and letters for its shortcuts (x cuts a cell), also in a control, unless it is told not to.
OWN_KEYS = """setTimeout(() =>  // once the output is on the page
    element.closest('.jp-OutputArea')?.addEventListener('focusin', event =>
        event.target.setAttribute('data-lm-suppress-shortcuts', 'true')), 100)"""


class Panel(widgets.HBox):
    """Controls, and next to them the picture of their values, drawn when displayed and after each change.

    An error is one line above the picture, and the last picture stays. The thread that made the panel draws, which in
    a kernel is the main one, between two cells: JupyterLab may report a control's change in another thread (a
    subshell), while a cell runs. So no thread is left behind, and of several changes that arrive during a drawing only
    the last is drawn. Interrupting the kernel stops the drawing.

    Args:
        controls: by their names, from the top.
        draw: called as ``draw(say, **values)``, with the controls' values by their names; gives HTML. ``say(text)``
            puts a line above it.
    """

    def __init__(self, controls: dict[str, widgets.Widget], draw: Callable[..., str]):
        self.controls, self._draw, self._due, self._loop = controls, draw, None, _running_loop()
        self._interruptible = False
        self.status, self.shown = widgets.HTML(), widgets.HTML()
        column = widgets.VBox([*controls.values()], layout=widgets.Layout(flex="0 0 20em"))
        beside = widgets.VBox([self.status, self.shown], layout=widgets.Layout(flex="1 1 24em", min_width="0"))
        super().__init__([column, beside], layout=widgets.Layout(flex_flow="row wrap"))
        for control in controls.values():
            control.observe(self._changed, "value")

    def _changed(self, _) -> None:
        self.say("working …")
        if self._loop is None:  # no kernel
            self.refresh()
        elif self._loop is _running_loop():
            self._wait_for_rest()
        else:
            self._loop.call_soon_threadsafe(self._wait_for_rest)

    def _wait_for_rest(self) -> None:
        if self.comm is None:  # closed meanwhile
            return
        if self._due:
            self._due.cancel()
        self._due = self._loop.call_later(REST_S, self._refresh_between_cells)

    def _refresh_between_cells(self) -> None:
        if current_thread() is not main_thread():  # where no signals arrive
            return self.refresh()
        before = signal.signal(signal.SIGINT, self._interrupt)  # a kernel ignores it between its cells
        try:
            with suppress(KeyboardInterrupt):  # the line has said so
                self._interruptible = True
                self.refresh()
                self._interruptible = False
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, *_) -> None:
        """Once, and only where it is caught: outside it would end the kernel."""
        if self._interruptible:
            self._interruptible = False
            raise KeyboardInterrupt

    def refresh(self) -> None:
        """Draw now. Called by itself when it is displayed and after a change; in a cell that sets a value, by you."""
        if self._due:
            self._due.cancel()
        self._due, start = None, now()
        self.say("working …")
        below = " (below: what was drawn before)" if self.shown.value else ""
        open_figures = set(plt.get_fignums())
        try:
            values = {name: control.value for name, control in self.controls.items()}
            # Engines say what they build. Interactive figures would be shown, and closed, by a subshell's next message.
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), plt.ioff():
                self.shown.value = self._draw(self.say, **values)
            self.say(f"done in {1e3 * (now() - start):.0f} ms")
        except Exception as error:  # whatever a runtime raises: a traceback would end up where nobody sees it
            self.say(f"✗ {reason_of(error)}{below}")
        except KeyboardInterrupt:
            self.say(f"✗ stopped; change something to go on{below}")
            raise
        finally:
            for number in set(plt.get_fignums()) - open_figures:
                plt.close(number)

    def _ipython_display_(self, **_) -> None:
        display(self._repr_mimebundle_(), raw=True)
        display(Javascript(OWN_KEYS))
        if not self.shown.value:  # now that what it says meanwhile can be read
            self.refresh()

    def close(self) -> None:
        """Take it off the page, with all that is in it."""
        if self._due:
            self._due.cancel()
        for box in self.children:
            for control in box.children:
                control.close()
            box.close()
        super().close()

    def say(self, text: str) -> None:
        """Put one line above what is shown."""
        self.status.value = f"<span>{escape(text)}</span>"


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """This thread's."""
    with suppress(RuntimeError):  # there is none
        return asyncio.get_running_loop()
    return None


def image_explorer(
    data: Dataset,
    model: str = "vit_shapes20",
    engine: str = "eager",
    precision: str = "fp32",
    calibration: Path | str | None = None,
) -> Panel:
    """A picture of ``data``, of another data set, or uploaded, through a model in an engine and a precision.

    Shown: the top-5 and the rollout, and next to them both under another preprocessing or with patches hidden
    (``second_look``); the attention block by block (``plot_blocks``); or the images that two engines see most
    differently (``disagreements``). Of the controls those are there that count. The first draws within a third of a
    second for vit_shapes20, once it is loaded.

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

    def show_data(_) -> None:
        controls["upload"].value = ()  # and the same file, uploaded once more, is a change

    def show_those_that_count(_=None) -> None:
        values = {name: control.value for name, control in controls.items()}
        for name, control in controls.items():
            control.layout.display = None if view.counts(name, values) else "none"

    controls["engine"].observe(keep_precisions, "value")
    controls["index"].observe(show_data, "value")
    for name in ("show", "crop", "hide"):
        controls[name].observe(show_those_that_count, "value")
    show_those_that_count()
    return Panel(controls, view.ImageView(data, calibration).draw)


def _controls(data: Dataset, model: str, engine: str, precision: str) -> dict[str, widgets.Widget]:
    """The image explorer's, in three groups: the picture, the engines, and what is changed."""
    engines = {name: cls for name, cls in find_engines().items() if name != NULL_ENGINE}
    others = list(map(str, choose_pairs(None)))
    if engine not in engines or precision not in engines[engine].answers():
        raise VitdemoError(f"{engine}:{precision}: no such engine; there are {', '.join(others)}")
    choices = tuple(engines[engine].answers())
    beside = next(name for name in others if name != f"{engine}:{precision}")
    crops, shows = (view.AS_TRAINED, *CROP_MODES), (view.ANSWER, view.BLOCKS, view.TWO_ENGINES)
    hides = view.NOTHING, view.MOST, view.LEAST, view.WINDOW
    late = {"continuous_update": False}
    controls = {
        "data": widgets.Text(str(data.path), description="data set", **late),
        "index": widgets.BoundedIntText(0, 0, 10**7, description="image", continuous_update=True),
        "upload": widgets.FileUpload(accept="image/*", description="Upload, up to 10 MB"),
        "model": widgets.Combobox(value=model, options=tuple(MODELS), description="model", **late),
        "engine": widgets.Dropdown(options=tuple(engines), value=engine, description="engine"),
        "precision": widgets.Dropdown(options=choices, value=precision, description="precision"),
        "show": widgets.Dropdown(options=shows, description="show"),
        "against": widgets.Dropdown(options=others, value=beside, description="compare with"),
        "among": widgets.BoundedIntText(64, 1, 10**7, description="images"),
        "scaling": widgets.Dropdown(options=tuple(view.SCALINGS), description="mean and std"),
        "crop": widgets.Dropdown(options=crops, description="crop"),
        "crop_pct": widgets.FloatSlider(0.9, min=0.3, max=1.0, step=0.05, description="crop_pct", **late),
        "hide": widgets.Dropdown(options=hides, description="hide"),
        "patches": widgets.IntSlider(40, 1, 196, description="patches", **late),
        "down": widgets.IntRangeSlider(value=(25, 75), min=0, max=100, step=5, description="down, %", **late),
        "across": widgets.IntRangeSlider(value=(25, 75), min=0, max=100, step=5, description="across, %", **late),
    }
    for control in controls.values():
        control.layout.width = "auto"
        if hasattr(control.style, "description_width"):  # a button has no words before it
            control.style.description_width = "7em"
    return controls
