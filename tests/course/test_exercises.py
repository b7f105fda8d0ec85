"""The exercises' checks: right answers are said to be right, others stop the run in one line that says what to do."""

from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from vitdemo.course import check, compare_guess, exercises, finish
from vitdemo.course.exercises import STOPPED, ExerciseError
from vitdemo.course.kernels import OwnKernel
from vitdemo.dataset.devkit import devkit_of, read_devkit
from vitdemo.paths import data_path


@pytest.fixture(scope="module")
def devkit():
    return read_devkit(devkit_of(data_path("shapes20")))


@pytest.fixture(autouse=True)
def nothing_answered(monkeypatch):
    monkeypatch.setattr(exercises, "_right", set())


def indices(devkit) -> dict[int, int]:
    wnids = sorted(synset.wnid for synset in devkit.synsets)
    return {synset.id: wnids.index(synset.wnid) for synset in devkit.synsets if synset.id < 4}


def test_a_right_answer_is_said_to_be_right_and_counted(devkit, capsys):
    finish("01_dataset")
    check("01_dataset", 1, index_of_id=indices(devkit), devkit=devkit)
    finish("01_dataset")
    equal = sum(id - 1 == label for id, label in zip(devkit.ground_truth, devkit.labels, strict=True))
    check("01_dataset", 2, still_right=equal, devkit=devkit)
    finish("01_dataset")
    none, first, one, second, both = capsys.readouterr().out.splitlines()
    assert first.startswith("✓ exercise 1 of 2: right. ") and second.startswith("✓ exercise 2 of 2: right. ")
    assert f"{equal} of 1000 labels" in second
    assert (none, one) == ("✗ 01_dataset: 0 of 2 exercises right", "✗ 01_dataset: 1 of 2 exercises right")
    assert both == "✓ 01_dataset: 2 of 2 exercises right"


@pytest.mark.parametrize(
    "answer, said",
    [
        (None, "not done yet: `index_of_id` is None"),
        ({1: 0, 2: 1, 3: 2}, "hint: wrong for the IDs ["),
        ([5, 1, 7], "hint: a dict from ID to index"),
        (type("Odd", (), {"get": None})(), "hint: with your answer comes TypeError: 'NoneType' object is not callable"),
    ],
)
def test_another_answer_stops_in_one_line(devkit, answer, said, capsys):
    with pytest.raises(ExerciseError) as stopped:
        check("01_dataset", 1, index_of_id=answer, devkit=devkit)
    line = str(stopped.value)
    assert line.startswith(f"✗ exercise 1 of 2: {said}") and line.endswith(f"{STOPPED}.") and "\n" not in line
    assert capsys.readouterr().out == ""


def test_what_a_learner_s_function_raises_is_named():
    def predicted_ms(row):
        return row["batch_size"]

    with pytest.raises(ExerciseError, match="hint: with your answer comes KeyError: 'batch_size'"):
        check("05_benchmark", 1, predicted_ms=predicted_ms, bandwidth=1e10)


def test_a_column_of_comparisons_is_no_count():
    images = SimpleNamespace(files=[f"{i}.jpg" for i in range(64)])
    rows = pd.DataFrame({"file": images.files, "predicted_1": 3})
    batched = SimpleNamespace(rows=rows, metrics={"device_batch_size": 8, "images_per_s": 90.0})
    singly = SimpleNamespace(rows=rows, metrics={"device_batch_size": 1, "images_per_s": 50.0})
    given = dict(singly=singly, batched=batched, images=images)
    check("00_tour", 1, same=(rows["predicted_1"] == 3).sum(), **given)
    with pytest.raises(ExerciseError, match="row by row; count where it holds"):
        check("00_tour", 1, same=rows["predicted_1"] == 3, **given)


def test_a_guess_stands_next_to_what_came_out(capsys):
    compare_guess(None, "74%")
    compare_guess(80, "74%")
    assert capsys.readouterr().out.splitlines() == ["measured: 74%; no guess yet", "measured: 74%; your guess: 80"]


CHECK = """from vitdemo.course import check
class Devkit: synsets = []
check("01_dataset", 1, index_of_id=None, devkit=Devkit)"""


def test_a_notebook_stops_there_and_shows_one_line():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in (CHECK, "1")])
    with pytest.raises(CellExecutionError):
        NotebookClient(notebook, kernel_manager_class=OwnKernel).execute()
    stopped, below = notebook.cells
    (error,) = stopped.outputs
    assert error.traceback == [f"✗ exercise 1 of 2: not done yet: `index_of_id` is None. {STOPPED}."]
    assert below.execution_count is None


BUILD = """from vitdemo import convert, load_model
convert(load_model("vit_shapes20"), "openvino", "fp32", force=True);"""


def test_messages_of_builds_are_not_on_red_in_a_notebook():
    pytest.importorskip("openvino")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(BUILD)])
    NotebookClient(notebook, kernel_manager_class=OwnKernel).execute()
    said = [(output.name, output.text) for output in notebook.cells[0].outputs if output.output_type == "stream"]
    assert ("stdout", "building openvino fp32 of vit_shapes20, once\n") in said
