"""A sweep measures what it says, whatever breaks on the way, and goes on where it was stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver

import numpy as np
import pandas as pd
import psutil
import pytest
import timm
import torch

from tests.benchmarking.conftest import OPTIONS, PAIRS
from tests.native import is_native
from vitdemo import ImageNetVal, VitdemoError, benchmark, convert, data_path, evaluate, find_engines, load_model, merge
from vitdemo.benchmarking import sweeps as arms
from vitdemo.benchmarking.bench import Failed, until_stable
from vitdemo.benchmarking.files import PATTERN
from vitdemo.benchmarking.gate import FINE, GONE, STALE, WORSE, check_baseline, check_share, compare, passes
from vitdemo.benchmarking.pairs import EAGER, Pair, choose_pairs
from vitdemo.benchmarking.processes import Worker
from vitdemo.benchmarking.rows import COLUMNS, Measured, rows_of
from vitdemo.cli import PARSER, main

SHORT = dict(row_budget_s=0.5, images=8)


def only_row(out, **options) -> dict:
    """Of a short sweep of eager fp32 at batch 2."""
    options |= SHORT | dict(engines="eager:fp32", device_batch_sizes=[2])
    (row,) = benchmark("vit_shapes20", out=out, **options).to_dict("records")
    return row


def pair_of(rows: pd.DataFrame) -> pd.Series:
    return rows["engine"] + ":" + rows["precision"]


def test_a_row_for_every_pair_and_batch(rows):
    assert list(zip(pair_of(rows), rows["device_batch_size"], strict=True)) == [(p, b) for b in (1, 3) for p in PAIRS]
    assert set(rows["status"]) == {"ok"} and set(rows["turns"]) == {"together"}
    assert set(COLUMNS) <= set(rows)
    stems = {re.sub("_(low|high|pairs)$", "", name) for name in COLUMNS}
    assert stems <= set(re.findall(r"``(\w+)``", benchmark.__doc__)), "each column is described"


def test_rates_are_total_over_total(rows):
    assert np.allclose(rows["images_per_s"], rows["batch"] / rows["mean_ms"] * 1e3, rtol=1e-3)
    assert (rows["p50_ms"] <= rows["p90_ms"]).all() and (rows["p90_ms"] <= rows["p99_ms"]).all()
    flops = load_model("vit_shapes20").info.flops_per_image
    assert np.allclose(rows["tflops"], rows["images_per_s"] * flops / 1e12)
    spent_s = rows["calls"] * rows["mean_ms"] / 1e3
    whole = rows["speedup_over_eager_fp32_pairs"] == 9
    assert (whole | (spent_s.groupby(rows["device_batch_size"]).transform("max") > OPTIONS["row_budget_s"])).all()


def test_only_the_first_batch_size_is_cold(rows):
    cold, warm = rows[rows["device_batch_size"] == 1], rows[rows["device_batch_size"] == 3]
    assert np.allclose(cold["compile_s"].astype(float), cold["first_run_s"].astype(float) - cold["second_run_s"])
    assert (cold["first_run_s"].astype(float) > cold["load_s"]).all()
    assert (rows["streams"] == 1).all(), "single calls"
    assert set(warm["compile_s"]) == set(warm["first_run_s"]) == {"warm"}


def test_a_speedup_is_over_eager_of_the_same_batch(rows):
    eager = rows[rows["engine"] == "eager"]
    assert np.allclose(eager["speedup_over_eager_fp32"], 1)
    for _, row in rows.iterrows():
        low, high = row["speedup_over_eager_fp32_low"], row["speedup_over_eager_fp32_high"]
        assert low <= row["speedup_over_eager_fp32"] <= high
        assert np.isnan(row["speedup_equal_precision"]) == (row["precision"] == "int8")  # eager has no int8


def test_a_ratio_is_the_median_of_its_rounds():
    info, none = load_model("vit_shapes20").info, pd.DataFrame(columns=COLUMNS)
    fp32, int8 = ({"device": "cpu", "precision_ran": {precision: 0.9}} for precision in ("fp32", "int8"))
    slow = Measured(Pair("eager", "fp32"), 2, fp32, rounds=[[0.4, 0.2], [0.8], [0.4]], roof=[np.nan] * 3)
    fast = Measured(Pair("onnx", "int8"), 2, int8, rounds=[[0.1], [0.1], []], roof=[1e12, 2e12, 1e12])
    eager, onnx = rows_of([slow, fast], info, none, "together").to_dict("records")
    assert (eager["images_per_s"], eager["calls"]) == (pytest.approx(8 / 1.8), 4)
    assert onnx["speedup_over_eager_fp32"] == pytest.approx((3 + 8) / 2)
    assert onnx["speedup_over_eager_fp32_pairs"] == 2 and np.isnan(onnx["speedup_over_eager_fp32_low"]), "of 2 rounds"
    assert np.isnan(onnx["speedup_equal_precision"]) and np.isnan(eager["of_roof"])
    rate = 2 * info.flops_per_image / 0.1
    assert onnx["of_roof"] == pytest.approx((rate / 1e12 + rate / 2e12) / 2)
    assert onnx["tflops"] == pytest.approx(rate / 1e12) and onnx["mfu"] == pytest.approx(rate / 1e12)


def test_equal_precision_is_what_ran_on_the_same_device():
    info, none = load_model("vit_shapes20").info, pd.DataFrame(columns=COLUMNS)
    eager = Measured(Pair("eager", "bf16"), 1, {"device": "cpu", "precision_ran": {"bf16": 1.0}}, rounds=[[0.4]])

    def ratio(speedup="speedup_equal_precision", **facts):
        other = Measured(Pair("openvino", "bf16"), 1, facts, rounds=[[0.1]], roof=[1e12])
        eager.roof = [1e12]
        return rows_of([eager, other], info, none, "together")[speedup].iloc[1]

    assert ratio(device="cpu", precision_ran={"bf16": 0.98, "fp32": 0.02}) == pytest.approx(4)
    assert np.isnan(ratio(device="cpu", precision_ran={"fp32": 1.0})), "a CPU without bf16 ran fp32"
    assert np.isnan(ratio(device="cpu", precision_ran={"bf16 emulated": 1.0})), "it is no speedup of the engine's"
    assert np.isnan(ratio(device="cuda", precision_ran={"bf16": 1.0}))

    eager.pair = EAGER
    assert ratio("speedup_over_eager_fp32", device="cpu") == pytest.approx(4)
    assert np.isnan(ratio("speedup_over_eager_fp32", device="cuda")), "a GPU's speed over a processor's"

    eager.pair = Pair("eager", "bf16")
    before = rows_of([eager], info, none, "together")

    def alone(**facts):
        other = Measured(Pair("openvino", "bf16"), 1, facts, rounds=[[0.1]], roof=[1e12])
        return rows_of([other], info, before, "alone")["speedup_equal_precision"].iloc[0]

    assert alone(device="cpu", precision_ran={"bf16": 0.98}) == pytest.approx(4)
    assert np.isnan(alone(device="cpu", precision_ran={"fp32": 1.0}))


def test_the_accuracy_is_that_of_evaluate(rows):
    model = load_model("vit_shapes20")
    data = ImageNetVal(data_path("shapes20"))
    for pair in ("eager:fp32", "openvino:int8"):
        engine = convert(model, *pair.split(":"))
        found = evaluate(engine, data.take(range(0, 1000, 25)), progress=False).metrics
        own = rows[pair_of(rows) == pair]
        assert set(own["top1"]) == {found["top1"]} and set(own["images"]) == {40}
        assert set(own["artifact"]) == {engine.card["key"]}
    assert rows.loc[rows["precision"] == "fp32", "relative_l2"].max() < 1e-4 < rows["relative_l2"].max()


def test_the_share_of_the_roof(rows):
    assert (rows["of_roof"] > 0).all() and not (rows["of_roof_low"] > rows["of_roof_high"]).any()


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    """A sweep with random weights whose calls all take longer than they may, and its folder."""
    folder = tmp_path_factory.mktemp("skipped")
    options = dict(engines="eager:fp32", weights="random", device_batch_sizes=[1, 2], row_budget_s=1e-4)
    return benchmark("resnet18", out=folder, **options), folder


def test_random_weights_have_no_accuracy_and_say_how_to_get_one(skipped):
    rows, folder = skipped
    assert rows["top1"].isna().all()
    said, _, command = rows["accuracy"].iloc[0].partition(": vitdemo ")
    assert said == "not measured (random weights, no images)"
    asked = PARSER.parse_args(command.split())
    assert asked.model == "resnet18.a1_in1k" and timm.is_model_pretrained(asked.model)
    (record,) = folder.glob("perf_resnet18_random-*.json")
    assert json.loads(record.read_text())["machine"]["cores"]


def test_the_command_for_an_accuracy_names_the_weights_of_a_file(tmp_path):
    torch.save(timm.create_model("test_vit.r160_in1k", num_classes=3).state_dict(), tmp_path / "w.pth")
    options = dict(engines="eager:fp32", device_batch_sizes=[1], row_budget_s=1e-4, out=tmp_path)
    (said,) = benchmark("test_vit", weights=tmp_path / "w.pth", **options)["accuracy"]
    asked = PARSER.parse_args(said.partition(": vitdemo ")[2].split())
    assert (asked.model, asked.weights) == ("test_vit", "w.pth")


def test_an_iteration_beyond_the_budget_skips_its_row_and_the_larger_ones(skipped):
    first, second = skipped[0]["status"]
    assert re.fullmatch(r"skipped: [\d.e-]+ s a batch", first)
    assert re.fullmatch(r"skipped: batch 1 took [\d.e-]+ s", second)
    assert skipped[0]["images_per_s"].isna().all()


BROKEN = """
import os, signal, time
import vitdemo.engines.openvino as module
infer = module.OpenVINOEngine._infer
def broken(self, x):
    {what}
    return infer(self, x)
module.OpenVINOEngine._infer = broken
"""
THREE_WAYS = """if len(x) == 2 and self.precision == 'fp32': raise MemoryError
    if len(x) == 2 and self.precision == 'bf16': raise RuntimeError('no such kernel')
    if len(x) == 2 and self.precision == 'int8': os.kill(os.getpid(), signal.SIGKILL)"""


@pytest.fixture
def break_openvino(tmp_path, monkeypatch):
    """Change OpenVINO's engine in the workers, by a module that Python imports at its start."""

    def apply(what: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(BROKEN.format(what=what))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        forkserver._forkserver._stop()  # the next one, which starts with the next worker, imports it

    yield apply
    forkserver._forkserver._stop()


def test_what_fails_is_a_row_and_the_sweep_goes_on(tmp_path, break_openvino):
    break_openvino(THREE_WAYS)
    rows = benchmark("vit_shapes20", engines="openvino", device_batch_sizes=[1, 2, 4], out=tmp_path / "out", **SHORT)
    status = rows.set_index([pair_of(rows), "batch"])["status"]
    assert status["openvino:fp32", 2].startswith("failed: out of memory")
    if is_native("openvino", "bf16"):
        assert status["openvino:bf16", 2] == "failed: no such kernel"
    assert status["openvino:int8", 2].startswith("failed: its process ended (killed, perhaps because memory ran out: ")
    for precision in find_engines()["openvino"].native():
        assert status[f"openvino:{precision}", 1] == "ok"
        assert status[f"openvino:{precision}", 4] == "skipped: batch 2 failed"
    assert set(rows.loc[rows["engine"] == "eager", "status"]) == {"ok"}


def test_the_gate_sees_a_planted_slowdown(rows, tmp_path, break_openvino):
    same = compare(rows, rows)
    assert passes(same) and set(same["verdict"]) == {FINE} and len(same) == 4
    break_openvino("end = time.perf_counter() + 0.3\n    while time.perf_counter() < end: pass")
    options = OPTIONS | dict(engines="openvino:fp32", row_budget_s=1.0)
    slowed = benchmark("vit_shapes20", out=tmp_path / "out", **options)
    found = compare(slowed, rows)
    assert set(found["verdict"]) == {WORSE} and not passes(found)
    other_way = compare(rows, slowed)
    assert set(other_way["verdict"]) == {STALE} and passes(other_way)
    lost = compare(slowed.assign(status="failed: no such kernel"), rows)
    assert set(lost["verdict"]) == {GONE} and not passes(lost)


def test_the_gate_in_ci_ends_with_1_and_says_what_it_compares(rows, tmp_path, capsys):
    def gate(name, ratio, **columns):
        baseline = rows.assign(speedup_over_eager_fp32=ratio, **columns)
        baseline.to_csv(tmp_path / name, index=False)
        sizes = "3" if name == "none.csv" else "1"
        command = ["benchmark", "vit_shapes20", "--engines", "openvino:fp32", "--device-batch-sizes", sizes]
        command += ["--row-budget-s", "0.5", "--images", "8", "--out", str(tmp_path / "out")]
        return main([*command, "--against", str(tmp_path / name)]), capsys.readouterr()

    code, said = gate("worse.csv", 1000.0)
    assert code == 1 and WORSE in said.out and "another machine" not in said.err
    code, said = gate("better.csv", 0.001, machine="a faster one")
    assert code == 0 and STALE in said.out and "the baseline is from another machine" in said.err
    sweeps = len(list((tmp_path / "out").glob(PATTERN)))
    code, said = gate("none.csv", 1.0, device_batch_size=7)
    assert code == 2 and "the baseline has no row of the same model, weights, engine" in said.err
    code, said = gate("none.csv", 1.0, device_batch_size=3, model="another")
    assert code == 2 and "the baseline has no row of the same model, weights, engine" in said.err
    assert len(list((tmp_path / "out").glob(PATTERN))) == sweeps, "it was found before anything was measured"


def test_the_gate_refuses_what_it_cannot_compare(rows):
    with pytest.raises(VitdemoError, match="no row of the same"):
        compare(rows.assign(device_batch_size=7), rows)
    with pytest.raises(VitdemoError, match="no row of the same"):
        compare(rows, rows.assign(replicas=np.nan))  # a file of others, or of an older vitdemo
    with pytest.raises(VitdemoError, match="several machines"):
        check_baseline(pd.concat([rows, rows.assign(machine="another")]))
    unmeasured = rows.assign(speedup_over_eager_fp32=[np.nan, *rows["speedup_over_eager_fp32"][1:]])
    assert passes(compare(unmeasured, unmeasured)), "what had no ratio before needs none now"
    with pytest.raises(VitdemoError, match="between 0 and 1"):
        check_share(1.5)


def test_a_pair_without_room_beside_the_others_runs_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "free_memory_bytes", lambda: 1.2 * (1 << 30))
    rows = benchmark("vit_shapes20", engines="openvino:fp32", device_batch_sizes=[2], out=tmp_path, **SHORT)
    assert dict(zip(pair_of(rows), rows["turns"], strict=True)) == {"eager:fp32": "together", "openvino:fp32": "alone"}
    alone = rows[rows["turns"] == "alone"].iloc[0]
    assert alone["speedup_equal_precision"] > 0 and np.isnan(alone["speedup_equal_precision_low"])


def test_a_killed_sweep_leaves_nothing_running_and_is_joined_with_another(tmp_path):
    command = [sys.executable, "-m", "vitdemo", "benchmark", "vit_shapes20", "--engines", "eager:fp32", "--images", "8"]
    command += ["--device-batch-sizes", "1,2,4", "--row-budget-s", "1", "--out", str(tmp_path)]
    said = tmp_path / "said.txt"
    with open(said, "w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    end = time.monotonic() + 90
    while not list(tmp_path.glob(PATTERN)) and time.monotonic() < end:
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert (
        len([each for each in workers if "vitdemo.benchmarking" in str(each.cmdline())]) == 3
    )  # eager's, roof, server
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs(workers, timeout=60)[1] == [] and "Traceback" not in said.read_text()
    left = merge([tmp_path])["device_batch_size"].tolist()
    missing = [size for size in (1, 2, 4) if size not in left]
    benchmark("vit_shapes20", engines="eager:fp32", device_batch_sizes=missing, out=tmp_path, **SHORT)
    assert left and merge([tmp_path])["device_batch_size"].tolist() == [1, 2, 4]


def test_a_roof_that_dies_costs_its_share_alone(tmp_path, monkeypatch):
    ask = Worker.ask

    def killing(self, name, *arguments):
        if name == "flops_per_s":
            self._process.kill()
        return ask(self, name, *arguments)

    monkeypatch.setattr(Worker, "ask", killing)
    row = only_row(tmp_path)
    assert row["status"] == "ok" and row["images_per_s"] > 0 and np.isnan(row["of_roof"])


@pytest.mark.parametrize(("call_s", "seconds", "calls"), [(0.4, 1.0, 2), (0.1, 1.0, 3), (2.0, 1.0, 1)])
def test_warming_up_ends_when_calls_are_equal_or_the_time_is_over(call_s, seconds, calls):
    assert until_stable(lambda: call_s, seconds) == [call_s] * calls


def test_workers_end_with_the_process_that_started_them_and_it_is_said():
    worker = Worker()
    worker.ask("roof", [], "cpu")
    server = psutil.Process(worker._process.pid).parent()
    own = server.children()
    server.kill()
    assert len(own) == 1 and psutil.wait_procs(own, timeout=60)[1] == []
    with pytest.raises(Failed, match="its process ended .together with the process that starts the others"):
        worker.ask("explore", "fp32")
    after = Worker()
    after.ask("roof", [], "cpu")  # another server has started it
    after.end()


SCRIPT = """
import os
from vitdemo import convert, load_model
from vitdemo.benchmarking.processes import Worker
print("run")
ticket = convert(load_model("vit_shapes20"), "openvino", "fp32").recipe.ticket()
Worker().ask("engine", ticket, 1)
os.environ["VITDEMO_CACHE"] = "/nowhere"
Worker().ask("engine", ticket, 1)
"""


def test_a_script_is_not_run_again_and_a_worker_has_the_environment_of_its_start(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert done.stdout == "run\n" and "/nowhere" in done.stderr.splitlines()[-1]


def test_replicas_share_each_batch(tmp_path):
    pytest.importorskip("ray")
    row = only_row(tmp_path, replicas=2)
    assert (row["status"], row["replicas"], row["device_batch_size"], row["batch"]) == ("ok", 2, 2, 4)
    assert row["images_per_s"] == pytest.approx(4 / row["mean_ms"] * 1e3, rel=1e-3)
    assert 0 < row["top1"] <= 1 and row["images"] == 8


def test_replicas_need_no_data(tmp_path):
    pytest.importorskip("ray")
    options = dict(weights="random", engines="eager:fp32", device_batch_sizes=[1], replicas=1, row_budget_s=0.2)
    rows = benchmark("test_vit.r160_in1k", **options, out=tmp_path)
    assert rows["status"].tolist() == ["ok"] and rows["top1"].isna().all()


@pytest.fixture
def bf16_is(monkeypatch):
    """Have every engine answer that bf16 is native, emulated or absent."""

    def apply(support: str) -> None:
        for cls in find_engines().values():
            answers = {each: support if each == "bf16" else "native" for each in cls.support("cpu")}
            monkeypatch.setattr(cls, "support", lambda device, answers=answers: answers)

    return apply


def named(engines: str | None) -> list[str]:
    return list(map(str, choose_pairs(engines)))


def test_eager_is_always_beside_in_fp32_and_in_each_precision_it_has(bf16_is):
    bf16_is("native")
    assert named("openvino:bf16, onnx:int8") == ["eager:fp32", "eager:bf16", "openvino:bf16", "onnx:int8"]
    assert named("openvino")[2:] == ["openvino:fp32", "openvino:bf16", "openvino:int8"]
    known = {name: cls for name, cls in find_engines().items() if name != "null"}
    assert set(named(None)) == {f"{name}:{each}" for name, cls in known.items() for each in cls.support("cpu")}


@pytest.mark.parametrize("support", ["emulated", "absent"])
def test_a_precision_that_is_not_native_is_taken_only_where_it_is_named(bf16_is, support):
    bf16_is(support)
    assert named("openvino") == ["eager:fp32", "openvino:fp32", "openvino:int8"]
    assert {pair.precision for pair in choose_pairs(None)} == {"fp32", "int8"}
    assert named("openvino:bf16") == ["eager:fp32", "openvino:bf16"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (dict(device_batch_sizes=[0]), "device_batch_sizes 0: must be"),
        (dict(device_batch_sizes=["four"]), "device_batch_sizes 'four': must be"),
        (dict(device_batch_sizes=[]), "there are none"),
        (dict(engines="tensorrt"), "engines 'tensorrt': there is no such engine; there are eager"),
        (dict(engines="openvino:fp8"), "the openvino engine has fp32, bf16, int8"),
        (dict(row_budget_s=0), "row_budget_s 0: must be more"),
        (dict(row_budget_s=float("nan")), "row_budget_s nan: must be more"),
        (dict(weights="random", data="somewhere"), "data somewhere: random weights"),
        (dict(replicas=0), "replicas 0: must be"),
        (dict(images=0), "images 0: must be"),
    ],
)
def test_refuses_what_cannot_be_measured_before_anything_runs(options, what, tmp_path):
    with pytest.raises(VitdemoError, match=what):
        benchmark("vit_shapes20", out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
