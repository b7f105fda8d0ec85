"""The times that learners and teachers are told are those of the notebooks' texts, and the agendas add up."""

import re

import pytest

from tests.notebooks.times import EXERCISE, KIT, NOTEBOOKS, ROW, TOP, by_section, minutes_of, read

SLACK = 4  # minutes: a sentence more or less does not turn a time that is rounded to five
AGENDA = re.compile(r"^\| (\d+):(\d\d) \| (\d+) \| (.+?) \| *(\d*) *\| *(\d*) *\| (\d+) \|$", re.MULTILINE)
PART = re.compile(r"`(\w+)`(?:, sections? (\d(?:[\d, and]*\d)?))?(?:, (exercises?))?")  # of a notebook


def near(said: str, minutes: float) -> bool:
    return int(said) % 5 == 0 and abs(int(said) - minutes) <= SLACK


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_promises_the_time_that_its_text_takes(name):
    notebook = read(name)
    told = TOP.search(notebook.cells[0].source)
    assert told, "its top says: **It takes** N minutes to read, M for the exercise, …"
    computed = minutes_of(notebook)
    assert all(map(near, told.groups(), computed)), f"{computed}: run python -m tests.notebooks.times"
    (line,) = re.findall(rf"^\| \[{name}\].+$", KIT.read_text(encoding="utf-8"), re.MULTILINE)
    assert ROW.search(line).groups() == told.groups(), "the kit's table"


def test_a_longer_text_takes_longer():
    notebook = read("00_tour")
    before = minutes_of(notebook)
    notebook.cells[3].source += " word" * 180
    notebook.cells[4].source += "\nplot_gallery(images)"
    after = minutes_of(notebook)
    assert after[0] - before[0] == pytest.approx(1 + 25 / 60) and after[1] == before[1]
    (solution,) = [cell for cell in notebook.cells if "solution" in cell.metadata.get("tags", [])]
    solution.source += "\nanother_line = None"
    assert minutes_of(notebook)[0] == after[0] and minutes_of(notebook)[1] == after[1] + 1


def agendas() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", KIT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {title: text for title, text in zip(parts[1::2], parts[2::2], strict=True) if AGENDA.search(text)}


@pytest.mark.parametrize("title", agendas())
def test_an_agenda_adds_up(title):
    rows = AGENDA.findall(agendas()[title])
    begins = [60 * int(hour) + int(minute) for hour, minute, *_ in rows]
    ends = [begin + int(row[2]) for begin, row in zip(begins, rows, strict=True)]
    assert ends[:-1] == begins[1:] and f"It ends at {ends[-1] // 60}:{ends[-1] % 60:02}." in agendas()[title]
    assert all(int(last) == sum(int(part or 0) for part in parts) for _, _, last, _, *parts in rows)


@pytest.mark.parametrize("title", agendas())
def test_an_agenda_leaves_the_time_that_its_sections_take(title):
    planned = [row for row in AGENDA.findall(agendas()[title]) if re.match(r"`\d\d_", row[3])]
    assert planned
    for _, _, _, what, reading, exercise, _ in planned:
        name, chosen, told = PART.match(what).groups()
        numbers, whole = set(re.findall(r"\d+", chosen or "")), not chosen
        sections = by_section(read(name))
        assert whole or numbers <= {title.split(".")[0] for title in sections}, f"{what}: no such section"
        taken = [
            minutes
            for title, minutes in sections.items()
            if whole or not title or title.split(".")[0] in numbers or (told and title == EXERCISE)
        ]
        computed = [sum(each) for each in zip(*taken, strict=True)]
        planned_min = int(reading), int(exercise or 0)
        assert all(abs(a - b) <= SLACK for a, b in zip(planned_min, computed, strict=True)), (what, computed)
