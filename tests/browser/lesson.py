"""A notebook open in JupyterLab, and what a learner does with it."""

from playwright.sync_api import Locator, Page, expect

from tests.browser.lab import Lab

LESSON_S = 600  # a notebook under the profile `smoke`, on a machine that has much else to do
TRACEBACK = '[data-mime-type="application/vnd.jupyter.error"]'
# An error that renders itself in one line, as an exercise's does, is shown like text on stderr.
STDERR, ONE_LINE = '[data-mime-type="application/vnd.jupyter.stderr"]', "✗ exercise"

# The last code cell has run, or an error above it has ended the run.
DONE = f"""() => /\\d/.test([...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].at(-1).textContent)
              || document.querySelector('{TRACEBACK}')
              || [...document.querySelectorAll('{STDERR}')].some(said => said.textContent.includes('{ONE_LINE}'))"""


class Lesson:
    """The notebook in ``file`` of ``lab``, open in ``page`` with a kernel."""

    def __init__(self, page: Page, lab: Lab, file: str):
        self.page, self.lab = page, lab
        page.goto(f"{lab.url}/lab/tree/{file}?token={lab.token}&reset")
        self.notebook = page.locator(".jp-NotebookPanel:visible")
        self._wait_until_idle()

    def _wait_until_idle(self) -> None:
        """JupyterLab asks which kernel to take when cells are run before one has come up."""
        kernel = self.page.locator("#jp-main-statusbar").get_by_text("Python 3 (ipykernel) | Idle")
        expect(kernel).to_be_visible()

    def _choose(self, menu: str, *entries: str) -> None:
        self.page.get_by_role("menubar").get_by_role("menuitem", name=menu, exact=True).click()
        for entry in entries:
            self.page.locator(".lm-Menu:visible .lm-Menu-itemLabel").get_by_text(entry, exact=True).click()

    def run_all(self) -> None:
        """Menu Run, Run All Cells."""
        self._choose("Run", "Run All Cells")

    def restart_and_run_all(self) -> None:
        """Menu Kernel, Restart Kernel and Run All Cells…, and yes."""
        self._choose("Kernel", "Restart Kernel and Run All Cells…")
        self.page.locator(".jp-Dialog").get_by_role("button", name="Confirm Kernel Restart").click()

    def rewrite(self, source: str, text: str) -> None:
        """Type ``text`` into the cell that holds ``source``, in place of all of it, and run it and all below it."""
        self.cell(source).locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+A")
        self.page.keyboard.insert_text(text)
        self._choose("Run", "Run Selected Cell and All Below")

    def use_theme(self, theme: str) -> None:
        """Menu Settings, Theme; "JupyterLab Light" or "JupyterLab Dark"."""
        self._choose("Settings", "Theme", theme)
        dark = str("Dark" not in theme).lower()
        expect(self.page.locator("body")).to_have_attribute("data-jp-theme-light", dark)

    def wait_until_done(self, timeout_s: float = LESSON_S) -> None:
        """Wait for the last cell that runs, or for the first error."""
        self.page.wait_for_function(DONE, timeout=timeout_s * 1000)
        self._wait_until_idle()

    @property
    def folded(self) -> Locator:
        """What stands in the place of each folded cell's source."""
        return self.notebook.locator(".jp-InputPlaceholder .jp-Placeholder-content")

    def unfold(self) -> None:
        """Click each solution open."""
        for _ in range(self.folded.count()):
            self.folded.first.click()
        expect(self.folded).to_have_count(0)

    def errors(self) -> list[str]:
        """The tracebacks that the notebook shows, and the lines by which exercises have stopped it."""
        lines = self.notebook.locator(STDERR).filter(has_text=ONE_LINE)
        return [*self.notebook.locator(TRACEBACK).all_text_contents(), *lines.all_text_contents()]

    def cell(self, source: str) -> Locator:
        """The code cell that holds ``source``."""
        return self.notebook.locator(".jp-CodeCell").filter(has=self.page.locator(".jp-InputArea", has_text=source))

    def text(self, source: str) -> str:
        """What the code cell that holds ``source`` has printed."""
        return "\n".join(self.cell(source).locator(".jp-OutputArea-output").all_text_contents())

    def prompt(self, source: str) -> Locator:
        """``[*]:`` while the cell that holds ``source`` runs or waits, ``[7]:`` when it has run."""
        return self.cell(source).locator(".jp-InputPrompt")

    def widget(self, source: str, label: str) -> Locator:
        """The control labelled ``label`` that the cell which holds ``source`` shows."""
        return self.cell(source).locator(".jp-OutputArea").get_by_label(label, exact=True)

    def choose(self, select: Locator, option: str) -> None:
        """Move a dropdown to ``option``, with the arrow keys alone."""
        options = [text.replace("\xa0", " ") for text in select.locator("option").all_text_contents()]
        select.focus()
        steps = options.index(option) - select.evaluate("select => select.selectedIndex")
        for _ in range(abs(steps)):
            self.page.keyboard.press("ArrowDown" if steps > 0 else "ArrowUp")

    def pictures(self, source: str) -> list[tuple[int, int]]:
        """Width and height in pixels of the figures that the cell which holds ``source`` has drawn."""
        images = self.cell(source).locator(".jp-OutputArea-output img")
        return images.evaluate_all("images => images.map(image => [image.naturalWidth, image.naturalHeight])")
