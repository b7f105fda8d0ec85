"""Which notebooks run, and with which parameters: everything a user can get wrong, before anything starts."""

import ast
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import nbformat

from vitdemo.errors import VitdemoError
from vitdemo.paths import REPOSITORY, user_path

NOTEBOOKS = REPOSITORY / "notebooks"

# A value goes only to the notebooks that have the parameter. "bundled" is what the notebooks themselves say.
PROFILES = {
    "smoke": dict(
        limit=96, counts=[1, 2], device_batch_sizes=[1, 8], engines="openvino", row_budget_s=1.0, second_model=""
    ),
    "bundled": {},
    # A CPU needs hours for all 50,000, which `vitdemo evaluate` does, resumably: a lesson is shorter.
    "imagenet": {"model": "vit_base_patch16_224.augreg2_in21k_ft_in1k", "limit": 1000},
}

CELL_TIMEOUT_S = 600  # a cell of the bundled course takes two minutes at most: after ten it hangs
UNKNOWN = {"model", "second_model", "data"}  # parameters that make a cell take as long as it takes

LESSON = re.compile(r"\d\d_[a-z0-9_]+")


@dataclass(frozen=True)
class Notebook:
    """A notebook as it stands in the folder, with what it says about itself in ``metadata.vitdemo``."""

    path: Path
    title: str
    code_cells: int  # as executed, with the one that papermill adds for the parameters
    parameters: dict[str, object]  # name -> default
    artefacts: tuple[str, ...]  # files it leaves, relative to its output folder
    min_images: int  # at least so many were looked at; 0: it evaluates nothing
    needs: tuple[str, ...]  # modules without which it is skipped

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def missing(self) -> list[str]:
        """Of the modules it needs, those that are not installed."""
        return [module for module in self.needs if find_spec(module) is None]


def heading(cell) -> str | None:
    """The text of a markdown cell's last heading, without its ``#``; None where it has none."""
    if cell.cell_type != "markdown":
        return None
    found = re.findall(r"^#{1,6}\s+(.+?)\s*#*$", re.sub(r"(?ms)^```.*?^```", "", cell.source), re.MULTILINE)
    return found[-1] if found else None


def read_notebook(path: Path) -> Notebook:
    """Read what the runner has to know of a notebook.

    Args:
        path: of the ``.ipynb``.

    Raises:
        VitdemoError: when it cannot be read, or when it has no ``out`` parameter or no artefacts: a notebook that
            leaves nothing behind could do nothing and still look well.
    """
    try:
        content = nbformat.read(path, as_version=4)
        cells = [cell for cell in content.cells if "parameters" in cell.metadata.get("tags", [])]
        statements = [s for s in ast.parse(cells[0].source if cells else "").body if isinstance(s, ast.Assign)]
        parameters = {ast.unparse(s.targets[0]): ast.literal_eval(s.value) for s in statements}
    except (OSError, SyntaxError, ValueError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise VitdemoError(f"{path}: not a notebook that can run ({str(error).splitlines()[0]})") from None
    said = content.metadata.get("vitdemo", {})
    if "out" not in parameters:
        raise VitdemoError(f'{path}: has no parameter out; add `out = ""` to its cell tagged `parameters`')
    if not said.get("artefacts"):
        raise VitdemoError(f"{path}: names no artefacts; list the files it leaves in metadata.vitdemo.artefacts")
    title = next(filter(None, map(heading, content.cells)), path.stem)
    return Notebook(
        path=path,
        title=title,
        code_cells=1 + sum(cell.cell_type == "code" for cell in content.cells),
        parameters=parameters,
        artefacts=tuple(said["artefacts"]),
        min_images=said.get("min_images", 0),
        needs=tuple(said.get("needs", ())),
    )


def choose_notebooks(names: Sequence[str] | None = None, folder: Path | str = NOTEBOOKS) -> list[Notebook]:
    """Notebooks by their names, in order.

    Args:
        names: "01_dataset", "01" or a file name each; None is all.
        folder: where they lie.

    Raises:
        VitdemoError: for a name that there is not, for an empty folder, and as ``read_notebook`` does.
    """
    # A copy that JupyterLab made, or a reader's own notebook, is no lesson.
    there = {path.stem: path for path in sorted(Path(folder).glob("*.ipynb")) if LESSON.fullmatch(path.stem)}
    if not there:
        raise VitdemoError(f"{folder}: holds no notebooks; they come with a clone of vitdemo: install it from there")
    chosen = set(there if names is None else ())
    for name in names or ():
        stem = name.removesuffix(".ipynb")
        matching = [known for known in there if stem in (known, known.partition("_")[0])]
        if not matching:
            raise VitdemoError(f"{name}: no such notebook; there are {', '.join(there)}")
        chosen.update(matching)
    return [read_notebook(path) for stem, path in there.items() if stem in chosen]


def parse_parameter(text: str) -> tuple[str, object]:
    """``"limit=32"`` as ``("limit", 32)``.

    Args:
        text: NAME=VALUE; a value that is no Python literal is taken as the string it is.

    Raises:
        VitdemoError: for other text.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise VitdemoError(f"-p {text}: give a parameter as NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # as literal_eval documents
        return name, value


def assign_parameters(
    notebooks: Sequence[Notebook], profile: str, imagenet: Path | str | None, given: dict[str, object]
) -> dict[str, dict[str, object]]:
    """The values each notebook gets, by its name.

    Args:
        notebooks: those that will run.
        profile: a name of ``PROFILES``.
        imagenet: the folder of the archives, for the profile "imagenet".
        given: values over the profile's, by the name of the parameter.

    Raises:
        VitdemoError: for an unknown profile, for ``imagenet`` without its profile or the reverse, for a given name
            that no chosen notebook has, and for a value of another type where the default is a bool or a list.
    """
    if profile not in PROFILES:
        raise VitdemoError(f"--profile {profile}: there are {', '.join(PROFILES)}")
    if (profile == "imagenet") != (imagenet is not None):
        raise VitdemoError("--profile imagenet and --imagenet DIR belong together: give both or neither")
    values = {"solve": True} | PROFILES[profile]  # nobody is there to answer the exercises
    if imagenet is not None:
        folder = user_path(imagenet)
        if not folder.exists():
            raise VitdemoError(f"--imagenet {imagenet}: no such folder")
        values["data"] = str(folder.resolve())
    known = sorted({name for notebook in notebooks for name in notebook.parameters} - {"out"})
    for name, value in given.items():
        if name == "out":
            raise VitdemoError("-p out: each notebook gets its own folder; say where with --out")
        if name not in known:
            near = difflib.get_close_matches(name, known) or known
            raise VitdemoError(f"-p {name}: no chosen notebook has this parameter; nearest: {', '.join(near)}")
        wrong = {type(notebook.parameters.get(name)) for notebook in notebooks} & ({bool, list} - {type(value)})
        if wrong:
            raise VitdemoError(f"-p {name}={value}: give {'True or False' if bool in wrong else 'a list, as [1, 8]'}")
    values.update(given)
    return {n.name: {name: value for name, value in values.items() if name in n.parameters} for n in notebooks}


def cell_timeout_s(profile: str, given: dict[str, object]) -> int | None:
    """After how many seconds a cell counts as hanging; None where another model or data set may take any time."""
    return None if profile == "imagenet" or UNKNOWN & given.keys() else CELL_TIMEOUT_S
