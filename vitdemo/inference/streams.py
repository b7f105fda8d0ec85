"""Whether an engine computes more with one call at a time on all its threads, or with as many side by side.

The threads of one call wait for each other after every operation, and for whatever else takes a core meanwhile, such as
decoding; calls on one thread each wait for nobody. Replicas gain by the same, with a process for each.
"""

from collections.abc import Callable
from statistics import median

from vitdemo.dataset.imagenet import ImageNetVal
from vitdemo.engines.contract import Engine
from vitdemo.errors import EngineFailure
from vitdemo.inference.loop import predict
from vitdemo.machine import Phases, now

ROUNDS, TURN_S = 3, 0.25  # turns of each form, after one that warms it up: 2 s for both
BATCH_S = 0.1  # where a batch takes longer, smaller ones are measured
SHARE = 3  # at most one in so many of a run's images is measured on
# Of one call's rate that streams must reach to be taken: what is nearly the same is to be chosen the same every time,
# and whatever else takes a core meanwhile holds up one of many calls, but all threads of a single one.
LEAST = 0.9


def quicker_form(engine: Engine, rate: Callable[[Engine], float]) -> tuple[Engine, dict[int, float]]:
    """``engine`` with a stream for each thread; as it is where that is clearly quicker, by turns.

    Args:
        engine: what ``convert`` made.
        rate: runs a form for one turn and gives its images/s.

    Returns:
        The form, and the median rate in images/s by the number of streams, which is empty where there is no choice.
    """
    if not has_choice(engine):
        return engine, {}
    forms = engine, engine.side_by_side(engine.threads)
    rounds = [[rate(form) for form in forms] for _ in range(1 + ROUNDS)][1:]
    one, many = map(median, zip(*rounds, strict=True))
    ratio = median(many / one for one, many in rounds)  # what slows the machine for a while slows both of a round
    return forms[ratio > LEAST], {1: one, engine.threads: many}


def has_choice(engine: Engine) -> bool:
    """Whether calls of ``engine`` may run side by side, and nobody said yet how many."""
    return engine.streams is None and engine.threads > 1 and engine.device == "cpu"


def quicker_on_images(
    engine: Engine, data: ImageNetVal, images: int, *, device_batch_size: int, input_path: str
) -> tuple[Engine, dict[int, float]]:
    """``quicker_form`` from file to row, on the first images of ``data``, whose rows are thrown away.

    It is measured once for an engine, a batch size and an input path, and kept in ``engine.forms``. An engine stays as
    it is where measuring would cost more than it gives: for a short run, and for a model so slow that not even one
    image per stream fits into TURN_S, whose matrices are large enough to keep every thread busy.

    Args:
        engine, data, device_batch_size, input_path: as in ``evaluate``.
        images: how many are to be run.
    """
    key, most = (device_batch_size, input_path), images // (2 * (1 + ROUNDS) * SHARE)

    def rate(form: Engine, count: int, size: int) -> float:
        start = now()
        options = dict(device_batch_size=size, input_path=input_path, phases=Phases(), times=[])
        for _ in predict(form, data, range(count), **options):
            pass
        return count / (now() - start)

    if not has_choice(engine):
        return engine, {}
    if key not in engine.forms and most >= engine.threads * device_batch_size:
        try:
            _, per_s = (rate(engine, count, 1) for count in (1, 2))
            size = max(1, min(device_batch_size, int(BATCH_S * per_s)))
            together = size * engine.threads
            count = min(most, int(TURN_S * per_s)) // together * together
            form, rates = quicker_form(engine, lambda form: rate(form, count, size)) if count else (engine, {})
        except EngineFailure:  # it will fail in the run too, which says so
            return engine, {}
        engine.forms[key] = None if form is engine else form, rates
    form, rates = engine.forms.get(key, (None, {}))
    return form or engine, rates
