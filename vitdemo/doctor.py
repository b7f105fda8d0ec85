"""What is installed here, what each notebook needs, what will be skipped and why.

Each section imports what it looks at: the doctor has to answer above all where something is missing.
"""

import platform
from collections.abc import Callable
from importlib import metadata

from vitdemo.errors import VitdemoError, reason_of
from vitdemo.paths import data_path

BUNDLED = ("shapes20/shapes20_img_val.tar", "shapes20/shapes20_devkit.tar.gz", "shapes20/vit_shapes20")


def examine() -> tuple[list[str], bool]:
    """The report's lines, and whether everything that the course cannot do without is there."""
    sections = {
        "machine": _machine,
        "packages": _packages,
        "engines": _engines,
        "replicas": _replicas,
        "bundled data": _data,
        "pretrained weights": _hub,
        "notebooks": _notebooks,
    }
    lines = []
    for title, look in sections.items():
        lines += [title, *(f"  {line}" for line in _looked(look))]
    return lines, not any(line.startswith("  missing") for line in lines)


def _looked(look: Callable[[], list[str]]) -> list[str]:
    try:
        return look()
    except VitdemoError as error:
        return [f"missing  {error}"]
    except ImportError as error:
        return [f"missing  cannot be told without {error.name or error}: install again as the README says"]
    except Exception as error:  # packages that do not fit together fail in a dozen ways while they are imported
        return [f"missing  cannot be told ({reason_of(error)}): install again as the README says"]


def _machine() -> list[str]:
    from vitdemo.machine import describe_machine, machine_record

    return [f"Python {platform.python_version()}", describe_machine(machine_record())]


def _packages() -> list[str]:
    from packaging.requirements import Requirement

    lines = []
    for text in metadata.requires("vitdemo") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = ""
        if version and requirement.specifier.contains(version, prereleases=True):
            lines.append(f"ok       {requirement.name} {version}")
        else:
            found = f"found {version}" if version else "not installed"
            lines.append(f"missing  {requirement}, {found}: install again as the README says")
    return lines


def _engines() -> list[str]:
    from vitdemo.engines.contract import find_engines
    from vitdemo.precisions import NATIVE

    lines = []
    for name, engine in find_engines().items():
        try:
            engine.check_requirements()
            support = engine.answers().items()
            here = (each if how == NATIVE else f"{each} ({how} here)" for each, how in support)
            lines.append(f"ok       {name}: {', '.join(here)}")
        except VitdemoError as error:
            lines.append(f"skipped  {error}")
    return lines


def _replicas() -> list[str]:
    from vitdemo.inference.cluster import check_ray
    from vitdemo.machine import installed_version

    try:
        check_ray(None)
    except VitdemoError as error:
        return [f"skipped  {error}"]
    return [f"ok       Ray {installed_version('ray')}"]


def _data() -> list[str]:
    lines = []
    for name in BUNDLED:
        try:
            lines.append(f"ok       {data_path(name)}")
        except VitdemoError as error:
            lines.append(f"missing  {error}")
    return lines


def _hub() -> list[str]:
    from vitdemo.models.loading import hub_resolves

    if hub_resolves():
        return ["ok       the Hugging Face hub answers: timm tags are downloaded at their first use"]
    return ["skipped  the Hugging Face hub does not answer: timm tags need a cached or local file; vit_shapes20 works"]


def _notebooks() -> list[str]:
    from vitdemo.course import choose_notebooks

    return [
        f"skipped  {each.name}: needs {', '.join(each.missing)}" if each.missing else f"ok       {each.name}"
        for each in choose_notebooks()
    ]
