"""The verb: run the notebooks one after the other, judge each by what it left, and report."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nbformat.reader import NotJSONError

from vitdemo.course.kernels import Progress, execute, say
from vitdemo.course.notebooks import NOTEBOOKS, Notebook, assign_parameters, cell_timeout_s, choose_notebooks
from vitdemo.course.report import write_index, write_page
from vitdemo.errors import named_errors, reason_of, terminate_as_interrupt
from vitdemo.paths import claim_folder, runs_root, user_path


@dataclass
class Result:
    """What became of one notebook, and its headline: accuracy and speed of the same images."""

    name: str
    title: str
    status: str = "not run"  # ok, failed, skipped, interrupted, not run
    duration_s: float = 0.0
    error: str = ""  # one line; the reason where it was skipped
    images: int | None = None
    headline: dict = field(default_factory=dict)  # of what it measured, by the names of metrics.json

    @property
    def accuracy(self) -> str:
        """``91.2% (95 % CI 88.1% to 93.9%)``; empty where no image was classified."""
        top1, interval = self.headline.get("top1"), self.headline.get("top1_ci95")
        if top1 is None:
            return "not measured" if self.speed else ""
        return f"{top1:.1%}" + (" (95 % CI {:.1%} to {:.1%})".format(*interval) if interval else "")

    @property
    def speed(self) -> str:
        """``81.2 (eager fp32)``, in images/s; empty where nothing was timed."""
        rate, engine, precision = (self.headline.get(name, "") for name in ("images_per_s", "engine", "precision"))
        return f"{rate:.1f} ({engine} {precision})" if rate else ""

    def __str__(self) -> str:
        line = f"{self.name:<20} {self.status:<11} {self.duration_s:6.1f} s"
        if self.accuracy:
            line += f"  {self.images} images, top-1 {self.accuracy}"
        if self.speed:
            line += f", images/s {self.speed}"
        return line + (f"  {self.error}" if self.error else "")


@dataclass
class RunReport:
    """A run's results, in the course's order, and the path of its HTML report; printed, its closing lines."""

    notebooks: list[Result]
    index: Path

    @property
    def ok(self) -> bool:
        """Something ran, and nothing that ran failed or was cut short. A skipped notebook alone is no success."""
        statuses = {result.status for result in self.notebooks}
        return "ok" in statuses and statuses <= {"ok", "skipped"}

    def __str__(self) -> str:
        return "\n".join([*map(str, self.notebooks), f"report: {self.index}"])


def run_notebooks(
    names: Sequence[str] | None = None,
    *,
    profile: str = "bundled",
    imagenet: Path | str | None = None,
    parameters: dict[str, object] | None = None,
    out: Path | str | None = None,
    notebooks: Path | str = NOTEBOOKS,
) -> RunReport:
    """Run the notebooks called ``names`` (all: None) headlessly and write ``out/index.html``.

    A notebook fails when a cell raises or hangs, and when it did nothing; the others still run.

    Args:
        names: "01_dataset", "01" or a file name each.
        profile: a name of ``PROFILES``, which sets parameters of the notebooks.
        imagenet: the folder of the archives, for the profile "imagenet".
        parameters: parameters over the profile's; a relative path among them is relative to the folder ``notebooks``.
        out: gets NAME.ipynb, NAME.html and the folder NAME for each notebook's artefacts; by default ``runs/<time>/``.
        notebooks: the folder where they lie.

    Raises:
        VitdemoError: for bad input, before anything runs.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when the report of what was done is written.
    """
    chosen = choose_notebooks(names, Path(notebooks).resolve())
    values = assign_parameters(chosen, profile, imagenet, parameters or {})
    limit_s = cell_timeout_s(profile, parameters or {})
    out = claim_folder(user_path(out or runs_root() / time.strftime("%Y-%m-%d_%H%M%S")).resolve())
    report = RunReport([Result(notebook.name, notebook.title) for notebook in chosen], out / "index.html")
    with named_errors(out), terminate_as_interrupt():
        try:
            for number, (notebook, result) in enumerate(zip(chosen, report.notebooks, strict=True), 1):
                progress = Progress(f"[{number}/{len(chosen)}] {notebook.name}", notebook.code_cells)
                _run(notebook, result, values[notebook.name], out, progress, limit_s)
        except KeyboardInterrupt:
            say(f"interrupted; what was done: {report.index}")
            raise
        finally:
            write_index(report.notebooks, report.index)
    return report


def _run(notebook: Notebook, result: Result, values: dict, out: Path, progress: Progress, limit_s: int | None) -> None:
    if notebook.missing:
        result.status = "skipped"
        result.error = f"needs {', '.join(notebook.missing)}: not installed, see `vitdemo doctor`"
        progress.close(f"skipped  {result.error}")
        return
    folder, executed, start = out / notebook.name, out / f"{notebook.name}.ipynb", time.perf_counter()
    folder.mkdir()
    result.status = "interrupted"  # until it has come to its end
    try:
        error = execute(notebook, executed, {**values, "out": str(folder)}, progress, limit_s)
        records, left_undone = _judge(notebook, folder, {**notebook.parameters, **values}.get("limit"))
        result.error = error or left_undone
        result.status = "failed" if result.error else "ok"
        if result.status == "ok":  # a number from a notebook that failed would only look like one
            result.images, result.headline = _most_images(records) or None, _headline(records)
    finally:
        result.duration_s = time.perf_counter() - start
        progress.close(f"{result.status}  {result.duration_s:.1f} s  {result.error}".rstrip())
        try:
            if executed.exists():
                write_page(executed, notebook.path.parent)
        except ValueError as error:
            result.status, result.error = "failed", result.error or f"{executed}: {reason_of(error)}"
            if isinstance(error, NotJSONError):  # the executed copy is not whole: the disk was full
                executed.unlink()


def _judge(notebook: Notebook, folder: Path, limit: object) -> tuple[list[dict], str]:
    """The records in the notebook's JSON artefacts, and "" or why it does not count as done."""
    records, problems = [], []
    for name in notebook.artefacts:
        path = folder / name
        if not path.is_file() or not path.stat().st_size:
            problems.append(f"did nothing: left no {name}")
        elif path.suffix == ".json":
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                records += [r for r in (content if isinstance(content, list) else [content]) if isinstance(r, dict)]
            except ValueError:
                problems.append(f"{name}: not valid JSON")
    seen = _most_images(records)
    wanted = min(notebook.min_images, limit) if isinstance(limit, int) else notebook.min_images
    if any(record.get("valid") is False for record in records):
        problems.append("an evaluation it left is not valid")
    if seen < wanted:
        problems.append(f"did too little: {seen} images, at least {wanted} wanted")
    return records, next(iter(problems), "")


def _most_images(records: list[dict]) -> int:
    return max((record.get("images") or 0 for record in records), default=0)


def _headline(records: list[dict]) -> dict[str, object]:
    """Of the records with an accuracy or a speed, the one of the most images, accuracy first."""
    measured = [record for record in records if record.get("top1") is not None or record.get("images_per_s")]
    return max(measured, key=lambda r: (r.get("top1") is not None, r.get("images") or 0), default={})
