"""The project's own files agree with each other, and the bundled archives are the ones that were recorded."""

import hashlib
import re
import subprocess
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vitdemo
from vitdemo.dataset.imagenet import ARCHIVE_MD5
from vitdemo.paths import REPOSITORY, data_path, results_folder

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
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


def test_conda_environment_installs_the_same():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    *packages, pip = environment["dependencies"]
    assert environment["name"] == PROJECT["name"]
    assert packages == [f"python{PROJECT['requires-python']}", "pip", "cxx-compiler"]
    assert pip == {"pip": ["--constraint constraints.txt", "--editable .[dev]"]}


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "environment.yml", "Makefile"])
def test_no_registry_address_in_a_project_file(name):
    assert not re.search(r"https?://|index-url|find-links|@ file", (REPOSITORY / name).read_text())


def test_the_top_level_is_the_design_cards():
    for name in ("README.md", "environment.yml", "notebooks", "vitdemo", "data", "tests", "LICENSE", ".ci/run"):
        assert (REPOSITORY / name).exists(), name


def test_repository_stays_small():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    sizes = {name: (REPOSITORY / name).stat().st_size for name in listed.split("\0") if name}
    assert sum(sizes.values()) < 25e6
    assert not [name for name, size in sizes.items() if size > 3e6 and not name.endswith(".tar")]


def test_names_that_the_notebooks_use_all_exist():
    for name in vitdemo.__all__:
        assert getattr(vitdemo, name) is not None
        assert name in dir(vitdemo)
    with pytest.raises(AttributeError, match="nonsense"):
        vitdemo.nonsense  # noqa: B018


@pytest.mark.parametrize("name", ["shapes20_img_val.tar", "shapes20_devkit.tar.gz", "shapes20_calib.tar"])
def test_bundled_archives_have_the_recorded_md5(name):
    assert hashlib.md5((data_path("shapes20") / name).read_bytes()).hexdigest() == ARCHIVE_MD5[name]


def test_results_folder_is_new_or_empty(tmp_path):
    assert results_folder("x", tmp_path / "new").is_dir()
    (tmp_path / "new" / "file").touch()
    with pytest.raises(vitdemo.VitdemoError, match="already holds something"):
        results_folder("x", tmp_path / "new")
