"""Costly things, built once per session: the bundled data set, its model, and engines for it."""

import json
import os
import signal
from pathlib import Path

import pytest

from vitdemo import ImageNetVal, convert, data_path, load_model
from vitdemo.course import run_notebooks
from vitdemo.course.runner import RunReport
from vitdemo.paths import REPOSITORY

# What is compared here is what CPUs compute, also where there is a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A shell starts background jobs with SIGINT ignored, and nohup with SIGHUP, which children inherit: those that are sent
# one here must hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """A cache that the processes of this session share: every engine is built once. It is this session's own, unless
    VITDEMO_TEST_CACHE names one for several."""
    folder = Path(os.environ.get("VITDEMO_TEST_CACHE") or tmp_path_factory.mktemp("cache"))
    os.environ["VITDEMO_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def shapes20() -> ImageNetVal:
    return ImageNetVal(data_path("shapes20"))


@pytest.fixture(scope="session")
def vit_shapes20():
    return load_model("vit_shapes20")


@pytest.fixture(scope="session")
def eager(vit_shapes20):
    return convert(vit_shapes20, "eager", "fp32")


@pytest.fixture(scope="session")
def smoke_run(cache, tmp_path_factory) -> RunReport:
    """The course itself, headless, under the profile `smoke`; its kernels also try the checks, see broken_checks."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "ipython" / "profile_default").mkdir(parents=True)
    (folder / "ipython" / "profile_default" / "ipython_kernel_config.py").write_text(
        f"import sys; sys.path.append({str(REPOSITORY)!r})\n"
        "get_config().IPKernelApp.extensions = ['tests.notebooks.breaks']\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("VITDEMO_TEST_RECORD", str(folder / "checks.jsonl"))
        patch.setenv("MPLBACKEND", "Agg")  # as on servers; the figures must appear all the same
        patch.setenv("VITDEMO_DATA", os.path.relpath(REPOSITORY / "data"))  # relative to here, not to the kernel
        return run_notebooks(profile="smoke", out=folder / "smoke")


@pytest.fixture(scope="session")
def broken_checks(smoke_run) -> list[dict]:
    """How each check ended in each of its breaks, see ``tests.notebooks.breaks``."""
    return [json.loads(line) for line in (smoke_run.index.parents[1] / "checks.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """Real photographs, which are no part of the project: a folder named by VITDEMO_PHOTOS, or beside the clone."""
    folder = Path(os.environ.get("VITDEMO_PHOTOS") or REPOSITORY.parent / "shared" / "photos")
    found = sorted(folder.glob("*.JPEG"))
    if not found:
        pytest.skip(f"no photographs in {folder}")
    return found
