"""PyTorch's CPU build, put there first, is kept by everything that is installed after it: tried with stub wheels."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vitdemo.paths import REPOSITORY

PINS = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split())
TORCHES = ("torch", "torchvision")
CONSTRAINED = ["--constraint", str(REPOSITORY / "constraints.txt"), *TORCHES]


def write_stub(folder: Path, name: str, version: str) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path) -> Path:
    """Two folders: what PyTorch's own page has, and what the usual one has."""
    for name in TORCHES:
        write_stub(tmp_path / "cpu", name, f"{PINS[name]}+cpu")
        write_stub(tmp_path / "usual", name, PINS[name])
    return tmp_path


def pip(python: str | Path, *arguments: object) -> str:
    command = [str(python), "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installation_keeps_a_cpu_build_that_is_there(wheels):
    subprocess.run([sys.executable, "-m", "venv", wheels / "venv"], check=True)
    python = wheels / "venv" / "bin" / "python"
    pip(python, "install", "--no-index", "--find-links", wheels / "cpu", *TORCHES)
    pip(python, "install", "--no-index", "--find-links", wheels / "usual", *CONSTRAINED)
    there = dict(line.split("==") for line in pip(python, "freeze").split())
    assert {name: there[name] for name in TORCHES} == {name: f"{PINS[name]}+cpu" for name in TORCHES}


def test_the_workshops_wheels_are_the_cpu_build_where_that_is_there_first(wheels):
    for folder in ("cpu", "usual"):
        pip(sys.executable, "download", "--no-deps", "--dest", wheels / "out", "--no-index", "--find-links",
            wheels / folder, "--find-links", wheels / "out", *CONSTRAINED)  # fmt: skip
    assert sorted(path.name.split("-")[1] for path in (wheels / "out").iterdir()) == sorted(
        f"{PINS[name]}+cpu" for name in TORCHES
    )


@pytest.mark.parametrize("page", ["docs/install.md", "notebooks/README.md"])
def test_the_pages_on_installing_name_the_pinned_cpu_build(page):
    named = re.search(r" (torch==\S+) (torchvision==\S+) --index-url", (REPOSITORY / page).read_text())
    assert list(named.groups()) == [f"{name}=={PINS[name]}" for name in TORCHES]
