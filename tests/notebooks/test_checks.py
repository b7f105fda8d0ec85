"""Every check in a notebook passes on the real thing and fails when its subject is broken."""

import nbformat
import pytest

from tests.notebooks.breaks import BREAKS, NOTEBOOKS, checks
from tests.notebooks.exercises import exercises


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_check_has_ways_to_break_its_subject(path):
    assert len(BREAKS[path.stem]) == len(checks(path)) and all(BREAKS[path.stem])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_check_catches_what_it_is_there_for(broken_checks, path):
    ends = {line["check"]: line["ends"] for line in broken_checks if line["notebook"] == path.stem}
    assert {number: len(tried) for number, tried in ends.items()} == dict(enumerate(map(len, BREAKS[path.stem])))
    noticed = ("AssertionError: ", "ExerciseError: ✗ exercise ")
    assert [end for tried in ends.values() for end in tried if not end.startswith(noticed)] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_wrong_answer_to_an_exercise_gets_a_hint(broken_checks, path):
    of_exercises = [check.source for *_, check in exercises(nbformat.read(path, as_version=4))]
    for line in broken_checks:
        if line["notebook"] == path.stem and checks(path)[line["check"]] in of_exercises:
            assert any(": hint: " in end for end in line["ends"]), line["ends"]
