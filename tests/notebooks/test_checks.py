"""Every check in a notebook passes on the real thing and fails when its subject is broken."""

import pytest

from tests.notebooks.breaks import BREAKS, NOTEBOOKS, checks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_check_has_ways_to_break_its_subject(path):
    assert len(BREAKS[path.stem]) == len(checks(path)) and all(BREAKS[path.stem])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_check_catches_what_it_is_there_for(broken_checks, path):
    ends = {line["check"]: line["ends"] for line in broken_checks if line["notebook"] == path.stem}
    assert ends == {number: ["AssertionError"] * len(breaks) for number, breaks in enumerate(BREAKS[path.stem])}
