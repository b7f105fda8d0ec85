"""What is installed here, what each notebook needs, what will be skipped and why."""

import platform
from importlib import metadata

from packaging.requirements import Requirement

from vitdemo.conversion.weights import hub_resolves
from vitdemo.errors import VitdemoError
from vitdemo.measure.clock import describe_machine, installed_version, machine_record
from vitdemo.paths import cache_root, data_path
from vitdemo.runs.plan import choose_notebooks


def examine() -> tuple[list[str], bool]:
    """The report's lines, and whether everything that the course cannot do without is there."""
    packages, packages_ok = _packages()
    data, data_ok = _data()
    sections = {
        "machine": [describe_machine(machine_record()), f"Python {platform.python_version()}"],
        "packages": packages,
        "data": data,
        "pretrained weights": [_hub()],
        "notebooks": _notebooks(),
    }
    lines = [line for title, found in sections.items() for line in (title, *(f"  {line}" for line in found))]
    return lines, packages_ok and data_ok


def _packages() -> tuple[list[str], bool]:
    lines, ok = [], True
    for text in metadata.requires("vitdemo") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(requirement.name)
        if version and requirement.specifier.contains(version, prereleases=True):
            lines.append(f"ok       {requirement.name} {version}")
        else:
            ok = False
            found = f"found {version}" if version else "not installed"
            lines.append(
                f"missing  {requirement.name} {requirement.specifier}, {found}: run `make` or pip install again"
            )
    return lines, ok


def _data() -> tuple[list[str], bool]:
    lines, ok = [f"cache in {cache_root()}"], True
    for name in ("shapes20/shapes20_img_val.tar", "shapes20/shapes20_devkit.tar.gz", "shapes20/vit_shapes20"):
        try:
            lines.append(f"ok       {data_path(name)}")
        except VitdemoError as error:
            ok = False
            lines.append(f"missing  {error}")
    return lines, ok


def _hub() -> str:
    if hub_resolves():
        return "ok       the Hugging Face hub answers: timm tags are downloaded at their first use"
    return "skipped  the Hugging Face hub does not answer: timm tags need a cached or local file; vit_shapes20 works"


def _notebooks() -> list[str]:
    return [
        f"skipped  {notebook.name}: needs {', '.join(notebook.missing)}"
        if notebook.missing
        else f"ok       {notebook.name}"
        for notebook in choose_notebooks()
    ]
