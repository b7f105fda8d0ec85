"""An engine's speed on random pixels in memory: an upper bound for ``evaluate``. The predictions are thrown away."""

from collections import deque
from itertools import cycle

import torch

from vitdemo.engines.contract import Engine
from vitdemo.errors import at_least_1
from vitdemo.inference.streams import quicker_form
from vitdemo.machine import now, peak_memory_bytes
from vitdemo.stats import percentiles_ms

INPUTS = 4  # sets of pixels, by turns, so that none lies ready in a cache by having just been used
WARM_UP = 0.2  # of the timed seconds
ANY_NUMBER = 1_000_000  # of images: random ones never end


def run_random_input(engine: Engine, *, device_batch_size: int = 8, seconds: float = 5.0) -> dict:
    """Time ``engine`` on random pixels that lie in memory. The accuracy is not measured.

    Args:
        engine: what ``convert`` made.
        device_batch_size: images of a call.
        seconds: how long to measure.

    Returns:
        The following, in seconds, images, images/s, milliseconds and bytes as the names say.

    - ``first_run_s``: ``load_s``, the seconds in which the engine was made ready, and its first call. None for an
      engine that has run before, whose first call is past.
    - ``second_run_s``: the call after. ``compile_s`` = first - second, as in tt-metal's tables: loading and all that
      a first call does once.
    - ``latency_ms``: single calls, one at a time, for half of ``seconds``; 10 at least.
    - ``streams``: calls side by side from here on, see ``quicker_form``, which takes about two seconds more.
    - ``inference_s``, ``images``, ``images_per_s`` = images / inference_s: steady, as many batches in flight as the
      engine takes (``engine.depth``), for the other half of ``seconds`` and 10 batches at least.
    - ``peak_memory_bytes``: this process's largest resident size so far.

    Raises:
        VitdemoError: for a device_batch_size below 1.
    """
    at_least_1(device_batch_size=device_batch_size)
    pixels = engine.info.random_pixels(INPUTS, device_batch_size, pinned=engine.device == "cuda")
    cold = not engine.has_run
    first_s, second_s = (_call_s(engine, x) for x in pixels[:2])
    first_run_s = (engine.load_s or 0.0) + first_s if cold else None
    for x in _until(pixels, WARM_UP * seconds):
        engine(x)
    latencies_s = [_call_s(engine, x) for x in _until(pixels, seconds / 2, least=10)]

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


def _call_s(engine: Engine, x: torch.Tensor) -> float:
    start = now()
    engine(x)
    return now() - start


def _until(pixels: torch.Tensor, seconds: float, least: int = 1):
    """The sets of pixels by turns, until the seconds are over and ``least`` were given."""
    start = now()
    for number, x in enumerate(cycle(pixels)):
        if number >= least and now() - start >= seconds:
            return
        yield x


def _in_flight(engine: Engine, pixels: torch.Tensor, seconds: float, least: int = 10) -> tuple[int, float]:
    """How many batches were done in how many seconds, from the first submission to the last logits."""
    waiting, batches, start = deque(), 0, now()
    try:
        for x in _until(pixels, seconds, least):
            waiting.append(engine.submit(x))
            batches += 1
            if len(waiting) == engine.depth:
                waiting.popleft().result()
        while waiting:
            waiting.popleft().result()
        return batches, now() - start
    finally:
        engine.close()
