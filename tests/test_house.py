"""The house: every file stands in CONTRIBUTING.md's map, imports only what stands above it there, and is small.

``python -m tests.test_house`` writes the map anew from the files' docstrings.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import vitdemo
from vitdemo.paths import REPOSITORY

# The rooms from the ground up; within a folder the imports give the order.
ROOMS = """errors paths stats precisions machine dataset imagenet models engines verification inference
evaluation benchmarking plots course doctor cli __main__""".split()
MOST = {"code lines": 9_400, "files": 85, "public names": 50}
CONTRIBUTING = REPOSITORY / "CONTRIBUTING.md"
BLOCK = re.compile(r"(?<=```\nvitdemo/\n).+?(?=```)", re.DOTALL)
LAYOUT = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}


PATHS = sorted(path for path in (REPOSITORY / "vitdemo").rglob("*.py") if path.name != "__init__.py")
MODULES = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in PATHS}


def imported_by(path: Path) -> set[str]:
    """The files of the package that ``path`` imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(MODULES)


def purpose(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]


def house() -> list[str]:
    """The map's lines. Fails where files import each other in a circle."""
    lines = []
    for room in ROOMS:
        inside = [name for name in MODULES if name.split(".")[1] == room]
        assert inside, f"{room}: there is no such file or folder"
        indent = "" if inside == [f"vitdemo.{room}"] else "  "
        lines += [f"{room}/"] if indent else []
        while inside:
            free = [name for name in inside if not imported_by(MODULES[name]) & set(inside) - {name}]
            assert free, f"{', '.join(inside)} import each other in a circle"
            file = free[0].split(".")[-1] + ".py"
            lines.append(f"{indent}{file:<23}{purpose(MODULES[free[0]])}")
            inside.remove(free[0])
    return lines


def code_lines(path: Path) -> int:
    """Lines that hold code: no comments, no docstrings, no blank ones."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    tokens = [token for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]
    lines, before = set(), tokenize.ENCODING
    for token, after in zip(tokens, [*tokens[1:], tokens[-1]], strict=True):
        docstring = token.type == tokenize.STRING and before in LAYOUT and after.type in LAYOUT
        if token.type not in LAYOUT and not docstring:
            lines |= set(range(token.start[0], token.end[0] + 1))
        before = token.type
    return len(lines)


def test_the_map_names_every_file_by_its_purpose_in_the_order_of_imports():
    assert BLOCK.search(CONTRIBUTING.read_text())[0].splitlines() == house(), "python -m tests.test_house"


def test_every_file_stands_in_a_room():
    assert {name.split(".")[1] for name in MODULES} == set(ROOMS)


def test_no_file_imports_from_a_room_below_it_in_the_map():
    upward = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        for other in imported_by(path)
        if ROOMS.index(other.split(".")[1]) > ROOMS.index(name.split(".")[1])
    ]
    assert upward == []


def test_it_stays_small():
    sizes = {"code lines": sum(map(code_lines, (REPOSITORY / "vitdemo").rglob("*.py")))}
    sizes |= {"files": len(MODULES), "public names": len(vitdemo.__all__)}
    assert all(sizes[what] <= most for what, most in MOST.items()), sizes


if __name__ == "__main__":
    CONTRIBUTING.write_text(BLOCK.sub(lambda _: "\n".join([*house(), ""]), CONTRIBUTING.read_text()))
