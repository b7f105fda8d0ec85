"""The HTML report of `vitdemo run` in a browser: it loads nothing, and can be read in any scheme and width."""

import pytest

from tests.browser.looks import faults
from vitdemo.course.notebooks import choose_notebooks
from vitdemo.course.report import write_index
from vitdemo.course.runner import Result

FIRST, *OTHERS = [lesson.name for lesson in choose_notebooks()]
LONG = "cell 12: VitdemoError: /a/very/long/path/that/does/not/break/anywhere/ILSVRC2012_img_val.tar: no such file"

BAD = """<!DOCTYPE html><html lang="en"><title>Bad</title><style>
  body { background: white; color: #333; }
  @media (prefers-color-scheme: dark) { body { background: black; } }
</style>
<script src="http://127.0.0.1:9/no.js"></script>
<script>nothing()</script>
<img src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=">
<p style="color: #aaa">faint</p><p>grey on black</p><div style="width: 500px">wide</div></html>"""


@pytest.mark.parametrize("name", ["index", FIRST, *(pytest.param(name, marks=pytest.mark.soak) for name in OTHERS)])
def test_a_page_of_the_report_has_no_fault(smoke_run, page, name):
    assert faults(page, smoke_run.index.with_name(f"{name}.html")) == []


def test_every_outcome_can_be_read(page, tmp_path):
    statuses = ("ok", "failed", "skipped", "interrupted", "not run")
    results = [Result(f"0{i}_{status}", f"Is it {status}?", status, error=LONG) for i, status in enumerate(statuses)]
    write_index(results, tmp_path / "index.html")
    assert faults(page, tmp_path / "index.html") == []


def test_the_faults_of_a_bad_page_are_found(page, tmp_path):
    (tmp_path / "bad.html").write_text(BAD)
    found = "\n".join(faults(page, tmp_path / "bad.html"))
    for fault in ("loads http://127.0.0.1:9/no.js", "script: nothing is not defined", "image: <img", "light color-",
                  "dark color-contrast: <p>grey on black", "px wider than a window"):  # fmt: skip
        assert fault in found, fault
