"""Ways to break what a notebook's checks look at, tried in the kernel that runs it.

BREAKS: notebook -> one list per check (a cell tagged `check`), in order. As an extension of IPython this module applies
each of them to a copy of the kernel's names after that cell has run, where the check must fail.
"""

import copy
import json
import os
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import nbformat

from vitdemo import diagnose
from vitdemo.paths import REPOSITORY

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


def undone(*subjects: str) -> list:
    """Each answer of an exercise left as it stands."""
    return [name(subject, lambda _: None) for subject in subjects]


def predicting(compute=1.0, eager_ms=0.8, sizes=(4, 2, 1), combine=max, added=True):
    """Break the prediction of 05's exercise in one of its parts; with the defaults it is right."""

    def apply(names):
        def predicted_ms(row):
            compute_ms = compute * row["batch"] * row["flops_per_image"] / row["roof_tflops"] / 1e9
            size = dict(zip(("fp32", "bf16", "int8"), sizes, strict=True))[row["precision"]]
            memory_ms = 1e3 * row["parameters"] * size / names["bandwidth"]
            dispatch_ms = eager_ms if row["engine"] == "eager" else 0
            if added:
                return combine((compute_ms, memory_ms)) + dispatch_ms
            return combine((compute_ms + dispatch_ms, memory_ms))

        names["predicted_ms"] = predicted_ms

    return apply


def sick(names):
    """The patient examined once more, instead of the healthy model."""
    engine = names["convert"](names["patient"])
    names["healthy"] = diagnose(engine, names["patient"], names["from_tar"], images=names["few"])


def other_answers(names):
    names["singly"] = replace(names["singly"], rows=names["singly"].rows.assign(predicted_1=-1))
    names["same"] = 0


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
        [
            *undone("singly", "same"),
            part("singly", "rows", lambda run: run.rows.iloc[:-1]),
            metric("singly", device_batch_size=8),
            name("same", lambda same: same - 1),
            lambda names: names.update(same=names["singly"].rows["file"] == names["batched"].rows["file"]),  # no .sum()
            other_answers,
        ],
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
        [attribute("from_tar", fingerprint=lambda d: d.fingerprint[::-1]), name("from_tar", lambda d: Reread(d))],
        [part("report", "rows", lambda report: report.rows.assign(error="", warning=""))],
        [part("diagnosis", "hypotheses", lambda d: [replace(h, correct=h.before) for h in d.tested])],
        [sick],
        [
            *undone("index_of_id"),
            name("index_of_id", lambda answer: {1: answer[1], 2: answer[2]}),
            name("index_of_id", lambda answer: {id: id - 1 for id in answer}),
        ],
        [
            *undone("still_right"),
            name("still_right", lambda count: count + 1),
            lambda names: names.update(still_right=names["np"].array([True, False])),  # no .sum()
        ],
    ],
    "02_convert": [
        [name("engines", lambda engines: engines | {"eager bf16": engines["eager fp32"]})],
        [
            name(
                "reports", lambda reports: reports | {"eager fp32": replace(reports["eager fp32"], failures=["broken"])}
            )
        ],
        [lambda names: names.update(wrong_mean={"fp32": names["reports"]["eager fp32"]})],
        [
            name("wrong_eps", lambda reports: reports | {"fp32": reports["bf16"]}),
            name("wrong_eps", lambda reports: reports | {"bf16": reports["fp32"]}),
        ],
        [
            *undone("infer"),
            name("infer", lambda _: lambda self, x: self.module(x.float() / 255)),  # not normalised
            name("infer", lambda right: lambda self, x: right(self, x).softmax(dim=1)),  # no logits
            name("infer", lambda _: lambda self, x: self.module((x.float() / 255 - self.mean) / self.std)),  # old order
        ],
    ],
    "03_single_device": [
        [
            *ROWS,
            name("metrics", lambda m: m | {"images": m["images"] - 8}),
            name("metrics", lambda m: m | {"errors": 3}),
            name("metrics", lambda m: m | {"precision_ran": {"fp32": 0.5}}),
        ],
        [name("same", lambda same: same // 2), metric("other", precision_ran={"fp16": 1.0})],
        [
            *undone("rates", "tuned"),
            name("rates", lambda rates: {1: rates[1]}),
            name("rates", lambda rates: {size: {"images_per_s": rate} for size, rate in rates.items()}),
            metric("tuned", device_batch_size=2),
            part("tuned", "rows", lambda run: run.rows.iloc[:-1]),
            part("tuned", "rows", lambda run: run.rows.assign(predicted_1=-1)),
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
            name("runs", lambda runs: {k: (replace(run, rows=run.rows.iloc[1:]), n) for k, (run, n) in runs.items()}),
            name(
                "runs",
                lambda runs: {k: (replace(r, rows=r.rows.assign(predicted_1=-1)), n) for k, (r, n) in runs.items()},
            ),
        ],
        [
            part("killed", "rows", lambda run: run.rows.iloc[:-1]),
            part("killed", "rows", lambda run: run.rows.iloc[[*range(len(run.rows)), 0]]),
            metric("killed", correct=1),
            metric("killed", replicas={"lost": 0}),
        ],
        [
            *undone("steps", "last"),
            name("steps", lambda steps: steps - 1),  # the incomplete one forgotten
            name("last", lambda last: last - 1),
        ],
    ],
    "05_benchmark": [
        [
            name("rows", lambda rows: rows[rows["engine"] != "eager"]),
            name("rows", lambda rows: rows.assign(status="skipped: 9 s a batch")),
            name("rows", lambda rows: rows.assign(accuracy=["", *rows["accuracy"][1:]])),
            name("rows", lambda rows: rows.assign(p50_ms=1.0)),
        ],
        [
            name("chosen", lambda row: row.replace({row["p90_ms"]: 1e6})),
            name("chosen", lambda row: row.replace({row["top1"]: 0.1})),
            name("chosen", lambda row: row.replace({row["images_per_s"]: 0.1})),
        ],
        [name("answer", lambda answer: [answer[0], "99 % nothing"])],
        [
            *undone("predicted_ms"),
            predicting(compute=1000),  # seconds taken for milliseconds
            predicting(eager_ms=0),
            predicting(sizes=(4, 4, 4)),
            predicting(combine=sum),
            predicting(added=False),  # to the computing alone
        ],
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
            *undone("suspects"),
            name("suspects", lambda bugs: bugs | {"run A": bugs["run B"], "run B": bugs["run A"]}),
            name("suspects", lambda bugs: bugs | {"run C": "a bad day"}),
            name("suspects", lambda bugs: {run: bugs[run] for run in list(bugs)[1:]}),
        ],
        [
            name("transcript", lambda found: found.assign(says="4 missing")),
            name("transcript", lambda found: found.assign(says="")),
        ],
        [
            name("stays", lambda stays: None),
            name("stays", lambda stays: stays | {"most": stays["most"] + 0.1}),
            name("stays", lambda stays: {"most": stays["most"]}),
        ],
    ],
    "07_your_own": [
        [
            attribute("vit", info=lambda vit: replace(vit.info, classes=vit.info.classes[1:])),
            attribute("vit", info=lambda vit: replace(vit.info, classes=("arch", *vit.info.classes[:1] * 19))),
        ],
        [
            attribute("images", files=lambda d: [d.files[1], *d.files[1:]]),
            attribute("images", labels=lambda d: [-1, *d.labels[1:]]),
        ],
        [
            *ROWS,
            part("evaluation", "rows", lambda run: run.rows.assign(label=range(len(run.rows)))),  # an output per image
            part("evaluation", "rows", lambda run: run.rows.assign(label=7)),  # one for all classes
            metric("evaluation", classes_decided=""),
        ],
        [
            part("from_table", "rows", lambda run: run.rows.assign(label=run.rows["label"].values[::-1])),
            name("same", lambda same: same // 2),
        ],
        [
            name("refused", lambda line: ""),
            metric("cured", images=3),
            part("cured", "rows", lambda run: run.rows.assign(label=-1)),
        ],
        [
            metric("partly", classes_present=20),
            metric("partly", correct_present=1),
            metric("partly", correct_present=99),
        ],
        [name("worst", lambda pairs: pairs.iloc[1:])],
        [
            name("seen", lambda rows: rows.iloc[1:]),
            name("seen", lambda rows: rows.assign(probability_1=rows["probability_2"] / 2)),
        ],
        [
            part("report", "failures", lambda report: ["broken"]),
            name("chosen", lambda row: row.replace({row["p90_ms"]: 1e6})),
            name("answer", lambda answer: [answer[0], "99.0% nothing"]),
        ],
        [
            *undone("right_map", "equal"),
            name("right_map", lambda how: {"sorted": "natural", "natural": "sorted"}[how]),
            name("right_map", lambda how: "numbers"),
            name("equal", lambda count: count * 5),  # images, not classes
            name("equal", lambda count: 0),
        ],
    ],
}


class Reread:
    """A data set in which one image, not the first, comes back with one byte changed."""

    def __init__(self, data):
        self.data, self.fingerprint = data, data.fingerprint

    def __getitem__(self, i):
        sample = self.data[i]
        return sample._replace(image=sample.image[:-1] + b"!") if i == 5 else sample

    def __len__(self):
        return len(self.data)


def checks(path: Path) -> list[str]:
    """The sources of a notebook's checks, in order."""
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if "check" in cell.metadata.get("tags", [])]


def load_ipython_extension(shell) -> None:
    """Write a line into the file VITDEMO_TEST_RECORD for every check that passes in this kernel: which notebook's it
    is, its number, and how it ended in each of its breaks: the error's name, "" where it noticed nothing."""
    known = {source: (path.stem, number) for path in NOTEBOOKS for number, source in enumerate(checks(path))}

    def after(result) -> None:
        source = result.info.raw_cell
        if result.success and source in known:
            notebook, number = known[source]
            ends = [end(source, apply, dict(shell.user_ns)) for apply in BREAKS[notebook][number]]
            with open(os.environ["VITDEMO_TEST_RECORD"], "a") as record:
                record.write(json.dumps({"notebook": notebook, "check": number, "ends": ends}) + "\n")

    shell.events.register("post_run_cell", after)


def end(source: str, apply, names: dict) -> str:
    """How a check ends after ``apply`` has broken ``names``."""
    try:
        with redirect_stdout(StringIO()):
            apply(names)
            exec(source, names)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
