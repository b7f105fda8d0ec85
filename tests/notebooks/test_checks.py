"""Every check in a notebook passes on the real thing and fails when its subject is broken.

Each notebook's code cells are executed here in order, in one namespace. At a cell tagged `check`, every way to
break its subject (BREAKS: notebook -> a list a check, in order) is applied to a copy of the namespace, in which
the check must fail.
"""

import copy
from dataclasses import replace

import matplotlib
import nbformat
import pytest

from vitdemo import ImageNetVal, data_path, diagnose
from vitdemo.paths import REPOSITORY
from vitdemo.runs.plan import PROFILES

SHAPES20 = ImageNetVal(data_path("shapes20"))
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def attribute(subject: str, **values):
    """Break ``subject`` by giving a copy of it other attributes, each computed from the good ones."""

    def apply(names):
        broken = copy.copy(names[subject])
        broken.__dict__.update({name: value(names[subject]) for name, value in values.items()})
        names[subject] = broken

    return apply


def part(subject: str, field: str, value):
    """Break one field of a dataclass or named tuple."""

    def apply(names):
        good = names[subject]
        change = {field: value(good)}
        names[subject] = good._replace(**change) if hasattr(good, "_replace") else replace(good, **change)

    return apply


def metric(subject: str, **values):
    return part(subject, "metrics", lambda run: run.metrics | values)


def name(subject: str, value):
    def apply(names):
        names[subject] = value(names[subject])

    return apply


ROWS = [
    part("evaluation", "rows", lambda run: run.rows.iloc[:-1]),  # the last image dropped
    part("evaluation", "rows", lambda run: run.rows.iloc[[*range(len(run.rows)), 0]]),  # one counted twice
    part("evaluation", "rows", lambda run: run.rows.iloc[::-1]),
]
BREAKS = {
    "00_tour": [
        [
            attribute("images", files=lambda d: [d.files[1], *d.files[1:]]),
            attribute("images", labels=lambda d: [len(d.classes), *d.labels[1:]]),
        ],
        [*ROWS, metric("evaluation", correct=1), metric("evaluation", top1=0.123)],
    ],
    "01_dataset": [
        [name("computed", lambda digest: digest[::-1])],
        [
            part("devkit", "synsets", lambda kit: kit.synsets[::-1]),
            part("devkit", "ground_truth", lambda kit: kit.ground_truth[:-1]),
            part("devkit", "synsets", lambda kit: [s._replace(id=k) for k, s in enumerate(kit.synsets, 1)]),
        ],
        [attribute("resumed", fingerprint=lambda d: d.fingerprint[::-1])],
        [
            attribute("extracted", labels=lambda d: [*d.labels[1:], (d.labels[0] + 1) % len(d.classes)]),
            name("members", lambda members: members[:-1]),
        ],
        [
            attribute("from_tar", fingerprint=lambda d: d.fingerprint[::-1]),
            name("from_tar", lambda d: Reread(d)),
        ],
        [part("report", "rows", lambda report: report.rows.assign(error="", warning=""))],
        [lambda names: names.update(healthy=diagnose(names["convert"](names["patient"]), names["patient"], SHAPES20))],
    ],
    "02_convert": [
        [name("engines", lambda engines: engines | {"eager bf16": engines["eager fp32"]})],
        [
            name(
                "reports", lambda reports: reports | {"eager fp32": replace(reports["eager fp32"], failures=["broken"])}
            )
        ],
        [lambda names: names.update(wrong_mean={"fp32": names["reports"]["eager fp32"]})],
    ],
    "03_single_device": [
        [
            *ROWS,
            name("metrics", lambda m: m | {"images": m["images"] - 8}),
            name("metrics", lambda m: m | {"errors": 3}),
            name("metrics", lambda m: m | {"precision_ran": {"fp32": 0.5}}),
        ],
        [
            name("same", lambda same: same // 2),
            metric("other", precision_ran={"fp32": 1.0}),
        ],
    ],
    "04_data_parallel": [
        [
            part("two", "rows", lambda run: run.rows.iloc[:-1]),
            part("two", "rows", lambda run: run.rows.iloc[[*range(len(run.rows)), 0]]),
            name("same", lambda same: same // 2),
            metric("two", replicas={"each": [{"images": 29}]}),
        ],
        [
            name("scaling", lambda table: table.assign(top1=range(len(table)))),
            name("runs", lambda runs: {k: (replace(run, rows=run.rows.iloc[1:]), n) for k, (run, n) in runs.items()}),
        ],
        [
            part("killed", "rows", lambda run: run.rows.iloc[:-1]),
            part("killed", "rows", lambda run: run.rows.iloc[[*range(len(run.rows)), 0]]),
            metric("killed", correct=1),
        ],
    ],
    "05_benchmark": [
        [
            name("rows", lambda rows: rows[rows["engine"] != "eager"]),
            name("rows", lambda rows: rows.assign(status="skipped: 9 s a batch")),
            name("rows", lambda rows: rows.assign(accuracy=["", *rows["accuracy"][1:]])),
            name("rows", lambda rows: rows.assign(p90_ms=0.1 * rows["p50_ms"])),
        ],
        [
            name("chosen", lambda row: row.replace({row["p90_ms"]: 1e6})),
            name("chosen", lambda row: row.replace({row["top1"]: 0.1})),
            name("chosen", lambda row: row.replace({row["images_per_s"]: 0.1})),
        ],
        [name("answer", lambda answer: [answer[0], "99 % nothing"])],
    ],
    "06_explore": [
        [
            part("look", "top5", lambda look: look.top5[::-1]),
            part("look", "maps", lambda look: 0.9 * look.maps),
            part("look", "rollout", lambda look: 2 * look.rollout),
        ],
        [
            name("moved", lambda table: table[::-1]),
            name("moved", lambda table: table.assign(first=0.9 * table["first"])),
            name("hidden", lambda table: table.assign(first=0.9 * table["first"])),
            name("masked", lambda masked: 255 - masked),
        ],
        [
            name("apart", lambda table: table.iloc[1:]),
            name("apart", lambda table: table[::-1]),
            name("apart", lambda table: table.assign(distance=2 - table["distance"].rank() / len(table))),
            name("same", lambda same: same - 1),
        ],
        [
            name("stays", lambda stays: None),
            name("stays", lambda stays: stays | {"most": stays["most"] + 0.1}),
            name("stays", lambda stays: {"most": stays["most"]}),
        ],
    ],
}


class Reread:
    """A data set in which one image, not the first, comes back with one byte changed."""

    def __init__(self, data):
        self.data, self.fingerprint = data, data.fingerprint

    def __getitem__(self, i):
        sample = self.data[i]
        return sample._replace(jpeg=sample.jpeg[:-1] + b"!") if i == 5 else sample

    def __len__(self):
        return len(self.data)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_check_catches_what_it_is_there_for(path, tmp_path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.chdir(path.parent)
    names, breaks = {}, iter(BREAKS[path.stem])
    for cell in nbformat.read(path, as_version=4).cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code":
            continue
        exec(cell.source, names)
        if "parameters" in tags:
            names["out"] = str(tmp_path / "out")
            small = PROFILES["smoke"] | {"limit": 30}
            names.update({name: value for name, value in small.items() if name in names})
        if "check" in tags:
            for number, apply in enumerate(next(breaks)):
                broken = dict(names)
                apply(broken)
                with pytest.raises(AssertionError):
                    exec(cell.source, broken)
                    pytest.fail(f"break {number} went unnoticed by:\n{cell.source}")
    assert next(breaks, None) is None, "BREAKS has more entries than the notebook has checks"
    matplotlib.pyplot.close("all")
