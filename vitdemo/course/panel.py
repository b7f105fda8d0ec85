"""What all widgets here have in common: controls, a line that says what is done, and what came out."""

import asyncio
import base64
import io
import signal
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from html import escape
from threading import current_thread, main_thread

import ipywidgets as widgets
import matplotlib.pyplot as plt
from IPython.display import Javascript, display
from matplotlib.figure import Figure

from vitdemo.errors import reason_of
from vitdemo.machine import now

REST_S = 0.02  # how long the controls must rest: of a rapid series of changes only the last is drawn
DPI = 72
# JupyterLab takes arrows and letters for its shortcuts (x cuts a cell), also in a control, unless it is told not to.
OWN_KEYS = """setTimeout(() =>  // once the output is on the page
    element.closest('.jp-OutputArea')?.addEventListener('focusin', event =>
        event.target.setAttribute('data-lm-suppress-shortcuts', 'true')), 100)"""


class Panel(widgets.VBox):
    """Controls, and below them what is drawn of their values: when it is displayed, and anew whenever one changes.

    What goes wrong is said in a line above, and what was drawn last stays. It is drawn in the thread that made the
    panel, in a kernel the main one, between two cells: what JupyterLab reports of a control may come in a thread beside
    it (a subshell), while a cell runs. So no thread is left behind, and of all changes that come while something is
    drawn only the last is. Interrupting the kernel stops what is being drawn.

    Args:
        controls: by their names.
        draw: called as ``draw(say, **values)``, with the controls' values by their names; gives HTML. ``say(text)``
            puts a line above it.
        lines: the controls' names, one sequence per line.
    """

    def __init__(self, controls: dict[str, widgets.Widget], draw: Callable[..., str], lines: Sequence[Sequence[str]]):
        self.controls, self._draw, self._due, self._loop = controls, draw, None, _running_loop()
        self._interruptible = False
        self.status, self.shown = widgets.HTML(), widgets.HTML()
        wrapped = widgets.Layout(flex_flow="row wrap")
        boxes = [widgets.HBox([controls[name] for name in line], layout=wrapped) for line in lines]
        super().__init__([*boxes, self.status, self.shown])
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
            self._interruptible = True
            self.refresh()
            self._interruptible = False
        except KeyboardInterrupt:  # the line has said so
            pass
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
            for control in getattr(box, "children", ()):
                control.close()
            box.close()
        super().close()

    def say(self, text: str) -> None:
        """Put one line above what is shown."""
        self.status.value = f"<span>{escape(text)}</span>"


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """This thread's."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def html_of(figure: Figure, alt: str) -> str:
    """A figure as an HTML image; the figure is closed.

    Args:
        figure: matplotlib's.
        alt: its text for those who cannot see it.
    """
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI, pil_kwargs={"compress_level": 3})  # of 9: time before size
    plt.close(figure)
    return image_html(png.getvalue(), "png", alt)


def image_html(content: bytes, kind: str, alt: str) -> str:
    """An image's bytes as HTML.

    Args:
        content: the file.
        kind: "png" or "jpeg".
        alt: its text for those who cannot see it.
    """
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{escape(alt)}" style="max-width: 100%">'
