"""What is installed here, what each notebook needs, what will be skipped and why.

Each section imports what it looks at: the doctor has to answer above all where something is missing.
"""

import platform
import shutil
from collections.abc import Callable
from importlib import metadata

from vitdemo.errors import VitdemoError, reason_of
from vitdemo.paths import DEVKIT, MODELS, REPOSITORY, VAL_TAR, data_path


def examine() -> tuple[list[str], bool]:
    """The report's lines, and whether everything that the course cannot do without is there."""
    sections = {
        "machine": _machine,
        "packages": _packages,
        "engines": _engines,
        "replicas": _replicas,
        "your own": _own,
        "bundled data": _data,
        "pretrained weights": _hub,
        "notebooks": _notebooks,
    }
    lines = []
    for title, look in sections.items():
        lines += [title, *(f"  {line}" for line in _looked(look))]
    return lines, not any(line.startswith("  missing") for line in lines)


def examine_for_workshop() -> tuple[list[str], bool]:
    """A verdict on this machine, in seconds, then what to leave out on it; and whether it is ready.

    No runtime but torch is loaded, and the hub is not asked.
    """
    lines = [line for look in (_packages, _data, _room) for line in _looked(look)]
    missing, skipped = ([line[9:] for line in lines if line.startswith(word)] for word in ("missing", "skipped"))
    verdict = [f"NOT READY: {'; '.join(missing)}" if missing else "READY"]
    return verdict + [f"  leave out {each}" for each in skipped], not missing


NOTEBOOK_GB, ALL_ENGINES_GB = 2, 6  # of memory for a notebook (and of disk for the course), and for 05 with all engines
PARTS = {"openvino": "OpenVINO in 02 and 05, two bugs of 06", "onnxruntime": "ONNX Runtime in 02 and 05", "ray": "04"}


def _room() -> list[str]:
    from vitdemo.machine import free_memory_bytes, installed_version
    from vitdemo.precisions import NATIVE, torch_support

    free = {"memory": free_memory_bytes() / 1e9, "disk": shutil.disk_usage(REPOSITORY).free / 1e9}
    lines = [f"missing  {NOTEBOOK_GB} GB of {what}, {gb:.1f} are free" for what, gb in free.items() if gb < NOTEBOOK_GB]
    lines += [f"skipped  {part}: no {name} here" for name, part in PARTS.items() if not installed_version(name)]
    if torch_support()["bf16"] != NATIVE:
        lines.append("skipped  bf16 and Inductor in 02 and 05, where they have no rows: no bf16 instructions here")
    if free["memory"] < ALL_ENGINES_GB:
        lines.append('skipped  most of 05: set engines = "openvino" and second_model = "" there, as memory is short')
    return lines


def _looked(look: Callable[[], list[str]]) -> list[str]:
    try:
        return look()
    except VitdemoError as error:
        return [f"missing  {error}"]
    except Exception as error:  # packages that do not fit together fail in a dozen ways while they are imported
        why = f"without {error.name or error}" if isinstance(error, ImportError) else f"({reason_of(error)})"
        return [f"missing  cannot be told {why}: install again as the README says"]


def _line(otherwise: str, look: Callable[..., object], *arguments: object) -> str:
    """The line that ``look`` gives, or the reason why it cannot."""
    try:
        return f"ok       {look(*arguments)}"
    except VitdemoError as error:
        return f"{otherwise}  {error}"


ON_GPU = "eager and inductor compute there, in fp32, fp16 and bf16; written, not run by its makers: see docs/cuda.md"


def _machine() -> list[str]:
    from vitdemo.machine import describe_machine, machine_record
    from vitdemo.precisions import no_cuda

    lines = [f"Python {platform.python_version()}", describe_machine(machine_record())]
    return [*lines, f"no CUDA: {no_cuda()}" if no_cuda() else f"CUDA: {ON_GPU}"]


def _packages() -> list[str]:
    from packaging.requirements import Requirement

    from vitdemo.machine import installed_version

    lines = []
    for text in metadata.requires("vitdemo") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(requirement.name)
        if version and requirement.specifier.contains(version, prereleases=True):
            lines.append(f"ok       {requirement.name} {version}")
        else:
            found = f"found {version}" if version else "not installed"
            lines.append(f"missing  {requirement}, {found}: install again as the README says")
    return lines


def _engines() -> list[str]:
    from vitdemo.engines.contract import find_engines
    from vitdemo.precisions import NATIVE

    def usable(name: str, engine: type) -> str:
        engine.check_requirements()
        answers = engine.answers().items()
        return f"{name}: {', '.join(each if how == NATIVE else f'{each} ({how} here)' for each, how in answers)}"

    return [_line("skipped", usable, *each) for each in find_engines().items()]


def _replicas() -> list[str]:
    from vitdemo.inference.cluster import check_ray
    from vitdemo.machine import installed_version

    return [_line("skipped", lambda: check_ray(None) or f"Ray {installed_version('ray')}")]


def _own() -> list[str]:
    from vitdemo.machine import installed_version

    uses = {"transformers": "Hugging Face's classifiers other than ViT", "pyarrow": "parquet files"}
    return [
        f"ok       {package} {version}: {use}"
        if (version := installed_version(package))
        else f'skipped  {use}: {package} is not installed; pip install "vitdemo[hf]"'
        for package, use in uses.items()
    ]


def _data() -> list[str]:
    return [_line("missing", data_path, name) for name in (VAL_TAR, DEVKIT, *MODELS.values())]


def _hub() -> list[str]:
    from vitdemo.models.loading import constants, hub_answers

    if hub_answers():
        return ["ok       the Hugging Face hub answers: timm tags are downloaded at their first use"]
    why = "is not asked, as HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "does not answer"
    return [f"skipped  the Hugging Face hub {why}: timm tags need a cached or local file; vit_shapes20 works"]


def _notebooks() -> list[str]:
    from vitdemo.course import choose_notebooks

    return [
        f"skipped  {each.name}: needs {', '.join(each.missing)}" if each.missing else f"ok       {each.name}"
        for each in choose_notebooks()
    ]
