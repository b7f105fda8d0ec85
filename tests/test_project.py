"""The project's own files agree with each other, and the bundled archives are the ones that were recorded.

``python -m tests.test_project`` writes environment.yml anew from pyproject.toml and constraints.txt.
"""

import hashlib
import inspect
import re
import subprocess
import sys
import tomllib
from typing import get_type_hints

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vitdemo
import vitdemo.course
import vitdemo.imagenet
import vitdemo.plots
from vitdemo import engines
from vitdemo.dataset.tars import ARCHIVE_MD5
from vitdemo.paths import REPOSITORY, data_path, results_folder

FRONTS = (vitdemo, vitdemo.imagenet, vitdemo.plots, vitdemo.course)
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
README = (REPOSITORY / "README.md").read_text()
TEXTS = README + "".join(path.read_text() for path in (REPOSITORY / "CONTRIBUTING.md", *REPOSITORY.glob("docs/*.md")))
PINS = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split())


def test_every_dependency_is_pinned_within_its_range():
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["engines"], *extras["parallel"], *extras["dev"]]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:  # an extra that holds another
            continue
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{text} but constraints.txt pins {version}"


def conda_environment() -> str:
    """environment.yml, with the pins themselves: some tools look for a file of pins where they have their own copy."""
    extras, pins = PROJECT["optional-dependencies"], {canonicalize_name(name): pin for name, pin in PINS.items()}
    texts = [*PROJECT["dependencies"], *extras["engines"], *extras["parallel"]]
    names = [canonicalize_name(Requirement(text).name) for text in texts]
    head = (REPOSITORY / "environment.yml").read_text().partition("  - pip:\n")[0]
    return "".join(
        [head, "  - pip:\n", *(f"      - {name}=={pins[name]}\n" for name in names), "      - --editable .\n"]
    )


def test_conda_environment_installs_the_same():
    text = (REPOSITORY / "environment.yml").read_text()
    *packages, _ = yaml.safe_load(text)["dependencies"]
    assert packages == [f"python{PROJECT['requires-python']}", "pip", "cxx-compiler"]
    assert text == conda_environment(), "python -m tests.test_project"


def test_a_wheel_takes_the_templates_along():
    package, tool = REPOSITORY / "vitdemo", tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]
    taken = {path for pattern in tool["setuptools"]["package-data"]["vitdemo"] for path in package.glob(pattern)}
    assert {path for path in package.rglob("*.*") if path.suffix not in (".py", ".pyc")} <= taken


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "environment.yml", "Makefile"])
def test_no_registry_address_in_a_project_file(name):
    assert not re.search(r"https?://|index-url|find-links|@ file", (REPOSITORY / name).read_text())


def test_lint_reads_the_notebooks_too():
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "."]
    read = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {str(path) for path in (REPOSITORY / "notebooks").glob("*.ipynb")} <= set(read)


def test_make_targets_in_the_readme_are_there():
    (phony,) = re.findall(r"^\.PHONY: (.+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    used = {word for line in re.findall(r"(?:^|`)make ([a-z0-9 -]+)", TEXTS, re.MULTILINE) for word in line.split()}
    assert used and used <= set(phony.split())


def test_paths_in_the_readme_are_there():
    named = re.findall(r"`((?:vitdemo|tests|notebooks|data)/[\w./-]*)`", TEXTS)
    assert named and [path for path in named if not (REPOSITORY / path).exists()] == []


def test_a_file_in_the_folder_of_engines_is_an_engine(tmp_path, monkeypatch):
    source = "from vitdemo.engines.eager import EagerEngine\nclass Own(EagerEngine):\n    name = 'own'\n"
    (tmp_path / "own.py").write_text(source)
    monkeypatch.setattr(engines, "__path__", [*engines.__path__, str(tmp_path)])
    assert "own" in vitdemo.find_engines.__wrapped__()


def test_the_top_level_is_the_design_cards():
    for name in ("README.md", "environment.yml", "notebooks", "vitdemo", "data", "tests", "LICENSE", ".ci/run"):
        assert (REPOSITORY / name).exists(), name


def test_repository_stays_small():
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z"]
    if not (REPOSITORY / ".git").exists():
        pytest.skip("no clone of git")
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sizes = {name: (REPOSITORY / name).stat().st_size for name in listed.split("\0") if name}
    assert sum(sizes.values()) < 25e6
    assert not [name for name, size in sizes.items() if size > 3e6 and not name.endswith(".tar")]


def test_names_that_the_notebooks_use_all_exist():
    for front in FRONTS:
        for name in front.__all__:
            assert getattr(front, name) is not None and name in dir(front)
        with pytest.raises(AttributeError, match=f"module '{front.__name__}' has no attribute 'nonsense'"):
            front.nonsense  # noqa: B018


def functions_of(public) -> list:
    """The function itself, or those that a class defines for its users."""
    members = vars(public).values() if inspect.isclass(public) else [public]
    functions = [getattr(member, "fget", None) or getattr(member, "__func__", member) for member in members]
    called = r"[a-z]|__(init|call|len|getitem)__"
    own = [f for f in functions if inspect.isfunction(f) and f.__module__.startswith("vitdemo")]
    return [f for f in own if re.match(called, f.__name__)]


@pytest.mark.parametrize("front, name", [(front, name) for front in FRONTS for name in front.__all__])
def test_public_names_are_annotated_throughout(front, name):
    for function in functions_of(getattr(front, name)):
        hints = get_type_hints(function)
        wanted = {"return", *inspect.signature(function).parameters} - {"self", "cls"}
        if function.__name__ == "__init__":
            wanted -= {"return"}
        assert wanted <= set(hints), function.__qualname__


@pytest.mark.parametrize("name", ["shapes20_img_val.tar", "shapes20_devkit.tar.gz", "shapes20_calib.tar"])
def test_bundled_archives_have_the_recorded_md5(name):
    assert hashlib.md5((data_path("shapes20") / name).read_bytes()).hexdigest() == ARCHIVE_MD5[name]


def test_results_folder_is_new_or_empty(tmp_path):
    assert results_folder("x", tmp_path / "new").is_dir()
    (tmp_path / "new" / "file").touch()
    with pytest.raises(vitdemo.VitdemoError, match="already holds something"):
        results_folder("x", tmp_path / "new")


if __name__ == "__main__":
    (REPOSITORY / "environment.yml").write_text(conda_environment())
