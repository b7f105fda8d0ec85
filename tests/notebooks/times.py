"""How long a notebook takes to read and to do, from what is in it: ``python -m tests.notebooks.times`` writes it anew.

It writes the times at the tops of the notebooks and in the table of ``notebooks/README.md``, and prints them, also by
section, for the agendas there.
"""

import re
from collections import defaultdict
from pathlib import Path

import nbformat

from tests.notebooks.exercises import exercises

FOLDER = Path(__file__).parents[2] / "notebooks"
KIT = FOLDER / "README.md"
NOTEBOOKS = {path.stem: path for path in sorted(FOLDER.glob("[0-9]*.ipynb"))}
WORDS_PER_MINUTE, CODE_LINE_S, FIGURE_S = 180, 5, 20
THINKING_S, ANSWER_LINE_S = 300, 60  # of an exercise, and of each line of its solution
DRAWS = re.compile(r"\b(?:plot_\w+|image_explorer)\(")
PICTURE = re.compile(r"!\[.*?\]\(.*?\)")
EXERCISE, UNREAD = "Exercise", "If something went wrong"  # a table to look things up in, which nobody reads through
TOP = re.compile(r"(?<=\*\*It takes\*\* )(\d+) minutes to read, (\d+) for the exercises?(?=,)")
ROW = re.compile(r"(?<=\| )(\d+) min \| (\d+) min(?= \|)")


def read(name: str):
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def words_min(text: str) -> float:
    words = re.findall(r"\w\S*", PICTURE.sub("", text))
    return len(words) / WORDS_PER_MINUTE + FIGURE_S * len(PICTURE.findall(text)) / 60


def by_section(notebook) -> dict[str, list[float]]:
    """Minutes to read each section, by its title, and minutes for the exercises in it; the opening's title is ""."""
    found, title = defaultdict(lambda: [0.0, 0.0]), ""
    answers = {stub.id: sum(len(cell.source.splitlines()) for cell in cells) for stub, cells, _ in exercises(notebook)}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text, *rest = re.split(r"^## (.+)$", cell.source, flags=re.MULTILINE)
            found[title][0] += words_min(text)
            for title, text in zip(rest[::2], rest[1::2], strict=True):  # a cell may end one section and begin the next
                found[title][0] += words_min(text)
        elif "solution" not in cell.metadata.get("tags", []):
            lines = [line for line in cell.source.splitlines() if line.strip()]
            found[title][0] += (CODE_LINE_S * len(lines) + FIGURE_S * len(DRAWS.findall(cell.source))) / 60
        if cell.id in answers:
            found[title][1] += (THINKING_S + ANSWER_LINE_S * answers[cell.id]) / 60
    found.pop(UNREAD, None)
    return dict(found)


def minutes_of(notebook) -> list[float]:
    """Minutes to read all of it but the table of symptoms, and for its exercises."""
    return [sum(each) for each in zip(*by_section(notebook).values(), strict=True)]


def rounded(minutes: float) -> int:
    """To five minutes, and at least five."""
    return 5 * max(1, round(minutes / 5))


if __name__ == "__main__":
    kit = KIT.read_text(encoding="utf-8")
    for name, path in NOTEBOOKS.items():
        notebook = read(name)
        reading, exercise = map(rounded, minutes_of(notebook))
        top, more = notebook.cells[0], "s" if len(exercises(notebook)) > 1 else ""
        top.source = TOP.sub(f"{reading} minutes to read, {exercise} for the exercise{more}", top.source)
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        line = next(line for line in kit.splitlines() if line.startswith(f"| [{name}]"))
        kit = kit.replace(line, ROW.sub(f"{reading} min | {exercise} min", line))
        print(f"{name}: {reading} to read, {exercise} for the exercises")
        for title, (reading_min, exercise_min) in by_section(notebook).items():
            print(f"    {reading_min:4.1f} {exercise_min:4.0f}  {title or 'the opening'}")
    KIT.write_text(kit, encoding="utf-8")
