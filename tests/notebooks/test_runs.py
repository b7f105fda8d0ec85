"""The runner, on small notebooks made here: what passes, what fails and why, what is left behind."""

import html.parser
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from vitdemo.course import kernels, parse_parameter, run_notebooks
from vitdemo.course import notebooks as plan
from vitdemo.course.notebooks import cell_timeout_s
from vitdemo.errors import VitdemoError

METRICS = {
    "valid": True,
    "images": 96,
    "top1": 0.75,
    "top1_ci95": [0.65, 0.825],
    "images_per_s": 81.25,
    "engine": "eager",
    "precision": "fp32",
}
FIGURE = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots(); ax.plot([1, 2]); plt.show()"
REPORT = {"artefacts": ["metrics.json"], "min_images": 64}


def leave(**changes) -> str:
    return f"import json, pathlib; pathlib.Path(out, 'metrics.json').write_text(json.dumps({METRICS | changes}))"


def make_notebook(folder: Path, name: str, *sources: str, parameters="limit = 1000  # images", said=REPORT) -> None:
    """A notebook with a title, a parameters cell, and a heading above each cell of ``sources``."""
    first = new_code_cell(f'out = ""  # its folder\n{parameters}', metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell(f"# What does {name} do?"), first]
    for number, source in enumerate(sources, 1):
        cells += [new_markdown_cell(f"## Step {number} <of> {name}"), new_code_cell(source)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(
        new_notebook(cells=cells, metadata={"kernelspec": kernel, "vitdemo": said}), folder / f"{name}.ipynb"
    )


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """One run of seven notebooks, of which one does well."""
    root = tmp_path_factory.mktemp("course")
    folder = root / "notebooks"
    folder.mkdir()
    where = "import os, sys; print(sys.executable, os.getcwd(), limit, sep='\\n')"
    orphan = "import subprocess; print(subprocess.Popen(['sleep', '999'], start_new_session=True).pid)"
    widget = "import ipywidgets; from vitdemo.course.widgets import Panel\nipywidgets.IntSlider()"
    panel = "Panel({}, lambda say: 'drawn')"
    make_notebook(folder, "00_good", where, FIGURE, orphan, widget, leave(), panel)
    make_notebook(folder, "01_raises", leave(), "raise ValueError('first line\\nthe number is wrong')", "1")
    make_notebook(folder, "02_lazy", "1")
    make_notebook(folder, "03_few", leave(images=63))
    make_notebook(folder, "04_needs", "1", said=REPORT | {"needs": ["json", "no_such_runtime"]})
    make_notebook(folder, "05_dies", "import os; os._exit(1)")
    make_notebook(folder, "06_leaves", leave(), "import sys; sys.exit(0)", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(foreign_kernel(root / "jupyter")))
        patch.setattr(sys, "stderr", open(root / "stderr", "w"))
        return run_notebooks(profile="smoke", out=root / "out", notebooks=folder)


def foreign_kernel(folder: Path) -> Path:
    """A kernelspec "python3" of another interpreter, where Jupyter looks first."""
    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = ["/no/such/python", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    return folder


def printed(report, name: str) -> str:
    content = nbformat.read(report.index.with_name(f"{name}.ipynb"), as_version=4)
    return "".join(output.get("text", "") for cell in content.cells for output in cell.get("outputs", []))


def test_each_notebook_gets_its_verdict_and_the_others_still_run(course):
    assert {result.name: (result.status, result.error) for result in course.notebooks} == {
        "00_good": ("ok", ""),
        "01_raises": ("failed", "cell 4: ValueError: the number is wrong"),
        "02_lazy": ("failed", "did nothing: left no metrics.json"),
        "03_few": ("failed", "did too little: 63 images, at least 64 wanted"),
        "04_needs": ("skipped", "needs no_such_runtime: not installed, see `vitdemo doctor`"),
        "05_dies": ("failed", "cell 3: Kernel died (out of memory?)"),
        "06_leaves": ("failed", "cell 4: left early by SystemExit"),
    }
    assert not course.ok


def test_a_cell_that_hangs_fails_its_notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CELL_TIMEOUT_S", 2)
    make_notebook(tmp_path, "00_hangs", "import time; time.sleep(99)", leave())
    (hangs,) = run_notebooks(out=tmp_path / "out", notebooks=tmp_path).notebooks
    assert hangs.status == "failed"
    assert hangs.error == "cell 3: A cell timed out while it was being executed, after 2 seconds."


def test_the_kernel_is_this_interpreter_in_the_notebooks_folder_with_the_profiles_values(course):
    executable, folder, limit = printed(course, "00_good").splitlines()[:3]
    assert (executable, Path(folder).name, limit) == (sys.executable, "notebooks", "96")


def test_a_folder_with_braces_in_its_name(tmp_path):
    make_notebook(tmp_path, "00_good", leave())
    (good,) = run_notebooks(out=tmp_path / "{today} {}", notebooks=tmp_path).notebooks
    assert (good.status, good.error) == ("ok", "")
    left = {path.name for path in (tmp_path / "{today} {}").glob("*.*")}
    assert left == {"00_good.ipynb", "00_good.html", "index.html"}


def test_a_full_disk_is_one_line(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small tmpfs here")
    make_notebook(tmp_path, "00_fills", "pathlib = __import__('pathlib')", "print('x' * 10**6)", leave())
    make_notebook(tmp_path, "01_next", leave())
    try:
        with pytest.raises(VitdemoError, match="the disk is full; make room") as caught:
            run_notebooks(out=disk / "out", notebooks=tmp_path)
        assert "\n" not in str(caught.value)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_a_cell_started_is_gone(course):
    assert not psutil.pid_exists(int(printed(course, "00_good").splitlines()[3]))


def test_the_headline_is_read_from_the_artefacts(course):
    good = course.notebooks[0]
    assert good.headline == METRICS and good.images == METRICS["images"]
    closing = str(course).splitlines()
    assert "96 images, top-1 75.0% (95 % CI 65.0% to 82.5%), images/s 81.2 (eager fp32)" in closing[0]
    assert "top-1" not in closing[1], "a failed notebook's accuracy is not shown"
    assert closing[-1] == f"report: {course.index}"


def test_progress_without_a_terminal_is_a_line_for_each_heading(course):
    lines = course.index.parent.with_name("stderr").read_text().splitlines()
    assert lines[0] == "[1/7] 00_good  cell 1/8  What does 00_good do?"
    assert lines[2] == "[1/7] 00_good  cell 4/8  Step 2 <of> 00_good"
    assert lines[7].startswith("[1/7] 00_good  ok  ")
    assert all(line.startswith("[") for line in lines), "nothing else is written between them"


def test_progress_on_a_terminal_is_one_updating_line(monkeypatch):
    master, slave = pty.openpty()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stderr", open(slave, "w"))
    progress = kernels.Progress("[2/3] 01_dataset", 2)
    progress.cell_start(new_markdown_cell("# Extract the archive, slowly"), 0)
    progress.cell_start(new_code_cell("1"), 1)
    progress.cell_start(new_code_cell("2"), 2)
    progress.cell_start(new_markdown_cell("## Summary"), 3)
    progress.close("ok  1.0 s")
    written = ""
    while "\n" not in written:
        written += os.read(master, 10_000).decode()
    shown = [part.removesuffix("\x1b[K") for part in written.split("\r") if part.strip()]
    assert shown[2] == "[2/3] 01_dataset  cell 2/2  Extract the" and all(len(part) < 40 for part in shown)
    assert shown[3] == "[2/3] 01_dataset  cell 2/2  Summary"
    assert shown[-1].removeprefix("\x1b[K") == "[2/3] 01_dataset  ok  1.0 s" and written.count("\n") == 1


class Page(html.parser.HTMLParser):
    """What a browser would load of a page, and its pictures' alt texts."""

    def __init__(self, path: Path):
        super().__init__()
        self.loads, self.alts = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag != "a":
            self.loads += [attributes[name] for name in ("src", "href", "srcset", "data") if name in attributes]
        if tag == "img":
            self.alts.append(attributes.get("alt"))


def test_the_report_needs_no_network_and_describes_its_pictures(course):
    for path in course.index.parent.glob("*.html"):
        page, text = Page(path), path.read_text(encoding="utf-8")
        assert all(source.startswith("data:") for source in page.loads), path
        assert "import(" not in text and "url(http" not in text and "url('http" not in text and "<script" not in text
        assert all(page.alts), path
    assert Page(course.index).alts == ["Step 2 <of> 00_good"]
    assert Page(course.index.with_name("00_good.html")).alts == ["Step 2 <of> 00_good"]


def test_the_report_names_every_notebook_its_status_and_its_numbers(course):
    text = course.index.read_text(encoding="utf-8")
    assert "<h1>7 notebooks: 1 ok, 5 failed, 1 skipped</h1>" in text
    assert '<a href="00_good.html">What does 00_good do?</a>' in text
    assert "75.0% <span>95 % CI 65.0% to 82.5%</span>" in text and "81.2 <span>eager fp32</span>" in text
    assert "cell 4: ValueError: the number is wrong" in text
    page = course.index.with_name("00_good.html").read_text(encoding="utf-8")
    assert "</h1>" in page and "IntSlider(value" not in page, "a widget without its kernel says nothing"
    assert page.count("controls to move: open the notebook in JupyterLab") == 1


@pytest.fixture
def folder(tmp_path):
    make_notebook(tmp_path, "00_tour", leave())
    make_notebook(tmp_path, "01_dataset", leave(), parameters='data = "shapes20"  # which\nsolve = False')
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(names=["02"]), "02: no such notebook; there are 00_tour, 01_dataset"),
        (dict(parameters={"limt": 1}), "-p limt: no chosen notebook has this parameter; nearest: limit"),
        (dict(parameters={"solve": "maybe"}), "-p solve=maybe: give True or False"),
        (dict(names=["01_dataset"], parameters={"limit": 1}), "-p limit: no chosen notebook has"),
        (dict(parameters={"out": "x"}), "say where with --out"),
        (dict(profile="quick"), "--profile quick: there are smoke, bundled, imagenet"),
        (dict(profile="imagenet"), "give both or neither"),
        (dict(imagenet="."), "give both or neither"),
        (dict(profile="imagenet", imagenet="/no/such"), "--imagenet /no/such: no such folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(folder, arguments, message):
    with pytest.raises(VitdemoError) as refused:
        run_notebooks(**arguments, out=folder / "out", notebooks=folder)
    assert message in str(refused.value)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(said={}), "names no artefacts"),
        (dict(parameters="limit = len('x')  # not a literal"), "02_new.ipynb: not a notebook that can run"),
        (dict(parameters="limit = "), "02_new.ipynb: not a notebook that can run"),
    ],
)
def test_a_notebook_that_could_do_nothing_is_refused(folder, change, message):
    make_notebook(folder, "02_new", "1", **change)
    with pytest.raises(VitdemoError, match=message):
        run_notebooks(out=folder / "out", notebooks=folder)


def test_nothing_but_skipped_notebooks_is_no_success(folder):
    make_notebook(folder, "02_needs", "1", said=REPORT | {"needs": ["no_such_runtime"]})
    report = run_notebooks(["02"], out=folder / "out", notebooks=folder)
    assert [result.status for result in report.notebooks] == ["skipped"] and not report.ok


def test_exercises_are_solved_where_nobody_is_there_unless_told_otherwise(tmp_path):
    exercise = "from vitdemo.course import check\nanswer = 'far off' if solve else None\n"
    exercise += "check('01_dataset', 1, index_of_id=answer, devkit=None)"
    make_notebook(tmp_path, "00_asks", leave(), exercise, parameters="solve = False  # whether to solve")
    for parameters, said in (
        ({}, "hint: a dict from ID to index"),
        ({"solve": False}, "not done yet: `index_of_id` is"),
    ):
        out = tmp_path / f"out{len(parameters)}"
        (asks,) = run_notebooks(parameters=parameters, out=out, notebooks=tmp_path).notebooks
        assert asks.error.startswith(f"cell 4: ExerciseError: ✗ exercise 1 of 2: {said}"), asks.error


def test_a_cell_may_take_its_time_only_where_nobody_knows_it():
    assert cell_timeout_s("bundled", {"limit": 3}) == cell_timeout_s("smoke", {}) == 600
    assert cell_timeout_s("imagenet", {}) is cell_timeout_s("bundled", {"model": "vit_large_patch16_384"}) is None


def test_a_parameters_value_is_a_literal_or_a_string():
    assert parse_parameter("limit=32") == ("limit", 32)
    assert parse_parameter("sizes=[1, 8]") == ("sizes", [1, 8])
    assert parse_parameter("model=vit_shapes20") == ("model", "vit_shapes20")
    assert parse_parameter("expression=a=b") == ("expression", "a=b")
    assert parse_parameter("limit={{1}}") == ("limit", "{{1}}"), "a literal that cannot be built"
    with pytest.raises(VitdemoError, match="NAME=VALUE"):
        parse_parameter("limit")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_nothing_is_left_running_and_what_was_done_is_kept(tmp_path, number):
    terminal, end = pty.openpty()  # which is gone with SIGHUP: nothing can be said any more
    own = dict(stderr=end, start_new_session=True) if number == signal.SIGHUP else dict(stderr=subprocess.PIPE)
    start = (
        "import subprocess\n"
        "for new in (False, True): print(subprocess.Popen(['sleep', '999'], start_new_session=new).pid)"
    )
    wait = "import pathlib, time; pathlib.Path(out, 'waiting').touch(); time.sleep(99)"
    make_notebook(tmp_path, "00_waits", start, wait)
    make_notebook(tmp_path, "01_next", leave())
    out = tmp_path / "out"
    code = f"from vitdemo.course import run_notebooks; run_notebooks(out={str(out)!r}, notebooks={str(tmp_path)!r})"
    run = subprocess.Popen([sys.executable, "-c", code], text=True, **own)
    os.close(end)
    waiting = out / "00_waits" / "waiting"
    deadline = time.monotonic() + 60
    while not waiting.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if not waiting.exists():
        run.kill()
        pytest.fail(run.stderr.read() if run.stderr else os.read(terminal, 10_000))
    family = psutil.Process(run.pid).children(recursive=True)
    os.close(terminal)
    run.send_signal(number)
    _, stderr = run.communicate(timeout=120)

    assert run.returncode != 0 and (stderr is None or "KeyboardInterrupt" in stderr)
    assert len(family) >= 3 and not any(process.is_running() for process in family)
    content = nbformat.read(out / "00_waits.ipynb", as_version=4)
    started = [int(pid) for cell in content.cells for o in cell.get("outputs", []) for pid in o.get("text", "").split()]
    assert len(started) == 2 and not any(map(psutil.pid_exists, started))
    index = (out / "index.html").read_text(encoding="utf-8")
    assert "<h1>2 notebooks: 1 interrupted, 1 not run</h1>" in index
    assert (out / "00_waits.html").exists() and not (out / "01_next").exists()
