"""Replicas of their own for each test: other numbers, hanging ones, broken engines, bad input; nothing left running."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import psutil
import pytest

from tests.inference.on_replicas import assert_same_predictions, evaluate_while, metrics_of, predictions, rows_of
from vitdemo import EngineFailure, ImageNetVal, Replicas, VitdemoError, convert, data_path, evaluate, extract
from vitdemo.engines.artifacts import artifacts_root
from vitdemo.engines.eager import EagerEngine
from vitdemo.inference import cluster
from vitdemo.machine import cores
from vitdemo.plots import plot_replicas

TAR = str(data_path("shapes20/shapes20_img_val.tar"))

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@pytest.mark.parametrize("replicas", [pytest.param(1, marks=pytest.mark.soak), 3])
def test_other_numbers_of_replicas(vit_shapes20, shapes20, tmp_path, replicas, alone):
    engine = convert(vit_shapes20, "eager", "fp32")
    run = evaluate(engine, shapes20, limit=203, replicas=replicas, out=tmp_path / "out", progress=False)
    assert_same_predictions(run, alone)
    assert run.metrics["replicas"]["count"] == replicas


def test_a_replica_that_hangs_is_replaced(one_thread, shapes20, alone, tmp_path):
    with Replicas(one_thread, shapes20, 2, cores_each=1, deadline_s=8) as pool:
        first = pool.pids[0]
        stop, out = partial(os.kill, first, signal.SIGSTOP), tmp_path / "out"
        run = evaluate_while(pool, one_thread, shapes20, stop, 8, out, limit=203)
        assert run.metrics["replicas"]["each"][0]["lost"] >= 1 and pool.pids[0] != first
    replica, at_s, images = run.metrics["replicas"]["losses"][0]
    assert replica == 0 and 0 < at_s < run.metrics["wall_s"] and 0 < images < 203
    ax = plot_replicas({"hung": run}).axes[0]
    (lost,) = [bar for bar in ax.patches if bar.get_hatch()][:1]
    assert lost.get_x() + lost.get_width() == pytest.approx(at_s) and f"lost {images} images" in ax.get_title("left")
    assert predictions(run) == predictions(alone)
    assert not psutil.pid_exists(first) or psutil.Process(first).status() == psutil.STATUS_ZOMBIE


class BreaksAtTheThird(EagerEngine):
    """An engine that raises on one batch, wherever it runs."""

    def _infer(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:
            raise RuntimeError("device lost")
        return super()._infer(x)


class Suicidal(EagerEngine):
    """Takes its process along."""

    def _infer(self, x):
        os.kill(os.getpid(), signal.SIGKILL)


def broken(engine, cls):
    """``engine``, whose replicas are of another class."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    other = cls(engine.recipe.model, "fp32", device="cpu", threads=1)
    other.card, other.recipe = engine.card, replace(engine.recipe, cls=cls)
    return other


def test_an_engine_that_raises_makes_the_run_invalid(one_thread, shapes20, tmp_path):
    engine = broken(one_thread, BreaksAtTheThird)
    with pytest.raises(EngineFailure, match="device lost"):
        evaluate(engine, shapes20, limit=203, replicas=2, out=tmp_path / "out", progress=False)
    metrics = metrics_of(tmp_path / "out")
    assert metrics["valid"] is False and "device lost" in metrics["error"]


@pytest.mark.soak
def test_an_artifact_that_the_cache_has_lost_is_built_by_the_replica(vit_shapes20, shapes20, tmp_path):
    engine = convert(vit_shapes20, "onnx", "fp32", threads=1)
    alone = evaluate(engine, shapes20, limit=19, out=tmp_path / "alone", progress=False)
    shutil.rmtree(artifacts_root() / engine.recipe.folder_name)
    run = evaluate(engine, shapes20, limit=19, replicas=1, out=tmp_path / "out", progress=False)
    assert run.rows[["file", "label", "predicted_1"]].equals(alone.rows[["file", "label", "predicted_1"]])
    assert (artifacts_root() / engine.recipe.folder_name).is_dir()


@pytest.mark.soak
def test_a_folder_of_images(one_thread, shapes20, alone, tmp_path):
    extract(data_path("shapes20"), tmp_path / "extracted")
    folder = ImageNetVal(tmp_path / "extracted")
    run = evaluate(one_thread, folder, limit=203, replicas=2, out=tmp_path / "out", progress=False)
    assert_same_predictions(run, alone)


def test_replicas_that_die_again_and_again_end_the_run(one_thread, shapes20, tmp_path):
    engine = broken(one_thread, Suicidal)
    with pytest.raises(VitdemoError, match="was lost 3 times, last while doing images 0 to 7") as caught:
        evaluate(engine, shapes20, limit=64, replicas=1, out=tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)
    resumed = evaluate(one_thread, shapes20, limit=64, out=tmp_path / "out", resume=True, progress=False)
    assert resumed.metrics["images"] == 64


def test_data_that_a_replica_does_not_find(one_thread, shapes20):
    elsewhere = ImageNetVal(shapes20.path)
    elsewhere.opened = ("/nowhere/val", "val", None)
    with pytest.raises(VitdemoError, match="^replica on .*: /nowhere/val"):
        evaluate(one_thread, elsewhere, limit=8, replicas=1, progress=False)


def test_a_second_pool_finds_no_cpus(one_thread, shapes20, monkeypatch):
    monkeypatch.setattr(cluster, "FREE_S", 0.5)
    with Replicas(one_thread, shapes20, 1), pytest.raises(VitdemoError, match=f"Ray has 0.0 of the {cores()}.0 CPUs"):
        Replicas(one_thread, shapes20, 2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"replicas": 0}, "replicas 0"),
        ({"replicas": "two"}, "replicas 'two'"),
        ({"replicas": 2, "schedule": "even"}, "schedule 'even': is not one of async, sync"),
        ({"replicas": 2, "ray_address": "127.0.0.1:1"}, "ray_address '127.0.0.1:1': nothing answers"),
        ({"replicas": 2, "ray_address": "head"}, "ray_address 'head': nothing answers"),
        ({"ray_address": "127.0.0.1:1"}, "ray_address are for replicas"),
        ({"schedule": "sync"}, "schedule and ray_address are for replicas"),
    ],
)
def test_bad_input_before_anything_is_started(one_thread, shapes20, tmp_path, options, message):
    begin = time.monotonic()
    with pytest.raises(VitdemoError, match=message):
        evaluate(one_thread, shapes20, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and time.monotonic() - begin < 10


def test_without_ray_one_line_says_what_to_install(one_thread, shapes20, monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(VitdemoError, match="pip install ray"):
        evaluate(one_thread, shapes20, replicas=2, out=tmp_path / "out")


AGENTS = ("ray::DashboardA", "ray::RuntimeEnv")  # Ray's idle helpers, which end by themselves a minute later


def started_by(pid: int) -> list[psutil.Process]:
    """What a process has started and must not leave behind: Ray, and above all the replicas."""
    children = psutil.Process(pid).children(recursive=True)
    kept = []
    for child in children:
        with suppress(psutil.NoSuchProcess):  # gone since
            kept += [child] * (not child.name().startswith(AGENTS))
    return kept


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_running_and_the_run_resumes(how, vit_shapes20, tmp_path, alone):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vitdemo", "evaluate", "vit_shapes20", "--data", TAR, "--out", str(out)]
    command += ["--replicas", "2", "--limit", "203"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while rows_of(out) < 8:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        theirs = started_by(process.pid)
        process.send_signal(how)
        error = process.communicate(timeout=120)[1]
    assert theirs and (how == signal.SIGKILL or (process.returncode == 130 and "--resume goes on" in error)), error
    gone, alive = psutil.wait_procs(theirs, timeout=60)
    assert not alive
    engine = convert(vit_shapes20, "eager", "fp32")
    resumed = evaluate(engine, ImageNetVal(TAR), limit=203, out=out, resume=True, progress=False)
    assert_same_predictions(resumed, alone)


TWO_NODES = """
import json, os, signal, sys
from functools import partial
from pathlib import Path
from ray.cluster_utils import Cluster
from tests.inference.on_replicas import evaluate_while
from vitdemo import ImageNetVal, Replicas, convert, load_model, stop_ray

cluster = Cluster()
def add_node(**options):  # Ray gives a node 30 s to start, which a busy machine may need more than once
    for attempt in range(3):
        try:
            return cluster.add_node(num_cpus=1, **options)
        except Exception as error:
            print("again:", error)
    raise SystemExit("no node started")
add_node(include_dashboard=False)
second = add_node()
engine, data = convert(load_model("vit_shapes20"), threads=1), ImageNetVal(sys.argv[1])
with Replicas(engine, data, 2, cores_each=1, ray_address=cluster.address) as pool:
    nodes = [slot.share.node for slot in pool.slots]
    kill = partial(os.kill, pool.pids[nodes.index(second.node_id)], signal.SIGKILL)
    run = evaluate_while(pool, engine, data, kill, 40, Path(sys.argv[2]), limit=203)
    lost = run.metrics["replicas"]["lost"]
print(json.dumps({"nodes": len(set(nodes)), "lost": lost, "said": str(pool)}), flush=True)
stop_ray()
cluster.shutdown()
"""


def test_a_cluster_of_two_nodes_loses_a_replica_on_the_second(alone, tmp_path):
    command = [sys.executable, "-c", TWO_NODES, TAR, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["nodes"] == 2 and found["lost"] == 1
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == predictions(alone)
