"""What the tests of runs share, with and without replicas."""

import json
import threading
from pathlib import Path

from vitdemo import evaluate


def predictions(run) -> bytes:
    return (run.out / "predictions.csv").read_bytes()


def metrics_of(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def as_json(metrics: dict) -> dict:
    """As a file gives them back."""
    return json.loads(json.dumps(metrics))


def assert_same_predictions(run, alone):
    """With other threads sums come out in another order: a top-1 may only change between equals."""
    assert run.rows[["file", "label", "error"]].equals(alone.rows[["file", "label", "error"]])
    assert (run.rows["probability_1"] - alone.rows["probability_1"]).abs().max() < 1e-4
    assert run.rows["predicted_1"].equals(alone.rows["predicted_1"])


def rows_of(out) -> int:
    """How many rows are on disk."""
    path = out / "predictions.csv"
    return path.read_text().count("\n") - 1 if path.exists() else -1


def evaluate_while(pool, engine, data, act, rows: int, out, **options):
    """``evaluate`` on ``pool``, during which ``act`` is called once, as soon as so many rows are on disk."""
    ended = threading.Event()

    def wait_and_act():
        while rows_of(out) < rows and not ended.wait(0.005):
            pass
        if not ended.is_set():
            act()

    watcher = threading.Thread(target=wait_and_act)
    watcher.start()
    try:
        return evaluate(engine, data, replicas=pool, out=out, progress=False, **options)
    finally:
        ended.set()
        watcher.join()
