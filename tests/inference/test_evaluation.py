"""evaluate: exact once, honest counts, resume, invalid runs; the oracles are torchmetrics and a plain timm loop."""

import io
import json
import random
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchmetrics.classification import MulticlassAccuracy

from tests.inference.on_replicas import as_json, metrics_of, predictions
from tests.native import precisions_of
from vitdemo import Dataset, EngineFailure, Model, VitdemoError, convert, evaluate, extract, wilson_interval
from vitdemo.dataset.decoding import INPUT_PATHS
from vitdemo.dataset.samples import Sample
from vitdemo.engines.eager import EagerEngine
from vitdemo.evaluation.metrics import covered_s, set_faults
from vitdemo.paths import data_path
from vitdemo.plots import plot_gallery, plot_predictions, plot_time, plot_timeline


@pytest.fixture(scope="module")
def evaluation(eager, shapes20, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return evaluate(eager, shapes20, limit=101, out=out, progress=False)


class SomeSamples(Dataset):
    """The first samples of a data set, changed."""

    def __init__(self, data: Dataset, samples: list[Sample]):
        self.__dict__ |= data.take(range(len(samples))).__getstate__() | {"samples": samples}

    def __getitem__(self, i: int) -> Sample:
        return self.samples[i]


@pytest.fixture(scope="module")
def by_reference(eager, shapes20):
    return evaluate(eager, shapes20, limit=101, input_path="reference", progress=False)


def test_predictions_are_those_of_a_plain_timm_loop(by_reference, shapes20, vit_shapes20):
    evaluation = by_reference
    transform = create_transform(**asdict(vit_shapes20.info.preprocessing), is_training=False)
    images = [Image.open(io.BytesIO(shapes20[i].image)).convert("RGB") for i in range(101)]
    with torch.no_grad():
        logits = vit_shapes20.module(torch.stack([transform(image) for image in images]))
    assert evaluation.rows["predicted_1"].tolist() == logits.argmax(1).tolist()
    expected = logits.softmax(1).max(1).values
    torch.testing.assert_close(torch.tensor(evaluation.rows["probability_1"]).float(), expected, atol=1e-4, rtol=0)
    labels = torch.tensor(shapes20.labels[:101])
    for k, name in ((1, "top1"), (5, "top5")):
        metric = MulticlassAccuracy(num_classes=20, top_k=k, average="micro")
        assert evaluation.metrics[name] == pytest.approx(metric(logits, labels).item())


def test_the_fast_path_gives_the_references_answers(evaluation, by_reference):
    assert (evaluation.metrics["input_path"], by_reference.metrics["input_path"]) == ("fast", "reference")
    fast, reference = evaluation.rows, by_reference.rows
    assert fast["predicted_1"].equals(reference["predicted_1"])
    assert (fast["probability_1"] - reference["probability_1"]).abs().max() < 0.02
    assert 0 <= evaluation.metrics["fallbacks"] < 5 and by_reference.metrics["fallbacks"] == 0


@pytest.mark.soak
@pytest.mark.parametrize("precision", precisions_of("eager"))
def test_the_fast_path_agrees_on_every_image(vit_shapes20, shapes20, precision):
    engine = convert(vit_shapes20, "eager", precision)
    fast, reference = (evaluate(engine, shapes20, input_path=path, progress=False).rows for path in INPUT_PATHS)
    agreed = (fast["predicted_1"] == reference["predicted_1"]).sum()
    print(f"{precision}: {agreed} of {len(fast)} answers agree")
    assert agreed >= 0.999 * len(fast)


def test_times_of_every_batch(evaluation):
    times, m = evaluation.times, evaluation.metrics
    assert times["images"].tolist() == [8] * 12 + [5]
    assert (times["decode_began"] < times["decode_ended"]).all() and (times["submitted"] < times["finished"]).all()
    assert (times["decode_ended"] < times["submitted"]).all() and times["finished"].is_monotonic_increasing
    assert times["decode_began"].min() >= 0 and times["finished"].max() <= m["wall_s"]
    assert 0 < m["decode_share"] and 0 < m["compute_share"] and m["decode_share"] + m["compute_share"] <= 1.05
    figure = plot_timeline(evaluation, batches=5)
    assert len(figure.axes[0].get_yticklabels()) == 5


@pytest.mark.parametrize("faster", [2.0, 0.5])
def test_the_time_from_file_to_answer_is_drawn_whole_below_the_engines_own(evaluation, faster):
    m = evaluation.metrics
    figure = plot_time(evaluation, {"images_per_s": faster * m["images_per_s"]})
    alone, *parts = (bar.get_width() for bar in figure.axes[0].patches)
    assert sum(parts) == pytest.approx(m["wall_s"]) and alone == pytest.approx(m["wall_s"] / faster)
    assert parts[0] + parts[1] == pytest.approx(m["compute_wait_s"]) and min(parts) >= 0
    assert f"{1 / faster:.0%} of the engine's rate" in figure.axes[0].get_title()


def test_every_image_is_counted_once_the_partial_batch_too(evaluation, shapes20):
    m = evaluation.metrics
    assert evaluation.rows["file"].tolist() == shapes20.files[:101]  # 101 = 12 batches of 8, and 5
    assert (m["images"], m["session_images"], m["errors"], m["valid"]) == (101, 101, 0, True)
    assert m["correct"] == evaluation.rows["correct"].sum() and m["top1"] == m["correct"] / 101
    assert m["latency_ms"]["count"] == 12  # 13 batches, the first one apart
    assert f"top-1 {m['top1']:.1%}" in str(evaluation) and "95 % interval" in str(evaluation)


def test_files_say_what_the_result_says(evaluation):
    rows = pd.read_csv(evaluation.out / "predictions.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(rows, evaluation.rows, check_dtype=False)
    assert metrics_of(evaluation.out) == as_json(evaluation.metrics)
    run = json.loads((evaluation.out / "run.json").read_text())
    assert run["machine"]["cores"] and run["settings"]["model"]["weights_sha256"]


def test_wall_time_contains_its_parts(evaluation):
    m = evaluation.metrics
    assert 0 < m["decode_wait_s"] + m["compute_wait_s"] + m["postprocess_s"] <= m["wall_s"]
    assert m["images_per_s"] == pytest.approx(101 / m["wall_s"])
    assert m["compute_wait_s"] <= m["inference_s"] <= m["wall_s"]
    assert m["build_s"] is None and m["load_s"] > 0


def test_overlapping_time_is_covered_once():
    assert covered_s([]) == 0.0
    assert covered_s([(0.0, 2.0), (1.0, 1.5), (1.0, 3.0), (5.0, 6.0)]) == 4.0


@pytest.mark.parametrize("engine, precision, weights", [("eager", "fp32", "random"), ("null", "none", "pretrained")])
def test_answers_that_mean_nothing_have_no_accuracy(vit_shapes20, shapes20, engine, precision, weights):
    model = Model(vit_shapes20.module, replace(vit_shapes20.info, weights=weights))
    run = evaluate(convert(model, engine, precision), shapes20, limit=3, progress=False)
    assert run.metrics["top1"] is run.metrics["top5"] is run.metrics["top1_ci95"] is None
    assert "accuracy: not measured" in str(run) and "vitdemo evaluate vit_shapes20 --weights pretrained" in str(run)


def test_unreadable_images_are_rows_counted_as_wrong(eager, shapes20):
    samples = [shapes20[i] for i in range(10)]
    samples[3] = samples[3]._replace(image=samples[3].image[:200])
    samples[7] = samples[7]._replace(image=b"")
    run = evaluate(eager, SomeSamples(shapes20, samples), device_batch_size=4, progress=False)
    whole = evaluate(eager, shapes20, device_batch_size=4, limit=10, progress=False)
    assert (run.metrics["images"], run.metrics["errors"]) == (10, 2)
    assert run.rows["error"].ne("").tolist() == [i in (3, 7) for i in range(10)]
    assert run.rows["correct"].tolist() == [0 if i in (3, 7) else c for i, c in enumerate(whole.rows["correct"])]
    assert "2 unreadable counted as wrong" in str(run)
    data = SomeSamples(shapes20, samples)
    data.class_names = shapes20.class_names
    plot_predictions(run, range(10))  # a picture that cannot be read does not stop the gallery
    plot_gallery(data, range(10))


def test_resume_gives_the_same_file_and_counts_this_session_only(evaluation, eager, shapes20, tmp_path):
    whole = predictions(evaluation)
    for cut in (0, 10, 500, 3333, len(whole) - 1):  # within the header, within rows, a torn last line
        out = tmp_path / str(cut)
        out.mkdir()
        (out / "run.json").write_bytes((evaluation.out / "run.json").read_bytes())
        (out / "predictions.csv").write_bytes(whole[:cut])
        kept = max(0, whole[:cut].count(b"\n") - 1) // 8 * 8
        resumed = evaluate(eager, shapes20, limit=101, out=out, resume=True, progress=False)
        assert predictions(resumed) == whole
        assert resumed.metrics["images"] == 101 and resumed.metrics["session_images"] == 101 - kept
        assert resumed.rows.equals(evaluation.rows)


def test_resume_of_a_finished_run_changes_nothing(eager, shapes20, tmp_path):
    out = tmp_path / "out"
    run = evaluate(eager, shapes20, limit=20, out=out, progress=False)
    again = evaluate(eager, shapes20, limit=20, out=out, resume=True, progress=False)
    assert again.metrics == as_json(run.metrics) and again.rows.equals(run.rows)
    (out / "metrics.json").unlink()  # killed between the last row and the metrics
    again = evaluate(eager, shapes20, limit=20, out=out, resume=True, progress=False)
    assert again.metrics["images_per_s"] is None and "no image run in this session" in str(again)
    assert again.metrics["correct"] == run.metrics["correct"]


@pytest.mark.parametrize(
    "file, change",
    [
        ("run.json", lambda text: "{"),
        ("run.json", lambda text: '{"settings": []}'),
        ("run.json", lambda text: text.replace('"torch": "', '"torch": "1.')),
        ("predictions.csv", lambda text: text.replace(",", ";")),
        ("predictions.csv", lambda text: text.replace("val_00000002", "val_00000009")),
        ("predictions.csv", lambda text: "\0" * 50 + "\n" + text),
        ("predictions.csv", lambda text: text + text),
    ],
)
def test_resume_refuses_what_it_did_not_write(eager, shapes20, tmp_path, file, change):
    out = tmp_path / "out"
    evaluate(eager, shapes20, limit=16, out=out, progress=False)
    (out / "metrics.json").unlink()
    (out / file).write_text(change((out / file).read_text()))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(VitdemoError, match="another output folder"):
        evaluate(eager, shapes20, limit=16, out=out, resume=True, progress=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_resume_needs_the_same_settings(eager, shapes20, tmp_path):
    out = tmp_path / "out"
    run = evaluate(eager, shapes20, limit=8, out=out, progress=False)
    before = predictions(run)
    for name, change in (("device_batch_size", dict(limit=8, device_batch_size=4)), ("images", dict(limit=9))):
        with pytest.raises(VitdemoError, match=f"another {name}"):
            evaluate(eager, shapes20, **change, out=out, resume=True, progress=False)
    assert predictions(run) == before


@pytest.mark.parametrize("resume", [False, True])
def test_busy_folder_or_file_is_left_as_it_is(eager, shapes20, tmp_path, resume):
    (thesis := tmp_path / "thesis.txt").write_text("mine")
    for out, message in ((tmp_path, "another output folder|already holds"), (thesis, "thesis.txt")):
        with pytest.raises(VitdemoError, match=message):
            evaluate(eager, shapes20, limit=8, out=out, resume=resume, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"] and thesis.read_text() == "mine"


class Failing(EagerEngine):
    """Breaks, or answers nonsense, from its third batch on."""

    calls = 0

    def _infer(self, x):
        self.calls += 1
        if self.calls < 3:
            return super()._infer(x)
        if self.fault == "raises":
            raise RuntimeError("device lost")
        if self.fault == "interrupted":
            raise KeyboardInterrupt
        answer = super()._infer(x)
        return answer[:-1] if self.fault == "short" else answer * float("nan")


@pytest.mark.parametrize("fault", ["raises", "nan", "short"])
def test_engine_that_fails_makes_the_run_invalid(vit_shapes20, shapes20, tmp_path, fault):
    engine = Failing(vit_shapes20, "fp32", device="cpu", threads=1)
    engine.fault = fault
    with pytest.raises(EngineFailure, match="eager engine"):
        evaluate(engine, shapes20, limit=64, out=tmp_path / "out", progress=False)
    metrics = metrics_of(tmp_path / "out")
    assert metrics["valid"] is False and "eager engine" in metrics["error"] and "top1" not in metrics
    assert not [t for t in threading.enumerate() if t.name.startswith(("decode", "engine"))]


def test_interruption_keeps_what_is_done_and_no_thread(vit_shapes20, eager, shapes20, tmp_path):
    engine = Failing(vit_shapes20, "fp32", device="cpu", threads=eager.threads)
    engine.fault, engine.card = "interrupted", eager.card  # as the same engine, run again, would have
    with pytest.raises(KeyboardInterrupt):
        evaluate(engine, shapes20, limit=64, out=tmp_path / "out", progress=False)
    assert not [t for t in threading.enumerate() if t.name.startswith(("decode", "engine"))]
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) >= 1 + 8
    assert not (tmp_path / "out" / "metrics.json").exists()
    resumed = evaluate(eager, shapes20, limit=64, out=tmp_path / "out", resume=True, progress=False)
    assert resumed.rows.equals(evaluate(eager, shapes20, limit=64, progress=False).rows)


def test_other_classes_are_refused(eager, shapes20, vit_shapes20):
    others = tuple(f"n8{k:07}" for k in range(20))
    model = Model(vit_shapes20.module, replace(vit_shapes20.info, classes=others, class_names=others))
    with pytest.raises(VitdemoError, match="no output of vit_shapes20 is its class 'n90382915' .20 of 20 have none"):
        evaluate(convert(model), shapes20, limit=1, progress=False)
    turned = Model(vit_shapes20.module, replace(vit_shapes20.info, classes=tuple(shapes20.classes[::-1])))
    run = evaluate(convert(turned), shapes20, limit=1, progress=False)  # by name, wherever the output stands
    assert run.data.classes[run.rows["label"][0]] == shapes20[0].class_id == run.rows["class_id"][0]
    nameless = Model(vit_shapes20.module, replace(vit_shapes20.info, classes=None))
    with pytest.raises(VitdemoError, match="which class each of its 20 outputs is"):
        evaluate(convert(nameless), shapes20, progress=False)


@pytest.mark.parametrize("name, value", [("device_batch_size", 0), ("limit", 0), ("limit", -3), ("limit", "8")])
def test_numbers_below_one_are_refused(eager, shapes20, name, value):
    with pytest.raises(VitdemoError, match=f"{name} {value!r}: must be a whole number of at least 1"):
        evaluate(eager, shapes20, progress=False, **{name: value})


def test_an_unknown_input_path_is_refused(eager, shapes20):
    with pytest.raises(VitdemoError, match="input_path 'quick': is not one of fast, reference"):
        evaluate(eager, shapes20, input_path="quick", progress=False)


def test_set_faults_says_what_is_not_there_exactly_once():
    expected = ["a", "b", "c", "d"]
    assert set_faults(expected, expected) == set_faults([], []) == ""
    assert set_faults(["a", "b"], expected) == "2 missing (the first is c)"
    assert set_faults(["a", "b", "c", "d", "b", "b"], expected) == "2 too many (the first is b)"
    assert set_faults(["a", "x", "c", "d"], expected) == "1 missing (the first is b), 1 too many (the first is x)"
    assert set_faults(["b", "a", "c", "d"], expected) == "in another order"


def test_first_batch_share_is_that_of_a_slow_first_batch(vit_shapes20, shapes20):
    class SlowStart(EagerEngine):
        def _infer(self, x):
            time.sleep(0 if self.warm else 2)
            self.warm = True
            return super()._infer(x)

    engine = SlowStart(vit_shapes20, "fp32", device="cpu", threads=2)
    engine.warm = False
    cold, warm = (evaluate(engine, shapes20, limit=24, progress=False).metrics for _ in range(2))
    assert cold["first_batch_share"] > 0.6 > warm["first_batch_share"] >= 0


def test_null_engine_scores_class_zero_only(shapes20, vit_shapes20):
    run = evaluate(convert(vit_shapes20, "null", "none"), shapes20, limit=200, progress=False)
    assert run.rows["correct"].sum() == shapes20.labels[:200].count(0)
    assert run.rows["predicted_1"].eq(0).all()


def test_wilson_interval_is_the_published_formula():
    for correct, images in ((0, 10), (7, 10), (10, 10), (912, 1000)):
        p, z = correct / images, 1.959963984540054
        centre = (p + z * z / (2 * images)) / (1 + z * z / images)
        half = z / (1 + z * z / images) * (p * (1 - p) / images + z * z / (4 * images * images)) ** 0.5
        assert wilson_interval(correct, images) == pytest.approx([centre - half, centre + half], abs=1e-12)


def kill_and_resume(tmp_path, evaluation, kills: int, seed: int) -> None:
    """Kill ``vitdemo evaluate`` with SIGKILL at random moments after its folder appears, then let it finish."""
    out, moments = tmp_path / "out", random.Random(seed)
    data, options = str(data_path("shapes20")), ["--limit", "101", "--resume", "--out", str(out)]
    command = [sys.executable, "-m", "vitdemo", "evaluate", "vit_shapes20", "--data", data, *options]
    for _ in range(kills):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not out.exists():
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.3) if moments.random() < 0.5 else moments.uniform(5, 9))
            process.kill()
    subprocess.run(command, check=True, capture_output=True)
    assert (out / "predictions.csv").read_bytes() == predictions(evaluation)
    files = ["flagperf.csv", "metrics.json", "predictions.csv", "run.json"]
    assert sorted(path.name for path in out.iterdir()) == files
    metrics = metrics_of(out)
    assert metrics["valid"] and metrics["correct"] == evaluation.metrics["correct"]


def test_killed_run_resumes_to_the_same_file(tmp_path, evaluation):
    kill_and_resume(tmp_path, evaluation, kills=2, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_run_killed_five_times_resumes_to_the_same_file(tmp_path, evaluation, seed):
    kill_and_resume(tmp_path, evaluation, kills=5, seed=seed + 1)


@pytest.mark.soak
@pytest.mark.parametrize("precision", precisions_of("eager"))
def test_whole_set_from_the_tar_and_extracted_is_the_same(vit_shapes20, shapes20, tmp_path, precision):
    engine = convert(vit_shapes20, "eager", precision)
    folder = extract(data_path("shapes20"), tmp_path / "extracted", progress=False)
    runs = [evaluate(engine, data, out=tmp_path / data.source, progress=False) for data in (shapes20, folder)]
    assert predictions(runs[0]) == predictions(runs[1])
    assert [run.metrics["images"] for run in runs] == [1000, 1000]
    assert 0.85 <= runs[0].metrics["top1"] <= 0.97
