"""The lessons in JupyterLab, as a learner walks through them."""

import json
import re

import nbformat
import pytest
from playwright.sync_api import expect

from tests.browser.looks import hard_to_read
from tests.notebooks.exercises import exercises
from vitdemo.course.notebooks import NOTEBOOKS, choose_notebooks

OURS = ".jp-OutputArea-output, .jp-RenderedMarkdown"  # what the notebook shows, without JupyterLab's own parts
BROKEN_IMAGES = "images => images.filter(image => !image.naturalWidth).map(image => image.src)"
# Wrong answers to the exercises of the lessons that a course begins and ends with, as learners give them.
WRONG = {
    "00_tour": ["singly, same = batched, 64"],
    "01_dataset": ["index_of_id = {1: 0, 2: 1, 3: 2}", "still_right = 50_000"],
    "06_explore": ['suspects = {"run A": "wrong mean and std"}', 'stays = {"most": 1.0, "least": 0.0}'],
    "07_your_own": ['right_map, equal = "sorted", 20'],
}


def newest_results(lab, name: str):
    return max(lab.results.glob(f"{name}-*"), key=lambda folder: folder.stat().st_mtime)


def assert_walked_to_its_end(lesson):
    """Every code cell ran, none failed, every picture is there, and all of it can be read in both themes."""
    assert lesson.errors() == []
    lesson.unfold()
    prompts = lesson.notebook.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
    assert prompts == [f"[{number}]:" for number in range(1, len(prompts) + 1)]
    assert lesson.notebook.locator("img").evaluate_all(BROKEN_IMAGES) == []
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        lesson.use_theme(theme)
        assert hard_to_read(lesson.page, OURS) == [], theme


def test_the_tour_is_walked_to_its_end(open_lesson, lab):
    lesson = open_lesson("00_tour")
    lesson.run_all()
    lesson.wait_until_done()
    assert_walked_to_its_end(lesson)
    metrics = json.loads((newest_results(lab, "00_tour") / "evaluation" / "metrics.json").read_text())
    assert metrics["images"] == 96
    assert f"top-1 {metrics['top1']:.1%} ({metrics['correct']}/96" in lesson.text("evaluation = evaluate(")
    for source in ("plot_gallery(images", "plot_predictions(", "plot_mistakes("):
        ((width, height),) = lesson.pictures(source)
        assert width > 600 and height > 200, source


def test_a_solution_is_folded_until_it_is_clicked(open_lesson):
    lesson = open_lesson("00_tour")
    solution = lesson.notebook.get_by_text("device_batch_size=1, limit=64")
    expect(lesson.folded).to_have_count(1)
    expect(solution).to_have_count(0)
    lesson.unfold()
    expect(solution).to_be_visible()


def test_an_exercise_that_waits_stops_the_run_and_the_end_says_so(open_lesson):
    lesson = open_lesson("00_tour", solve=False)
    lesson.run_all()
    lesson.wait_until_done()
    (line,) = lesson.errors()
    assert line.strip().startswith("✗ exercise 1 of 1: not done yet: `singly` is None") and "\n" not in line.strip()
    expect(lesson.prompt("finish(")).to_have_text("[ ]:")
    assert lesson.text("finish(") == ""


@pytest.mark.soak
@pytest.mark.parametrize("name", WRONG)
def test_each_exercise_is_done_wrong_and_then_right(open_lesson, name):
    lesson = open_lesson(name, solve=False)
    lesson.run_all()
    lesson.wait_until_done()
    parts = exercises(nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4))
    for k, ((stub, (solution,), check), wrong) in enumerate(zip(parts, WRONG[name], strict=True), 1):
        waits = f"✗ exercise {k} of {len(parts)}: not done yet"
        assert [line.strip()[: len(waits)] for line in lesson.errors()] == [waits]
        first, seen = stub.source.splitlines()[0], lesson.prompt(check.source)
        for answer, verdict in (wrong, "✗"), (f"{stub.source}\n{solution.source.replace('solve', 'True')}", "✓"):
            before = re.escape(seen.inner_text())
            lesson.rewrite(first, answer)
            first = answer.splitlines()[0]
            expect(seen).to_have_text(re.compile(rf"^(?!{before})\[\d+\]:$"), timeout=300_000)
            said = lesson.text(check.source).strip()
            assert said.startswith(f"{verdict} exercise {k} of {len(parts)}: ") and "\n" not in said, said
            assert "not done yet" not in said
    lesson.wait_until_done()
    assert lesson.errors() == [] and lesson.text("finish(").startswith("✓")


def test_a_restart_of_the_kernel_in_the_middle_costs_nothing_but_time(open_lesson, lab):
    lesson = open_lesson("00_tour", limit=300)
    lesson.run_all()
    expect(lesson.prompt("engine = convert(")).to_have_text(re.compile(r"\d"))
    expect(lesson.prompt('check("00_tour"')).to_have_text("[*]:")
    lesson.restart_and_run_all()
    lesson.wait_until_done()
    assert_walked_to_its_end(lesson)
    assert json.loads((newest_results(lab, "00_tour") / "evaluation" / "metrics.json").read_text())["images"] == 300


@pytest.mark.soak
@pytest.mark.parametrize("name", [lesson.name for lesson in choose_notebooks() if lesson.name != "00_tour"])
def test_every_lesson_is_walked_to_its_end(open_lesson, lab, name):
    lesson = open_lesson(name)
    lesson.run_all()
    lesson.wait_until_done(900)
    assert_walked_to_its_end(lesson)
    if name == "04_data_parallel":  # its section 5 kills a replica, its last cell stops Ray
        assert "replicas lost: 1" in lesson.text('print(f"replicas lost')
        assert [process.name() for process in lab.processes() if "ray" in process.name()] == []
