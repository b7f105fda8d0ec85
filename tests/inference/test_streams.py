"""Several calls of an engine side by side: the same answers, and the form that is quicker is the one that is taken."""

import threading
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest

from tests.inference.on_replicas import metrics_of, predictions
from tests.native import native_or_skip
from vitdemo import Replicas, convert, evaluate
from vitdemo.errors import EngineFailure
from vitdemo.evaluation import evaluation
from vitdemo.inference.loop import PREDICTED, PROBABILITY
from vitdemo.inference.streams import quicker_form, quicker_on_images
from vitdemo.machine import cores, now

pytestmark = pytest.mark.skipif(cores() < 2, reason="one core has one form")
BATCHES = dict(device_batch_size=8, input_path="fast")
PAIRS = [native_or_skip(*pair.split(":")) for pair in ["eager:fp32", "openvino:int8"]]
OTHERS = [native_or_skip(*pair.split(":")) for pair in ["onnx:fp32", "onnx:int8", "openvino:fp32", "openvino:bf16"]]


@pytest.mark.parametrize(
    ("engine", "precision"),
    PAIRS + [pytest.param(*each.values, marks=(*each.marks, pytest.mark.soak), id=each.id) for each in OTHERS],
)
def test_two_streams_give_the_same_answers(engine, precision, vit_shapes20, shapes20):
    made = convert(vit_shapes20, engine, precision, threads=2)
    two = evaluate(made.side_by_side(), shapes20, progress=False)
    chosen = evaluate(made, shapes20, progress=False)
    made.streams = 1
    one = evaluate(made, shapes20, progress=False)
    assert [(run.metrics["streams"], run.metrics["threads"]) for run in (one, two)] == [(1, 2), (2, 1)]
    assert one.rows[PREDICTED[0]].equals(two.rows[PREDICTED[0]])
    assert np.nanmax(np.abs(one.rows[PROBABILITY] - two.rows[PROBABILITY])) <= 1e-5 + 1e-9
    assert "2 streams of 1 thread" in str(two) and ", 2 threads" in str(one)
    assert not [t for t in threading.enumerate() if t.name.startswith(("decode", "engine"))]
    m = chosen.metrics
    assert m["images_per_s_by_streams"].keys() == {1, 2} and 0 < m["choosing_s"] < 5
    assert chosen.rows.equals((one, two)[m["streams"] - 1].rows)
    assert made(vit_shapes20.info.random_pixels(3)).shape == (3, 20), "the engine itself is as it was"


@pytest.mark.parametrize(("gain", "chosen"), [(0.85, 1), (0.95, 2), (1.2, 2)])
@pytest.mark.parametrize("threads", [2, 4, 16])
def test_streams_are_taken_unless_one_call_is_clearly_quicker(vit_shapes20, threads, gain, chosen):
    engine, asked = convert(vit_shapes20, threads=2), []
    engine.threads = threads  # as on a machine of so many cores

    def rate(form, count, size):
        asked.append((form.streams, count, size))
        return (200.0 * threads + len(asked)) * (1 if form is engine else gain)  # a machine that gets quicker meanwhile

    form, rates = quicker_form(engine, 8, "nowhere", 50_000, rate)
    count = 6 * 8 * threads  # what fits into a quarter of a second, in batches of which each stream gets equally many
    assert asked[:2] == [(None, 1, 1)] * 2 and asked[2:] == [(None, count, 8), (threads, count, 8)] * 4
    assert (form.streams, form.threads) == ((None, threads) if chosen == 1 else (threads, 1))
    assert rates.keys() == {1, threads} and (chosen == 2 or form is engine)
    assert quicker_form(engine, 8, "nowhere", 1, pytest.fail) == (form, rates), "it is kept"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (dict(threads=1), {}),
        (dict(engine="null", precision="none"), {}),
        (dict(threads=2), {"streams": 1}),
        (dict(threads=2), {"device": "cuda"}),
    ],
)
def test_where_there_is_no_choice_nothing_is_measured(vit_shapes20, how, said):
    engine = convert(vit_shapes20, **how)
    vars(engine).update(said)
    assert quicker_form(engine, 8, "nowhere", 50_000, pytest.fail) == (engine, {})
    assert said or engine.side_by_side() is engine


def test_short_runs_stay_as_they_are_and_slow_models_are_tried_with_an_image_per_stream(vit_shapes20):
    engine, asked = convert(vit_shapes20, threads=2), []
    assert quicker_form(engine, 8, "nowhere", 300, pytest.fail) == (engine, {})
    form, rates = quicker_form(engine, 8, "nowhere", 50_000, lambda *how: asked.append(how) or 0.5)
    assert form.streams == 2 and rates == {1: 0.5, 2: 0.5}
    assert [how[1:] for how in asked] == [(1, 1)] * 2 + [(2, 1)] * 8


def test_an_engine_that_breaks_is_left_to_the_run_to_say_so(vit_shapes20, shapes20, monkeypatch):
    engine = convert(vit_shapes20, threads=2)
    monkeypatch.setattr(engine, "_infer", lambda x: x)
    assert quicker_on_images(engine, shapes20, 1000, **BATCHES) == (engine, {})
    with pytest.raises(EngineFailure, match="not finite float32"):
        evaluate(engine, shapes20, progress=False)


def interrupt(out):
    """As a run is left that was killed half-way."""
    lines = (out / "predictions.csv").read_text().splitlines(keepends=True)
    (out / "predictions.csv").write_text("".join(lines[: len(lines) // 2]))
    (out / "metrics.json").unlink()


@pytest.fixture
def two_streams(vit_shapes20, shapes20, tmp_path, monkeypatch):
    """A run that chose two streams, after which no other may choose."""
    engine = convert(vit_shapes20, threads=2)
    monkeypatch.setattr(
        evaluation, "quicker_on_images", lambda engine, *_, **__: (engine.side_by_side(), {1: 1.0, 2: 2.0})
    )
    run = evaluate(engine, shapes20, limit=48, out=tmp_path / "out", progress=False)
    monkeypatch.setattr(evaluation, "quicker_on_images", lambda *_, **__: pytest.fail("chosen anew"))
    return engine, run


def test_a_run_is_resumed_as_it_was_begun(two_streams, shapes20):
    engine, run = two_streams
    whole = predictions(run)
    interrupt(run.out)
    resumed = evaluate(engine, shapes20, limit=48, out=run.out, resume=True, progress=False)
    assert predictions(resumed) == whole and resumed.metrics["streams"] == 2
    assert resumed.metrics["session_images"] < 48 and metrics_of(run.out)["images_per_s_by_streams"] == {}


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_from_before_there_were_streams_goes_on_with_one_call(two_streams, shapes20, finished):
    engine, run = two_streams
    for name in ("run.json", "metrics.json"):
        text = (run.out / name).read_text()
        (run.out / name).write_text(text.replace('"streams"', '"once"'))
    if not finished:
        interrupt(run.out)
    resumed = evaluate(engine, shapes20, limit=48, out=run.out, resume=True, progress=False)
    assert "streams" not in str(resumed) and resumed.metrics.get("streams", 1) == 1


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_a_replica_on_two_cores_has_streams_as_one_process_does(two_streams, shapes20):
    engine, run = two_streams
    whole = predictions(run)
    interrupt(run.out)
    with Replicas(engine, shapes20, 1, cores_each=2) as one:
        assert one.threads == 2
        resumed = evaluate(engine, shapes20, limit=48, replicas=one, out=run.out, resume=True, progress=False)
    assert predictions(resumed) == whole
    assert (resumed.metrics["streams"], resumed.metrics["threads"]) == (2, 1)


@pytest.mark.soak
@pytest.mark.parametrize(("engine", "precision"), PAIRS)
def test_nine_of_ten_loads_choose_the_same_within_two_seconds(engine, precision, vit_shapes20, shapes20):
    for images in (len(shapes20), 50_000):  # as for a longer run, too
        chosen, seconds = Counter(), []
        for _ in range(10):
            made, start = convert(vit_shapes20, engine, precision), now()
            form, rates = quicker_on_images(made, shapes20, images, **BATCHES)
            seconds.append(now() - start)
            chosen[form.streams or 1] += 1
            assert rates.keys() == {1, made.threads}
            print(f"{engine} {precision}: {form.streams or 1} streams of {rates}, {seconds[-1]:.2f} s")
        assert max(chosen.values()) >= 9 and np.median(seconds) < 2.5  # with loading the second form
