"""The engine's run beside the reference's: who is run, what agrees, and FlagPerf's row recomputed from the files."""

from dataclasses import replace

import pandas as pd
import pytest

from tests.inference.on_replicas import metrics_of
from vitdemo import VitdemoError, agreement, convert, evaluate, flagperf_row, roof_of
from vitdemo.engines.roof import Roof
from vitdemo.evaluation.reference import describe_row, evaluate_beside_reference, write_row

ROOF = Roof("bf16", 1e12, (1024, 1024, 1024), "eager", 2, "2026-01-01 00:00 UTC")


@pytest.fixture(scope="module")
def bf16(vit_shapes20):
    return convert(vit_shapes20, "eager", "bf16")


@pytest.fixture(scope="module")
def both(bf16, vit_shapes20, shapes20, tmp_path_factory):
    """Two runs of bf16 and the reference's, over 30 images."""
    out = tmp_path_factory.mktemp("both") / "out"
    return evaluate_beside_reference(bf16, vit_shapes20, shapes20, repeat=2, out=out, limit=30, progress=False)


def test_engine_and_reference_run_over_the_same_images(both):
    runs, reference = both
    out = runs[0].out
    assert [run.out for run in runs] == [out, out / "repeat_2"] and reference.out == out / "validation"
    assert [run.metrics["precision"] for run in (*runs, reference)] == ["bf16", "bf16", "fp32"]
    assert runs[0].rows.equals(runs[1].rows)
    assert runs[0].rows["file"].equals(reference.rows["file"])


def test_the_row_is_what_the_files_say(both, tmp_path):
    runs, reference = both
    out = runs[0].out
    first, second, val = (metrics_of(folder) for folder in (out, out / "repeat_2", out / "validation"))
    row = flagperf_row(runs, reference, e2e_s=12.5, roof=ROOF)
    assert (row["engine"], row["precision"], row["bs"], row["e2e_time"]) == ("eager", "bf16", 8, 12.5)
    assert row["p_val_whole"] == pytest.approx(30 / val["wall_s"])
    assert row["p_val_core"] == pytest.approx(30 / val["inference_s"])
    assert row["p_infer_whole"] == pytest.approx(60 / (first["wall_s"] + second["wall_s"]))
    assert row["p_infer_core"] == pytest.approx(60 / (first["inference_s"] + second["inference_s"]))
    assert row["p_infer_core"] >= row["p_infer_whole"]
    assert row["MFU"] == pytest.approx(row["p_infer_core"] * first["flops_per_image"] / 1e12)
    assert row["MFU_flagperf"] == row["MFU"] / 2
    assert row["acc"] == f"{100 * first['correct'] / 30:.1f}/{100 * val['correct'] / 30:.1f}"
    write_row(row, tmp_path)
    read = pd.read_csv(tmp_path / "flagperf.csv")
    assert read.columns.tolist() == list(row) and read.loc[0, "p_val_core"] == pytest.approx(row["p_val_core"])


def test_what_was_not_measured_is_not_in_the_row(both):
    runs, _ = both
    row = flagperf_row(runs[:1], e2e_s=1.0)
    assert row["p_val_whole"] is row["p_val_core"] is row["MFU"] is row["MFU_flagperf"] is None
    assert row["acc"].endswith("/-")
    assert "p_val_core n/a" in describe_row(row) and "MFU n/a" in describe_row(row)


def test_the_reference_is_not_run_twice(eager, vit_shapes20, shapes20, tmp_path):
    options = dict(out=tmp_path / "out", limit=9, progress=False)
    runs, reference = evaluate_beside_reference(eager, vit_shapes20, shapes20, **options)
    assert runs == [reference]
    assert sorted(path.name for path in reference.out.iterdir()) == ["metrics.json", "predictions.csv", "run.json"]


def test_validation_can_be_left_out_and_done_later(bf16, vit_shapes20, shapes20, tmp_path):
    options = dict(out=tmp_path / "out", limit=9, progress=False)
    runs, reference = evaluate_beside_reference(bf16, vit_shapes20, shapes20, skip_validation=True, **options)
    assert len(runs) == 1 and reference is None and not (tmp_path / "out" / "validation").exists()
    again, reference = evaluate_beside_reference(bf16, vit_shapes20, shapes20, resume=True, **options)
    assert again[0].metrics == metrics_of(runs[0].out) and reference.metrics["images"] == 9


def test_agreement_counts_answers_and_luck(both, shapes20):
    runs, reference = both
    assert "eager fp32's answer for 30 of 30 images (100.00%)" in agreement(runs[0], reference)
    changed = reference.rows.copy()
    changed.loc[:5, "predicted_1"] = (changed.loc[:5, "label"] + 1) % 20  # six answers that are wrong now
    line = agreement(runs[0], replace(reference, rows=changed))
    none = [replace(run, rows=run.rows.assign(predicted_1=float("nan"))) for run in (runs[0], reference)]
    assert "0 of 0 images: none could be read" in agreement(*none)
    assert "24 of 30" in line and "only it is right 6 times" in line and "p 0.031" in line  # 2 / 2**6


def test_runs_of_other_images_are_refused(both, eager, shapes20):
    runs, _ = both
    fewer = evaluate(eager, shapes20, limit=8, progress=False)
    for compare in (lambda: agreement(runs[0], fewer), lambda: flagperf_row(runs, fewer, e2e_s=1.0)):
        with pytest.raises(VitdemoError, match="not of the same images"):
            compare()


@pytest.mark.parametrize("repeat", [0, -1, 1.5])
def test_repeat_below_one(eager, vit_shapes20, shapes20, tmp_path, repeat):
    with pytest.raises(VitdemoError, match="repeat"):
        evaluate_beside_reference(eager, vit_shapes20, shapes20, repeat=repeat, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_roof_where_nothing_is_multiplied(vit_shapes20):
    assert roof_of(convert(vit_shapes20, "null", "none"), vit_shapes20, 8) is None
