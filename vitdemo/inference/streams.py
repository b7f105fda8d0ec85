"""Measures which form of an engine is faster: one call at a time on all threads, or one call per thread at once.

The threads of one call wait for each other after every operation, so other work on a core, such as decoding, delays all
of them. Calls with one thread each do not wait for each other. Replicas, with one process each, gain for the same
reason.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from statistics import median

from vitdemo.dataset.samples import Sample
from vitdemo.engines.contract import Engine
from vitdemo.errors import EngineFailure
from vitdemo.inference.loop import predict
from vitdemo.machine import Phases, seconds_of

# Timed rounds of each form after a warm-up round, and seconds per round, about 2 s for both. A round of a slow model
# takes longer: it has at least one image per stream.
ROUNDS, TURN_S = 3, 0.25
SHARE = 3  # the trial uses at most one third of the run's images
# The fraction of one call's rate that streams must reach to be chosen. It is below 1 so that nearly equal rates always
# give the same choice, and because other work on a core delays only one of many calls, but all threads of a single one.
LEAST = 0.9


def has_choice(engine: Engine) -> bool:
    """Whether calls of ``engine`` may run at the same time, and it is not decided yet whether they do."""
    return engine.streams is None and engine.threads > 1 and engine.device == "cpu"


def quicker_form(
    engine: Engine, device_batch_size: int, source: str, images: int, rate: Callable[[Engine, int, int], float]
) -> tuple[Engine, dict[int, float]]:
    """``engine`` with one stream per thread, or unchanged if that is faster by more than a tenth.

    Both forms are timed interleaved, once per engine, batch size and source; the result is kept in ``engine.forms``.
    The engine stays unchanged for a short run, where the trial would cost more than it gains.

    Args:
        engine: an engine from ``convert``.
        device_batch_size: images per batch.
        source: the source of the images.
        images: the number of images in the run.
        rate: a function of a form, a number of images and a batch size, which returns images/s.

    Returns:
        The form, and the median rates in images/s by the number of streams, empty where nothing was timed.
    """
    key, most = (device_batch_size, source), images // (2 * (1 + ROUNDS) * SHARE)
    if not has_choice(engine):
        return engine, {}
    if key not in engine.forms and most >= engine.threads * device_batch_size:
        try:
            _, per_s = (rate(engine, 1, 1) for _ in range(2))
            fitting = max(engine.threads, min(most, int(TURN_S * per_s)))
            size = min(device_batch_size, fitting // engine.threads)
            count = fitting // (size * engine.threads) * size * engine.threads
            forms = engine, engine.side_by_side()
            rounds = [[rate(form, count, size) for form in forms] for _ in range(1 + ROUNDS)][1:]
        except EngineFailure:  # the engine will fail in the run too, which reports it
            return engine, {}
        one, many = map(median, zip(*rounds, strict=True))
        ratio = median(many / one for one, many in rounds)  # other load on the machine slows both forms of a round
        engine.forms[key] = forms[1] if ratio > LEAST else None, {1: one, engine.threads: many}
    form, rates = engine.forms.get(key, (None, {}))
    return form or engine, rates


def quicker_on_images(
    engine: Engine, data: Sequence[Sample], images: int, *, device_batch_size: int, input_path: str
) -> tuple[Engine, dict[int, float]]:
    """``quicker_form``, timed from file to row on the first images of ``data``, whose rows are discarded.

    Args:
        engine, data, device_batch_size, input_path: as in ``evaluate``.
        images: the number of images in the run.
    """

    def rate(form: Engine, count: int, size: int) -> float:
        options = dict(device_batch_size=size, input_path=input_path, phases=Phases(), times=[])
        with closing(form):
            return count / seconds_of(list, predict(form, data, range(count), **options))

    return quicker_form(engine, device_batch_size, input_path, images, rate)
