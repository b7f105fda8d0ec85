"""What the tests of replicas share."""

import threading

from vitdemo import evaluate


def predictions(run) -> bytes:
    return (run.out / "predictions.csv").read_bytes()


def assert_same_predictions(run, alone):
    """With other threads sums come out in another order: a top-1 may only change between equals."""
    assert run.rows[["file", "label", "error"]].equals(alone.rows[["file", "label", "error"]])
    assert (run.rows["probability_1"] - alone.rows["probability_1"]).abs().max() < 1e-4
    assert run.rows["predicted_1"].equals(alone.rows["predicted_1"])


def evaluate_while(pool, engine, data, act, after_s: float, **options):
    """``evaluate`` on ``pool``, during which ``act`` is called once, so many seconds after it began."""
    timer = threading.Timer(after_s, act)
    timer.start()
    try:
        return evaluate(engine, data, replicas=pool, progress=False, **options)
    finally:
        timer.cancel()
