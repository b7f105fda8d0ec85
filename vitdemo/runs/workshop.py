"""Student copies of the notebooks: the course without its solutions, to be handed out."""

import os
import shutil
from pathlib import Path

import nbformat

from vitdemo.errors import named_errors
from vitdemo.paths import PART, claim_folder
from vitdemo.runs.plan import NOTEBOOKS, choose_notebooks

README = "README.md"


def write_workshop(out: Path | str) -> list[Path]:
    """Write the notebooks without their solutions into ``out``, with their pictures and README; the copies' paths.

    A copy keeps each exercise's empty cell and its check, and no output of a session. It runs in any folder, with the
    library and the data of this clone. ``out`` is new or empty, and gets all of it or nothing; the course's own
    notebooks are only read. Raises VitdemoError for an ``out`` that holds something, and for what cannot be read or
    written.
    """
    lessons, out = choose_notebooks(), Path(out).resolve()
    part = out.with_name(f".{out.name}.{os.getpid()}{PART}")
    try:
        with named_errors(out):
            claim_folder(out)
            shutil.copytree(NOTEBOOKS / "img", part / "img", ignore=shutil.ignore_patterns(".*"))
            shutil.copy(NOTEBOOKS / README, part)
            for lesson in lessons:
                text = nbformat.writes(_without_solutions(lesson.path)) + "\n"
                (part / lesson.path.name).write_text(text, encoding="utf-8")
            os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return [out / lesson.path.name for lesson in lessons]


def _without_solutions(path: Path):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "solution" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata.pop("widgets", None)
    return notebook
