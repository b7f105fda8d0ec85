"""Each notebook as it stands in git: the anatomy of a lesson, and nothing that only one machine has."""

import ast
import importlib
import re
from inspect import getfullargspec
from pathlib import Path

import nbformat
import pytest

from tests.notebooks.exercises import PARTS, answers_of, exercises, names_given
from vitdemo.course.exercises import EXERCISES

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
FRONTS = ("vitdemo", "vitdemo.imagenet", "vitdemo.plots", "vitdemo.course")
MOST_LINES, MOST_COLUMNS = 15, 110  # what a page of the report shows without scrolling
SECTIONS = ["## Exercise", "## If something went wrong", "## Summary"]
PROMISES = ["You will learn", "You need", "It takes"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=nbformat.NO_CONVERT)


def tagged(notebook, tag: str) -> list:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(notebook) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def python_of(cell) -> ast.Module:
    """The cell's syntax tree; IPython's magics and shell lines, which Python cannot parse, left out."""
    return ast.parse("\n".join("" if line.lstrip()[:1] in "%!" else line for line in cell.source.splitlines()))


def test_is_a_valid_notebook_with_cell_ids(notebook):
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    nbformat.validate(notebook)
    assert all(cell.source.strip() for cell in notebook.cells), "an empty cell"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_written_as_jupyter_writes_it(path):
    """One source line a line, so that a diff shows what changed and a save in JupyterLab changes nothing else."""
    text = path.read_text(encoding="utf-8")
    assert text == nbformat.writes(nbformat.reads(text, nbformat.NO_CONVERT)) + "\n", "run `make notebooks`"


def test_keeps_its_kernelspec_and_nothing_of_a_session(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None, cell.source


def test_has_one_cell_of_literal_parameters_with_a_comment_each(notebook):
    (cell,) = tagged(notebook, "parameters")
    lines = cell.source.splitlines()
    names = []
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name), ast.unparse(statement)
        ast.literal_eval(statement.value)
        names.append(statement.targets[0].id)
        assert re.search(r"\s#\s*\S", lines[statement.end_lineno - 1]), f"{names[-1]} has no comment behind it"
    assert "out" in names and len(set(names)) == len(names)


def test_says_what_it_leaves_behind(notebook):
    said = notebook.metadata.vitdemo
    assert said.artefacts and all(isinstance(name, str) and not name.startswith("/") for name in said.artefacts)
    assert isinstance(said.get("min_images", 0), int)
    assert isinstance(said.get("needs", []), list)
    assert set(said) <= {"artefacts", "min_images", "needs"}, "a misspelt key would be ignored"


def test_begins_with_a_question_and_what_it_promises(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# .+\?$", first.source.splitlines()[0]), "the title is a question"
    opening = text_of(notebook).split("\n## ")[0]
    assert [promise for promise in PROMISES if promise not in opening] == []


def test_has_the_sections_of_a_lesson_in_order(notebook):
    headings = re.findall(r"^#{1,6} .+$", text_of(notebook), re.MULTILINE)
    assert [heading for heading in headings if heading in SECTIONS] == SECTIONS
    assert sum(heading.startswith("# ") for heading in headings) == 1, "one title"


def test_each_exercise_is_a_stub_a_solution_and_a_check_in_this_order(notebook):
    tags = [[tag for tag in PARTS if tag in cell.metadata.get("tags", [])] for cell in notebook.cells]
    assert all(len(some) <= 1 for some in tags)
    assert all(cell.cell_type == "code" for part in PARTS for cell in tagged(notebook, part))
    order = "".join(f"{tag} " for some in tags for tag in some)
    assert re.fullmatch(r"(check )*(exercise (solution )+(check )+)+", order), order
    heads = [next(i for i, cell in enumerate(notebook.cells) if s in cell.source.splitlines()) for s in SECTIONS]
    section = tags[heads[0] : heads[1]]
    assert ["exercise"] in section and ["check"] in section


def test_solutions_are_folded(notebook):
    for cell in notebook.cells:
        hidden = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        assert hidden == ("solution" in cell.metadata.get("tags", [])), cell.source


def test_a_learner_s_own_answer_is_what_goes_on(notebook):
    for stub, solutions, check in exercises(notebook):
        assert all(re.fullmatch(r"\w+ = None", ast.unparse(line)) for line in ast.parse(stub.source).body), stub.source
        assert "#" in stub.source, f"says nothing of what to write: {stub.source}"
        filled = set()
        for statement in [statement for cell in solutions for statement in python_of(cell).body]:
            given = names_given(statement) & answers_of(stub)
            guard = ast.unparse(statement.test) if isinstance(statement, ast.If) else ""
            assert guard.startswith("solve") or not given, f"solves without being told to:\n{ast.unparse(statement)}"
            assert given <= {guard.removeprefix("solve and ").removesuffix(" is None")}, (
                f"overwrites an answer:\n{ast.unparse(statement)}"
            )
            filled |= given
        assert filled == answers_of(stub), "the solution leaves an answer out"
        assert not names_given(python_of(check)) & answers_of(stub), f"overwrites an answer:\n{check.source}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_check_of_an_exercise_is_the_library_s_and_holds_no_answer(path):
    found = exercises(nbformat.read(path, as_version=nbformat.NO_CONVERT))
    assert len(found) == len(EXERCISES[path.stem])
    for number, ((stub, _, check), expect) in enumerate(zip(found, EXERCISES[path.stem], strict=True), 1):
        (statement,) = python_of(check).body
        assert ast.unparse(statement).startswith(f"check({path.stem!r}, {number}, "), check.source
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in statement.value.keywords}
        arguments = getfullargspec(expect)
        assert set(given) == {*arguments.args, *arguments.kwonlyargs}
        assert {given[name] for name in arguments.args} == set(arguments.args) == answers_of(stub)


def test_a_check_that_passes_says_so(notebook):
    of_exercises = [check.id for *_, check in exercises(notebook)]
    for cell in tagged(notebook, "check"):
        if cell.id not in of_exercises:
            last = ast.unparse(python_of(cell).body[-1])
            assert last.startswith("print(") and "✓" in last, cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_wait_unless_told_otherwise_and_the_end_counts_them(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    (cell,) = tagged(notebook, "parameters")
    assert "\nsolve = False  # " in cell.source
    assert [cell.source for cell in code_cells(notebook) if "finish(" in cell.source] == [f'finish("{path.stem}")']
    assert "Summary" in text_of(notebook).split("\n## ")[-1] and "finish(" in notebook.cells[-1].source


def test_a_guess_is_optional_and_held_against_what_comes_out(notebook):
    """Read from the top: each guess is compared before the next one is made."""
    turns = ""
    for cell in code_cells(notebook):
        turns += "?" * bool(re.search(r"^my_guess = None  # .+\?$", cell.source, re.MULTILINE))
        turns += "!" * ("compare_guess(my_guess, " in cell.source)
    sections = len(re.findall(r"^## \d+\. ", text_of(notebook), re.MULTILINE))
    assert re.fullmatch(r"(\?!)+", turns) and len(turns) // 2 >= sections // 2, turns


def test_its_code_cells_are_short(notebook):
    for cell in code_cells(notebook):
        assert max(map(len, cell.source.splitlines())) <= MOST_COLUMNS, cell.source
        if not {"parameters", "solution"} & set(cell.metadata.get("tags", [])):
            lines = [line for line in cell.source.splitlines() if line.strip()]
            assert 1 <= len(lines) <= MOST_LINES, cell.source


def test_names_no_absolute_path(notebook):
    for cell in code_cells(notebook):
        texts = [node.value for node in ast.walk(python_of(cell)) if isinstance(node, ast.Constant)]
        absolute = [text for text in texts if isinstance(text, str) and re.match(r"[/~]\w|[A-Za-z]:[\\/]", text)]
        assert absolute == [], cell.source
    links = re.findall(r"\]\((?:/|file:|~)[^)]*\)", text_of(notebook))
    assert links == []


def test_takes_from_vitdemo_what_its_front_shows(notebook):
    for cell in code_cells(notebook):
        for node in ast.walk(python_of(cell)):
            if isinstance(node, ast.Import):
                assert not [name.name for name in node.names if name.name.startswith("vitdemo.")], cell.source
            elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "vitdemo":
                assert node.module in FRONTS, cell.source
                shown = importlib.import_module(node.module).__all__
                assert [name.name for name in node.names if name.name not in shown] == [], cell.source
