"""The HTML report of ``vitdemo run``: a page for each notebook, and an index with what came out and the figures."""

import base64
import io
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2
import nbformat
from markupsafe import Markup, escape
from nbconvert import HTMLExporter
from PIL import Image

from vitdemo.course.notebooks import heading
from vitdemo.machine import describe_machine, machine_record
from vitdemo.paths import replacing

HERE = Path(__file__).parent
THUMBNAIL_PX = (440, 300)  # twice the size shown, for screens with dense pixels
LIVE = {"application/vnd.jupyter.widget-view+json", "application/javascript"}
PANEL = "(controls to move: open the notebook in JupyterLab)\n"


def write_page(executed: Path, notebooks: Path) -> None:
    """Write a notebook as HTML next to it; the page needs no network.

    Args:
        executed: the notebook with its outputs.
        notebooks: the folder that the pictures in its text are relative to.
    """
    content = nbformat.read(executed, as_version=4)
    for alt, _, output in _pictures(content):
        output.metadata["alt"] = alt
    content.metadata.pop("widgets", None)
    for cell in content.cells:
        # A live widget needs a kernel and a script from the network, and the text in its place is a bar at 0 %. Where
        # vitdemo's own controls were, a line says so.
        if "outputs" in cell:
            words = any(output.get("data", {}).get("text/plain", "").startswith("Panel(") for output in cell.outputs)
            cell.outputs = [output for output in cell.outputs if LIVE.isdisjoint(output.get("data", {}))]
            if words:
                cell.outputs.append(nbformat.v4.new_output("stream", name="stdout", text=PANEL))
        if cell.cell_type == "markdown":  # a link to another notebook leads to its page
            cell.source = re.sub(r"(\]\([\w-]+)\.ipynb\b", r"\1.html", cell.source)
    content.cells.insert(0, nbformat.v4.new_markdown_cell("[All notebooks](index.html)"))
    exporter = HTMLExporter(template_name="page", extra_template_basedirs=[str(HERE)], embed_images=True)
    html, _ = exporter.from_notebook_node(content, {"metadata": {"name": executed.stem, "path": str(notebooks)}})
    with replacing(executed.with_suffix(".html")) as file:
        file.write(html)


def _pictures(content) -> Iterator[tuple[str, str, dict]]:
    """Alt text, cell id and output of each PNG: the output's own alt, the cell's, or the heading above."""
    above = ""
    for cell in content.cells:
        above = heading(cell) or above
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                said = output.metadata.get("image/png", {}).get("alt") or output.metadata.get("alt")
                yield said or cell.metadata.get("alt") or above, cell.id, output


def _thumbnail(png: str) -> str:
    """A small one of a picture in base64, as a data URI."""
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    picture.thumbnail(THUMBNAIL_PX)
    small = io.BytesIO()
    picture.save(small, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(small.getvalue()).decode()


def write_index(results: Sequence, index: Path) -> None:
    """Write a run's first page: one row per notebook, then their figures.

    Args:
        results: of the notebooks, each a ``runner.Result``.
        index: the page to write; the executed notebooks lie next to it.
    """
    sections = []
    for result in results:
        executed = index.with_name(f"{result.name}.ipynb")
        ran = executed.exists()
        pictures = _pictures(nbformat.read(executed, as_version=4)) if ran else ()
        figures = [(_thumbnail(output.data["image/png"]), alt, cell_id) for alt, cell_id, output in pictures]
        sections.append((result, f"{result.name}.html" if ran else None, figures))
    counts, noun = Counter(result.status for result in results), "notebook" if len(results) == 1 else "notebooks"
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True)
    environment.filters["small_print"] = _small_print
    html = environment.get_template("report.html.j2").render(
        outcome=f"{len(results)} {noun}: {', '.join(f'{count} {status}' for status, count in counts.items())}",
        when=time.strftime("%Y-%m-%d %H:%M"),
        machine=describe_machine(machine_record()),
        sections=sections,
    )
    with replacing(index) as file:
        file.write(html)


def _small_print(text: str) -> Markup:
    """``81.2 (eager fp32)``: what is in parentheses on a line of its own."""
    return Markup(re.sub(r" \((.*)\)$", r" <span>\1</span>", str(escape(text))))
