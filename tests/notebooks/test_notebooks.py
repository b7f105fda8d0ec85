"""The course itself, headless, under the profile `smoke`: every notebook, its artefacts and the report."""

import csv
import json
import re
import shutil

import nbformat
import pytest

from vitdemo import data_path
from vitdemo.course import run_notebooks
from vitdemo.course.notebooks import choose_notebooks, read_notebook
from vitdemo.paths import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_leaves_its_artefacts(smoke_run, path):
    result = next(result for result in smoke_run.notebooks if result.name == path.stem)
    assert result.status == "ok", result.error
    notebook, out = read_notebook(path), smoke_run.index.parent
    for artefact in notebook.artefacts:
        assert (out / path.stem / artefact).stat().st_size > 0
    executed = nbformat.read(out / f"{path.stem}.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code" and cell.source)
    figures = [o for c in executed.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert figures, "no figure was drawn"
    shown = [output.get("data", {}).get("text/plain") for c in executed.cells for output in c.get("outputs", [])]
    assert "Output()" not in shown, "an empty output, as of another package's progress bar"


@pytest.mark.parametrize("name, folder", [("00_tour", "evaluation"), ("03_single_device", "candidate")])
def test_evaluations_in_notebooks_count_every_image(smoke_run, name, folder):
    out = smoke_run.index.parent / name / folder
    metrics = json.loads((out / "metrics.json").read_text())
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == metrics["images"] == 96
    assert metrics["top1"] == sum(int(row["correct"]) for row in rows) / 96 > 0.7


def test_report_shows_every_notebook_with_accuracy_beside_speed(smoke_run):
    assert smoke_run.ok
    html = smoke_run.index.read_text()
    for path in NOTEBOOKS:
        assert f"{path.stem}.html" in html and (smoke_run.index.parent / f"{path.stem}.html").exists()
    assert "top-1" in str(smoke_run) and "images/s" in str(smoke_run)


@pytest.mark.parametrize(
    "path",
    [*NOTEBOOKS, *REPOSITORY.glob("*.md"), *REPOSITORY.glob("*/README.md"), *REPOSITORY.glob("docs/*.md")],
    ids=str,
)
def test_pictures_and_links_lead_somewhere(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join(cell.source for cell in nbformat.reads(text, as_version=4).cells)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#"))]
    assert [link for link in links if not (path.parent / link.partition("#")[0]).exists()] == []


def test_a_copy_or_a_reader_s_own_notebook_is_no_lesson(tmp_path):
    for name in ("00_tour", "00_tour-Copy1", "Untitled", "Untitled1"):
        (tmp_path / f"{name}.ipynb").write_text((NOTEBOOKS[0]).read_text() if name == "00_tour" else "{}")
    assert [lesson.name for lesson in choose_notebooks(folder=tmp_path)] == ["00_tour"]


@pytest.mark.soak
def test_every_notebook_takes_a_readers_own_images_and_checkpoint(tmp_path, shapes20):
    """Folders and a checkpoint in words, in another order. 01 needs archives, and 07 takes words in ``smoke``."""
    words = [name.split(",")[0] for name in shapes20.class_names]
    for i, sample in enumerate(shapes20):
        if i < 100:
            file = tmp_path / "set/val" / words[sample.label].title().replace(" ", "_") / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(sample.image)
    shutil.copytree(data_path("shapes20/vit_shapes20"), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    del config["pretrained_cfg"]["label_descriptions"]
    config["pretrained_cfg"]["label_names"] = words
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    names = [f"0{k}" for k in (0, 2, 3, 4, 5, 6)]
    parameters = {"data": str(tmp_path / "set"), "model": str(tmp_path / "model")}
    report = run_notebooks(names, profile="smoke", parameters=parameters, out=tmp_path / "out")
    assert report.ok, report
    executed = nbformat.read(tmp_path / "out/00_tour.ipynb", as_version=4)
    (said,) = [o.text for c in executed.cells for o in c.get("outputs", []) if " is: " in o.get("text", "")]
    (true,), answers = re.findall(" is: (.*)", said), re.findall("%  (.*)", said)
    assert true in answers and {true, *answers} <= set(words), "the answers go by the model's own names"
