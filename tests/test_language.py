"""Plain English: habits of style that make a text hard to read, as far as a script can see them.

Read are the Markdown files, the notebooks' text, and the docstrings, comments and messages of the library.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator

import pytest

from vitdemo.paths import REPOSITORY

COUNTED = (
    r"rows?|lines?|files?|folders?|pages?|process(?:es)?|copy|copies|panels?|columns?|points?|curves?|calls?|images?|"
    r"words?|bytes|cores?|threads?|GPUs?|kernels?|bars?|sticks?|names?|labels?|outputs?|sizes?|seconds?|s|ms|minutes?|MB|GB"
)
EACH = (
    "row|line|file|folder|page|process|column|call|image|batch|model|engine|class|notebook|machine|layer|replica|round|"
    "run|sweep|person|topic|device|core|laptop|exercise|section|precision|split|step|second|minute|line"
)
CHAINED = "a sentence chained by colons and semicolons"  # in docstrings, lists of arguments look like one
HABITS = {  # what it is -> its pattern, and a sentence that has it
    "a distributive 'a' for 'per'": (
        rf"\b(?:a|an|one|two|three|four|five|some|\d[\d,.]*) (?:{COUNTED}) an? (?:{EACH})\b(?! of| that)",
        "It writes one row an image.",
    ),
    "a sentence that begins with a headless 'who' or 'what'": (
        r"(?:^|[.!] |\n)(?:Who|What|Whoever)(?! (?:is|are|was|were|does|do|did|can|would|will|has|have)\b)"
        r" [^?.:|\n]*\.(?=\s|$)",
        "Keep the clock. Who reads it too early has timed the hand-over.",
    ),
    "a private word for a known thing": (
        r"\bby turns\b|\bcustoms\b|\bbeside\b|\bas (?:the|its) weights want\b|\bas ever\b",
        "Engines are measured by turns.",
    ),
    CHAINED: (
        r"(?:^|[.?!] )(?![-|*#`])(?:[^.?!:;|]*[;:] ){3,}[^.?!:;|]*[a-z][.?!](?:\s|$)",
        "One rule: first the labels; then the images; last of all: the model.",
    ),
}


def texts() -> Iterator[tuple[str, str]]:
    """Where each text stands, and the text without the code in it."""
    for path in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("*/README.md")]:
        yield path.relative_to(REPOSITORY).as_posix(), _prose(path.read_text())
    for path in sorted(REPOSITORY.glob("notebooks/*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                yield f"{path.name}, cell {cell['id']}", _prose("".join(cell["source"]))
    for path in sorted((REPOSITORY / "vitdemo").rglob("*.py")):
        where, source = path.relative_to(REPOSITORY).as_posix(), path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                yield f"{where}:{node.lineno}", " ".join(node.value.split())
        yield from (
            (f"{where}:{token.start[0]}", token.string.lstrip("# "))
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        )


def _prose(markdown: str) -> str:
    """Without fenced code, and without the code within a line."""
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL))


@pytest.mark.parametrize("habit", HABITS)
def test_no_text_has_the_habit(habit):
    pattern, planted = HABITS[habit]
    assert re.search(pattern, planted), "the pattern must find the planted sentence"
    read = [(where, text) for where, text in texts() if habit != CHAINED or not where.startswith("vitdemo/")]
    found = [(where, match[0].strip()) for where, text in read for match in re.finditer(pattern, text)]
    assert not found, f"{len(found)}:\n" + "\n".join(f"{where}: {words}" for where, words in found)


def test_the_readme_can_be_read_at_once():
    readme = (REPOSITORY / "README.md").read_text()
    assert len(readme.split()) <= 950
    for name in ("00_tour", "make demo", "git clone", "from vitdemo import"):
        assert name in readme
