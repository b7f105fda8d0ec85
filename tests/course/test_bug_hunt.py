"""The bug hunt: each mistake is really made, its check sees it, and no check speaks where nothing is wrong."""

import copy
import inspect
import os
from dataclasses import replace

import pytest

import vitdemo
import vitdemo.course
import vitdemo.imagenet
import vitdemo.plots
from vitdemo import ImageNetVal, VitdemoError, convert, data_path, evaluate, find_engines
from vitdemo.course import BUGS, buggy_run, hunt
from vitdemo.course.bug_hunt import CHECKS, NO_BUG
from vitdemo.course.buggy_scripts import (
    AS_TEXT,
    BATCH,
    CALIBRATED,
    CALIBRATION,
    COMPILE,
    DROPPED,
    ILSVRC,
    IMAGES,
    NORMALISED,
    PADDED,
    SEEN_BY,
    UNSYNCHRONISED,
)
from vitdemo.engines.openvino import OpenVINOEngine
from vitdemo.evaluation.evaluation import calibrated_on_scored
from vitdemo.machine import installed_version

QUICK = [check for check in CHECKS if check != "diagnose"]

# bug -> check -> a part of what it says; where it is left out, the check says nothing
TABLE = {
    NO_BUG: {},
    DROPPED: {"set_faults": "4 missing (the first is ILSVRC2012_val_00000097.JPEG)"},
    PADDED: {"set_faults": "4 too many (the first is ILSVRC2012_val_00000001.JPEG)"},
    NORMALISED: {"diagnose": "with mean/std 0.5"},
    ILSVRC: {"diagnose": "labels read in ILSVRC order"},
    AS_TEXT: {"diagnose": "labels read in the order of numbers as text"},
    UNSYNCHRONISED: {"unaccounted_s": "of the loop's time is not in the times of its batches"},
    COMPILE: {"paid_once": "of the time was paid once"},
    CALIBRATED: {"calibrated_on_scored": f"{CALIBRATION} of the {IMAGES} scored images"},
}


@pytest.fixture(scope="module")
def game(vit_shapes20, shapes20):
    if not (installed_version("openvino") and installed_version("nncf")):
        pytest.skip("needs openvino and nncf")
    return hunt(vit_shapes20, shapes20, seed=3)


@pytest.fixture(scope="module")
def run_of(game) -> dict:
    """Bug -> its run."""
    return {game.bugs.get(name, NO_BUG): run for name, run in game.runs.items()}


@pytest.mark.parametrize("check", QUICK)
def test_check_sees_its_bugs_and_no_others(run_of, check):
    said = {bug: CHECKS[check](run) for bug, run in run_of.items()}
    assert {bug for bug in said if said[bug]} == {bug for bug in TABLE if check in TABLE[bug]}, said
    assert all(row[check] in said[bug] for bug, row in TABLE.items() if check in row), said


def diagnosed_input(run) -> tuple:
    return run.engine.card["key"], run.model.info, tuple(run.data.labels), run.data.path


def test_diagnose_sees_its_bugs_and_no_others(run_of):
    said = {}
    for bug, run in run_of.items():
        what = diagnosed_input(run)
        if what not in said:  # bugs of the script's loop leave it the same engine, labels and images
            said[what] = CHECKS["diagnose"](run)
        assert said[what] == TABLE[bug].get("diagnose", ""), bug
    assert len(said) == 6  # of nine runs


def test_every_bug_has_its_check_and_every_check_a_bug():
    assert {bug: next(iter(row)) for bug, row in TABLE.items() if row} == SEEN_BY
    assert set(SEEN_BY) == set(BUGS) and set(SEEN_BY.values()) == set(CHECKS)
    assert len(BUGS) == 8


def test_run_without_a_bug_is_what_evaluate_says(run_of, shapes20):
    run = run_of[NO_BUG]
    found = evaluate(run.engine, shapes20, limit=IMAGES, device_batch_size=BATCH, progress=False)
    assert run.files == found.rows["file"].tolist() and run.labels == found.rows["label"].tolist()
    assert run.answers == found.rows["predicted_1"].tolist()
    assert run.report["top1"] == found.metrics["top1"]


def test_bug_shows_where_it_should_in_the_scripts_report(game, run_of):
    right, reports = run_of[NO_BUG].report, {bug: run.report for bug, run in run_of.items()}
    assert [reports[bug]["images"] for bug in (DROPPED, PADDED)] == [96, 104]
    assert {reports[bug]["images"] for bug in set(BUGS) - {DROPPED, PADDED}} == {IMAGES}
    for bug in (UNSYNCHRONISED, COMPILE, CALIBRATED, DROPPED, PADDED):
        assert reports[bug]["top1"] == pytest.approx(right["top1"], abs=0.04)
    assert reports[NORMALISED]["top1"] < right["top1"] - 0.1
    assert max(reports[bug]["top1"] for bug in (ILSVRC, AS_TEXT)) < 0.5
    assert reports[UNSYNCHRONISED]["images_per_s"] > 10 * right["images_per_s"]
    assert reports[COMPILE]["images_per_s"] < 0.5 * right["images_per_s"]
    assert list(game.reports.index) == list(game.runs) and list(game.reports.columns) == list(right)


def test_evaluate_says_itself_what_an_engine_was_calibrated_on(run_of, shapes20):
    engine, others = run_of[CALIBRATED].engine, copy.copy(shapes20)
    found = evaluate(engine, shapes20, limit=20, progress=False)
    assert found.metrics["calibrated_on_scored"] == 20 and "20 of them seen in calibration" in str(found)
    assert calibrated_on_scored(engine, shapes20, IMAGES) == CALIBRATION
    for name in ("files", "sizes", "labels", "offsets"):
        setattr(others, name, getattr(shapes20, name)[CALIBRATION:])
    assert calibrated_on_scored(engine, others, IMAGES) == 0
    assert calibrated_on_scored(run_of[NO_BUG].engine, shapes20, IMAGES) is None


def test_only_the_careless_script_has_a_switch_for_bugs():
    fronts = (vitdemo, vitdemo.imagenet, vitdemo.plots, vitdemo.course)
    public = {name: getattr(front, name) for front in fronts for name in front.__all__}
    functions = {name: value for name, value in public.items() if inspect.isfunction(value)}
    assert len(functions) > 50
    assert [name for name, value in functions.items() if "bug" in inspect.signature(value).parameters] == ["buggy_run"]


def test_seed_shuffles_the_runs(game):
    assert list(game.runs) == [NO_BUG, *game.bugs] == [NO_BUG, *(f"run {letter}" for letter in "ABCDEFGH")]
    assert sorted(game.bugs.values()) == sorted(BUGS) and list(game.bugs.values()) != list(BUGS)


def test_each_question_is_one_check_of_one_run(game):
    fresh = replace(game, asked={})
    assert fresh.ask("set_faults", NO_BUG) == f"{NO_BUG}, set_faults: nothing found"
    padded = next(run for run, bug in game.bugs.items() if bug == PADDED)
    assert fresh.ask("set_faults", padded) == f"{padded}, set_faults: {TABLE[PADDED]['set_faults']}"
    fresh.ask("set_faults", padded)
    assert len(fresh.asked) == 2, "the same question once more is no further one"
    for check, run in (("set_fault", NO_BUG), ("paid_once", "run Z")):
        with pytest.raises(VitdemoError, match=r"there is no '(set_fault|run Z)'; there are "):
            fresh.ask(check, run)


def test_the_transcript_has_for_each_run_the_check_that_sees_its_bug(game):
    found = game.transcript()
    assert found.index.tolist() == list(game.runs)
    assert found.loc[NO_BUG].tolist() == ["", ""]
    assert found["check"].drop(NO_BUG).to_dict() == {run: SEEN_BY[bug] for run, bug in game.bugs.items()}
    for run, bug in game.bugs.items():
        assert TABLE[bug][SEEN_BY[bug]] in found.loc[run, "says"]


def test_a_guess_is_scored_without_a_word_on_which_are_right(game):
    first, second, *_ = game.bugs
    assert game.score(game.bugs) == "8 of 8 are right"
    assert game.score(dict.fromkeys(game.bugs)) == game.score({}) == "0 of 8 are right"
    assert game.score(game.bugs | {first: game.bugs[second]}) == "7 of 8 are right"
    assert game.score({first: "a bad day"}) == f"{first}: 'a bad day' is none of the 8; take a name from BUGS"
    assert game.score({"run Z": DROPPED}) == "'run Z' is no run of this hunt"
    assert game.score({"run Z": None}) == "0 of 8 are right", "without OpenVINO there are fewer runs"


def test_hint_helps_without_giving_the_answer_away(game):
    assert game.hint(game.bugs) == ""
    first, second, *_ = game.bugs
    swapped = game.bugs | {first: game.bugs[second], second: game.bugs[first]}
    said = game.hint(swapped)
    assert said == f"6 of 8 are right; {first}: ask {SEEN_BY[game.bugs[first]]}"
    assert not [bug for bug in BUGS if bug in said]
    assert game.hint({}).startswith("0 of 8") and game.hint(dict.fromkeys(game.bugs)).startswith("0 of 8")
    assert game.hint({first: "a bad day"}).startswith(f"{first}: 'a bad day' is none of the 8; take a name from BUGS")


def test_without_openvino_two_bugs_are_left_out_and_said(vit_shapes20, shapes20, monkeypatch, capsys):
    def missing():
        raise VitdemoError("engine openvino: needs the package openvino")

    monkeypatch.setattr(find_engines()["openvino"], "check_requirements", missing)
    found = hunt(vit_shapes20, shapes20)
    assert len(found.runs) == 7 and sorted(found.bugs.values()) == sorted(set(BUGS) - {COMPILE, CALIBRATED})
    said = capsys.readouterr().out
    assert all(f"left out, {bug}: engine openvino: needs" in said for bug in (COMPILE, CALIBRATED))
    assert found.hint(found.bugs) == ""


@pytest.mark.skipif(not installed_version("openvino"), reason="needs openvino")
def test_a_build_that_is_timed_leaves_the_cache_alone(vit_shapes20, shapes20, tmp_path, monkeypatch):
    monkeypatch.setenv("VITDEMO_CACHE", str(tmp_path))
    convert(vit_shapes20, "openvino", "fp32")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    caches, build = [], OpenVINOEngine.build

    def watched(*arguments, **options):
        caches.append(os.environ["VITDEMO_CACHE"])
        build(*arguments, **options)

    monkeypatch.setattr(OpenVINOEngine, "build", watched)
    run = buggy_run(vit_shapes20, shapes20, COMPILE)
    assert CHECKS["paid_once"](run)
    assert caches == [str(tmp_path)], "other threads of the process would have looked into another cache meanwhile"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_bad_input_is_refused(vit_shapes20, shapes20):
    with pytest.raises(VitdemoError, match="bug 'gremlin': there is no such bug; there are 'dropped last batch', "):
        buggy_run(vit_shapes20, shapes20, "gremlin")
    few, folder = ImageNetVal(data_path("shapes20")), ImageNetVal(data_path("shapes20"))
    few.files, folder.source = few.files[:50], "folder"
    for data in (few, folder):
        with pytest.raises(VitdemoError, match="a tar with its devkit and at least 100 images; take the bundled"):
            buggy_run(vit_shapes20, data)
