"""What the exercises of a notebook consist of, and which names their code gives and reads."""

import ast
from itertools import takewhile

PARTS = ("exercise", "solution", "check")  # the tags of an exercise's cells, in order; a check also stands alone


def exercises(notebook) -> list[tuple]:
    """Each exercise's cells: the stub, the solutions as a list, the check."""
    parts = [(tag, cell) for cell in notebook.cells for tag in PARTS if tag in cell.metadata.get("tags", [])]
    found = []
    for place, (tag, stub) in enumerate(parts):
        if tag == "exercise":
            solutions = [cell for _, cell in takewhile(lambda part: part[0] == "solution", parts[place + 1 :])]
            found.append((stub, solutions, parts[place + 1 + len(solutions)][1]))
    return found


def answers_of(stub) -> set[str]:
    """The names that a stub leaves to the learner."""
    return {statement.targets[0].id for statement in ast.parse(stub.source).body}


def names_given(tree: ast.AST) -> set[str]:
    """The names that this code gives a value: by assignment, as a function, as a class, by import."""
    nodes = list(ast.walk(tree))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    imports = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    return stored | defined | {(alias.asname or alias.name).partition(".")[0] for alias in imports}


def names_read(tree: ast.Module) -> set[str]:
    """The names that this code must find: read before its own statements, loops and arguments gave them a value."""
    found, own = set(), set()
    for statement in tree.body:
        nodes = list(ast.walk(statement))
        loaded = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        loops = [node.target for node in nodes if isinstance(node, ast.For | ast.comprehension)]
        inner = {node.id for target in loops for node in ast.walk(target) if isinstance(node, ast.Name)}
        inner |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        found |= loaded - own - inner
        own |= names_given(statement)
    return found


def needed(cells: list, wanted: set[str]) -> list:
    """Of ``cells``, in order, those that give the names ``wanted`` their values, and what these need in turn."""
    chosen = []
    for cell in reversed(cells):
        tree = ast.parse(cell.source)
        if names_given(tree) & wanted:
            chosen.insert(0, cell)
            wanted = wanted | names_read(tree)
    return chosen
