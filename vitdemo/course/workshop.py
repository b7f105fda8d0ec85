"""Student copies of the notebooks: the course without its solutions, to be handed out."""

import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbconvert.preprocessors import ClearOutputPreprocessor, TagRemovePreprocessor

from vitdemo.course.notebooks import NOTEBOOKS, choose_notebooks
from vitdemo.errors import named_errors
from vitdemo.paths import PART, claim_folder, user_path


def write_workshop(out: Path | str) -> list[Path]:
    """Write the notebooks without their solutions into ``out``, with their pictures and a README; the copies' paths.

    A copy keeps each exercise's empty cell and its check, and has neither words about solutions (cells tagged
    `about-solutions`, the parameter ``solve``) nor outputs of a session. It runs in any folder, with the
    library and the data of this clone. The course's own notebooks are only read.

    Args:
        out: a new or empty folder (a stick, say), which gets all of it or nothing.

    Raises:
        VitdemoError: for an ``out`` that holds something, and for what cannot be read or written.
    """
    lessons, out = choose_notebooks(), claim_folder(user_path(out).resolve())
    with named_errors(out), TemporaryDirectory(dir=out, prefix=".", suffix=PART) as folder:
        part = Path(folder)
        (part / "img").mkdir()
        for picture in (NOTEBOOKS / "img").glob("[!.]*"):
            shutil.copy(picture, part / "img")
        shutil.copy(NOTEBOOKS / "students.md", part / "README.md")
        for lesson in lessons:
            text = nbformat.writes(_without_solutions(lesson.path)) + "\n"
            (part / lesson.path.name).write_text(text, encoding="utf-8")
        with ExitStack() as back:  # after Ctrl-C too
            for path in sorted(part.iterdir()):
                moved = path.rename(out / path.name)
                back.callback(moved.rename, path)
            back.pop_all()
    return [out / lesson.path.name for lesson in lessons]


def _without_solutions(path: Path):
    notebook = nbformat.read(path, as_version=4)
    remove = TagRemovePreprocessor(remove_cell_tags=["solution", "about-solutions"], enabled=True)
    for step in (remove, ClearOutputPreprocessor()):
        notebook, _ = step.preprocess(notebook, {})
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = re.sub(r"^solve = .*\n", "", cell.source, flags=re.MULTILINE)
    notebook.metadata.pop("widgets", None)
    return notebook
