"""An engine's speed on random pixels in memory, an upper bound for ``evaluate``. The predictions are discarded."""

from collections import deque
from contextlib import closing
from itertools import cycle

import torch

from vitdemo.engines.contract import Engine
from vitdemo.errors import at_least_1
from vitdemo.inference.streams import quicker_form
from vitdemo.machine import now, peak_memory_bytes, seconds_of
from vitdemo.stats import percentiles_ms

INPUTS = 4  # sets of pixels, used in rotation, so that the next set is not in the CPU's cache from its last use
WARM_UP = 0.2  # the fraction of the timed seconds
ANY_NUMBER = 1_000_000  # the number of images, because random ones are unlimited


def run_random_input(engine: Engine, *, device_batch_size: int = 8, seconds: float = 5.0) -> dict:
    """Time ``engine`` on random pixels in memory. The accuracy is not measured.

    Args:
        engine: an engine from ``convert``.
        device_batch_size: images per call.
        seconds: the duration of the measurement.

    Returns:
        The following values, in seconds, images, images/s, milliseconds and bytes as the names say.

    - ``first_run_s``: ``load_s`` (the seconds to make the engine ready) plus the first call. None for an engine that
      has run before.
    - ``second_run_s``: the second call. ``compile_s`` = first - second, as in tt-metal's tables: loading, and the work
      that only a first call does.
    - ``latency_ms``: single calls, one at a time, for half of ``seconds`` and at least 10 calls.
    - ``streams``: the number of simultaneous calls in the following values, see ``quicker_form``, which takes about two
      seconds more.
    - ``inference_s``, ``images``, ``images_per_s`` = images / inference_s: the steady state, with as many batches in
      flight as the engine takes (``engine.depth``), for the other half of ``seconds`` and at least 10 batches.
    - ``peak_memory_bytes``: this process's largest resident size so far.

    Raises:
        VitdemoError: for a device_batch_size below 1.
    """
    at_least_1(device_batch_size=device_batch_size)
    pixels = engine.info.random_pixels(INPUTS, device_batch_size, pinned=engine.device == "cuda")
    cold = not engine.has_run
    first_s, second_s = (seconds_of(engine, x) for x in pixels[:2])
    first_run_s = (engine.load_s or 0.0) + first_s if cold else None
    for x in _until(pixels, WARM_UP * seconds):
        engine(x)
    latencies_s = [seconds_of(engine, x) for x in _until(pixels, seconds / 2, least=10)]

    def rate(form: Engine, count: int, size: int) -> float:
        return count / _in_flight(form, pixels[:, :size], 0.0, least=count // size)[1]

    form, _ = quicker_form(engine, device_batch_size, "random input", ANY_NUMBER, rate)
    batches, inference_s = _in_flight(form, pixels, seconds / 2)
    return {
        "device_batch_size": device_batch_size,
        "first_run_s": first_run_s,
        "second_run_s": second_s,
        "compile_s": None if first_run_s is None else first_run_s - second_s,
        "streams": form.streams or 1,
        "images": (images := batches * device_batch_size),
        "inference_s": inference_s,
        "images_per_s": images / inference_s,
        "latency_ms": percentiles_ms(latencies_s),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _until(pixels: torch.Tensor, seconds: float, least: int = 1):
    """Yield the sets of pixels in rotation, until the seconds are over and at least ``least`` were yielded."""
    start = now()
    for number, x in enumerate(cycle(pixels)):
        if number >= least and now() - start >= seconds:
            return
        yield x


def _in_flight(engine: Engine, pixels: torch.Tensor, seconds: float, least: int = 10) -> tuple[int, float]:
    """The number of batches computed, and the seconds from the first submission to the last logits."""
    waiting, batches, start = deque(), 0, now()
    with closing(engine):
        for x in _until(pixels, seconds, least):
            waiting.append(engine.submit(x))
            batches += 1
            if len(waiting) == engine.depth:
                waiting.popleft().result()
        while waiting:
            waiting.popleft().result()
        return batches, now() - start
