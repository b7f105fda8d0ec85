"""Student copies: the course without its solutions, whose exercises fail with a hint and pass with the solutions."""

import ast
import errno
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.notebooks.exercises import exercises, names_read, needed
from vitdemo.course import choose_notebooks, workshop, write_workshop
from vitdemo.course.kernels import MARK, TOKEN, OwnKernel, end_processes
from vitdemo.course.notebooks import PROFILES
from vitdemo.errors import VitdemoError
from vitdemo.paths import REPOSITORY

COURSE = REPOSITORY / "notebooks"
LESSONS = [lesson.name for lesson in choose_notebooks()]
QUICK = {"00_tour", "01_dataset"}


def read(path):
    return nbformat.read(path, as_version=4)


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    folder = tmp_path_factory.mktemp("room") / "students"
    write_workshop(folder)
    return folder


def test_a_copy_is_the_lesson_without_its_solutions(students):
    assert sorted(path.stem for path in students.glob("*.ipynb")) == LESSONS
    for name in LESSONS:
        lesson = read(COURSE / f"{name}.ipynb")
        kept = [cell for cell in lesson.cells if not {"solution", "about-solutions"} & set(tags(cell))]
        copied = read(students / f"{name}.ipynb")
        (parameters,) = [cell for cell in kept if "parameters" in tags(cell)]
        lines = parameters.source.splitlines()
        parameters.source = "\n".join(line for line in lines if not line.startswith("solve = "))
        assert copied.cells == kept and len(kept) < len(lesson.cells) and copied.metadata == lesson.metadata
    assert sorted(path.name for path in students.iterdir() if path.suffix != ".ipynb") == ["README.md", "img"]


def test_a_copy_does_not_speak_of_what_it_does_not_have(students):
    for name in LESSONS:
        texts = [cell.source for cell in read(students / f"{name}.ipynb").cells]
        assert [text for text in texts if re.search(r"solution|folded|three dots|\bsolve\b", text)] == [], name


def test_the_copies_have_a_readme_of_their_own_which_names_each_and_nothing_of_the_teacher_s(students):
    text = (students / "README.md").read_text()
    assert re.findall(r"\((\w+)\.ipynb\)", text) == LESSONS
    for name in LESSONS:
        assert read(students / f"{name}.ipynb").cells[0].source.splitlines()[0].removeprefix("# ") in text
    assert [word for word in ("solution", "agenda", "minutes", "git clone") if word in text.lower()] == []


def test_pictures_and_links_of_the_copies_lie_beside_them(students):
    for path in [*students.glob("*.ipynb"), students / "README.md"]:
        text = "\n".join(cell.source for cell in read(path).cells) if path.suffix == ".ipynb" else path.read_text()
        links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#"))]
        assert [link for link in links if ".." in link or not (students / link).is_file()] == [], path.name


def test_what_a_session_left_in_the_course_is_not_copied(tmp_path):
    lesson = read(COURSE / "00_tour.ipynb")
    lesson.metadata["widgets"] = {"state": {}}
    for cell in lesson.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text="64 are the same")], 1
    nbformat.write(lesson, tmp_path / "00_tour.ipynb")
    copied = workshop._without_solutions(tmp_path / "00_tour.ipynb")
    assert "widgets" not in copied.metadata and "64 are the same" not in nbformat.writes(copied)


def test_a_folder_that_holds_something_is_refused_and_the_course_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in COURSE.rglob("*") if path.is_file()}
    for folder in (tmp_path, COURSE, tmp_path / "notes.txt"):
        with pytest.raises(VitdemoError, match=f"{folder}: already holds something"):
            write_workshop(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert {path: path.read_bytes() for path in COURSE.rglob("*") if path.is_file()} == before


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    written, writes = [], nbformat.writes

    def fills_the_disk(notebook):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(notebook)
        return writes(notebook)

    monkeypatch.setattr(workshop.nbformat, "writes", fills_the_disk)
    with pytest.raises(VitdemoError, match="the disk is full"):
        write_workshop(tmp_path / "students")
    assert [path for path in tmp_path.rglob("*") if path.name != "students"] == []
    monkeypatch.undo()
    assert len(write_workshop(tmp_path / "students")) == len(LESSONS)  # the same command again
    assert [path.name for path in tmp_path.iterdir()] == ["students"]


def test_an_interruption_leaves_nothing_and_a_stick_counts_as_empty(tmp_path, monkeypatch):
    (tmp_path / ".Trashes").mkdir()
    (tmp_path / "System Volume Information").mkdir()
    before, rename = sorted(tmp_path.iterdir()), Path.rename

    def interrupted(self, target):
        if self.name == "03_single_device.ipynb" and target.parent == tmp_path:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_workshop(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.undo()
    assert len(write_workshop(tmp_path)) == len(LESSONS)


class Sitting:
    """A student's copy in a kernel of its own, of which only those cells run that an exercise needs."""

    def __init__(self, path, out):
        self.copy, self.ran = read(path), set()
        self.cells = {cell.id: cell for cell in self.copy.cells if cell.cell_type == "code"}
        (parameters,) = [cell for cell in self.cells.values() if "parameters" in tags(cell)]
        given = PROFILES["smoke"] | {"out": str(out)}
        lines = [f"{name} = {value!r}" for name, value in given.items() if f"\n{name} = " in parameters.source]
        lines.append("solve = True")  # for the solutions that are pasted in
        parameters.source = "\n".join([parameters.source, *lines])
        place = {"metadata": {"path": str(path.parent)}}
        self.client = NotebookClient(self.copy, kernel_manager_class=OwnKernel, resources=place)

    def run(self, cell):
        self.client.execute_cell(cell, self.copy.cells.index(cell))
        self.ran.add(cell.id)

    def prepare(self, stub, code: str):
        """Run what ``code``, to be pasted into ``stub``, needs of the cells above."""
        above = list(self.cells.values())[: list(self.cells).index(stub.id)]
        for cell in needed(above, names_read(ast.parse(code))):
            if cell.id not in self.ran:
                self.run(cell)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.soak) for n in LESSONS])
def test_exercises_fail_with_their_hint_and_pass_with_the_solution_pasted_in(name, students, tmp_path, monkeypatch):
    monkeypatch.setattr(OwnKernel, "environment", {MARK: TOKEN})
    sitting = Sitting(students / f"{name}.ipynb", tmp_path / "out")
    try:
        with sitting.client.setup_kernel():
            for parts in exercises(read(COURSE / f"{name}.ipynb")):
                solution = "\n".join(cell.source for cell in parts[1])
                stub, check = sitting.cells[parts[0].id], sitting.cells[parts[2].id]
                sitting.prepare(stub, f"{solution}\n{check.source}")
                sitting.run(stub)
                with pytest.raises(CellExecutionError, match="not done yet: "):
                    sitting.run(check)
                stub.source += f"\n{solution}"
                sitting.run(stub)
                sitting.run(check)
    finally:
        end_processes()
