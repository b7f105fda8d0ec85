"""Replicas: the same rows as on one device, exactly once, also when some are killed."""

import os
import random
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec

import psutil
import pytest

from tests.inference.on_replicas import as_json, evaluate_while, metrics_of, predictions
from vitdemo import Replicas, VitdemoError, evaluate
from vitdemo.machine import cores

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture(scope="module")
def pool(one_thread, shapes20):
    with Replicas(one_thread, shapes20, 2, cores_each=1, deadline_s=20, share=0.5) as pool:
        yield pool


@pytest.mark.parametrize("schedule", ["async", "sync"])
def test_two_replicas_give_the_file_of_one_device(pool, alone, one_thread, shapes20, tmp_path, schedule):
    run = evaluate(
        one_thread, shapes20, limit=203, replicas=pool, schedule=schedule, out=tmp_path / "out", progress=False
    )
    assert predictions(run) == predictions(alone)  # 203 = 25 batches of 8, and 3
    m, found = run.metrics, run.metrics["replicas"]
    assert (m["images"], m["session_images"], m["top1"]) == (203, 203, alone.metrics["top1"])
    assert (found["count"], found["schedule"], found["lost"]) == (2, schedule, 0)
    assert sum(each["images"] for each in found["each"]) == 203 and all(each["images"] for each in found["each"])
    assert all(0 <= each["idle_s"] < m["wall_s"] and each["busy_s"] > 0 for each in found["each"])
    assert found["step_ms"]["count"] == (13 if schedule == "sync" else 0)  # of 16 images
    assert m["images_per_s"] == pytest.approx(203 / m["wall_s"]) and m["threads"] == 1
    assert sorted(set(run.times["replica"])) == [0, 1] and len(run.times) == 26
    assert run.times["decode_began"].min() >= 0 and run.times["finished"].max() <= m["wall_s"]
    assert metrics_of(run.out) == as_json(m)


def test_each_replica_is_bound_to_its_cores(pool):
    bound = [sorted(psutil.Process(pid).cpu_affinity()) for pid in pool.pids]
    assert bound == [slot.cores for slot in pool.slots] and all(len(each) == 1 for each in bound)
    assert bound[0] != bound[1] and {core for (core,) in bound} <= os.sched_getaffinity(0)
    assert pool.threads == 1 and "2 on 2 cores of this machine" in str(pool)


def kill_one(pool, moments: random.Random):
    slot = moments.choice([slot for slot in pool.slots if slot.pid])
    os.kill(slot.pid, signal.SIGKILL)


def kill_and_compare(pool, engine, data, alone, out, seed: int) -> int:
    """A run with a replica killed at a random moment; how many were lost."""
    moments = random.Random(seed)
    options = dict(limit=203, schedule=moments.choice(["async", "async", "sync"]))
    run = evaluate_while(pool, engine, data, lambda: kill_one(pool, moments), moments.randrange(190), out, **options)
    assert predictions(run) == predictions(alone)
    assert sum(each["images"] for each in run.metrics["replicas"]["each"]) == 203
    return run.metrics["replicas"]["lost"]


def test_killed_replicas_cost_no_image(pool, one_thread, shapes20, alone, tmp_path):
    lost = [kill_and_compare(pool, one_thread, shapes20, alone, tmp_path / str(seed), seed) for seed in range(3)]
    print(f"{sum(lost)} replicas lost in {len(lost)} runs")
    assert sum(lost) >= 2  # the last one may strike one that has nothing left to do


@pytest.mark.soak
def test_fifty_runs_with_a_replica_killed(pool, one_thread, shapes20, alone, tmp_path):
    lost = [kill_and_compare(pool, one_thread, shapes20, alone, tmp_path / str(seed), seed) for seed in range(3, 53)]
    print(f"{sum(lost)} replicas lost in {len(lost)} runs, all exact")
    assert sum(lost) >= 40


@pytest.mark.soak
@pytest.mark.parametrize("schedule", ["async", "sync"])
def test_eight_replicas_share_two_cores(pool, one_thread, shapes20, alone, tmp_path, schedule):
    with Replicas(one_thread, shapes20, 8, cores_each=1, share=0.5) as eight:
        assert f"8 on {min(8, cores())} cores of this machine" in str(eight)
        options = dict(limit=203, schedule=schedule, progress=False)
        run = evaluate(one_thread, shapes20, replicas=eight, out=tmp_path / "out", **options)
    assert predictions(run) == predictions(alone)


def test_replicas_have_the_priority_of_this_process(pool):
    assert [psutil.Process(pid).nice() for pid in pool.pids] == [psutil.Process().nice()] * len(pool.pids)


@pytest.mark.parametrize("package", ["vitdemo", "torch"])
def test_another_installation_on_a_node_is_said(pool, package):
    slot = pool.slots[0]
    there = slot.place.installed | {package: "0.0"}
    with pytest.raises(VitdemoError, match=f"^replica on far: has another {package}; install the same$"):
        pool._place(slot, slot.place._replace(host="far", installed=there))


def test_another_cluster_than_the_one_in_use_is_refused(pool, one_thread, shapes20):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(VitdemoError, match=f"ray_address '{address}': this process has the Ray at .*stop_ray"):
            Replicas(one_thread, shapes20, 1, ray_address=address)


def test_replicas_of_another_engine_are_refused(pool, eager, shapes20):
    with pytest.raises(VitdemoError, match="started for another engine"):
        evaluate(eager, shapes20, replicas=pool, progress=False)


@pytest.mark.soak
def test_a_step_says_when_a_replica_is_lost(pool, one_thread, shapes20):
    with Replicas(one_thread, shapes20, 2, cores_each=1, share=0.5) as two:
        assert 0 < two.step(8) < 60
        os.kill(two.pids[1], signal.SIGKILL)
        with pytest.raises(VitdemoError, match="^a replica was lost: [^\n]*$"):
            two.step(8)


def test_a_replica_can_take_its_cores_before_torch_counts_them():
    code = "import sys, vitdemo.inference.actor; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
