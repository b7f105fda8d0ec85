"""Whether an engine computes more with one call at a time on all its threads, or with one call on each.

The threads of one call wait for each other after every operation, and for whatever else takes a core meanwhile, such as
decoding; calls on one thread each wait for nobody. Replicas gain by the same, with a process for each.
"""

from collections.abc import Callable, Sequence
from statistics import median

from vitdemo.dataset.samples import Sample
from vitdemo.engines.contract import Engine
from vitdemo.errors import EngineFailure
from vitdemo.inference.loop import predict
from vitdemo.machine import Phases, now

ROUNDS, TURN_S = 3, 0.25  # turns of each form, after one that warms it up: about 2 s for both
SHARE = 3  # at most one in so many of a run's images is measured on
# Of one call's rate that streams must reach to be taken: what is nearly the same is to be chosen the same every time,
# and whatever else takes a core meanwhile holds up one of many calls, but all threads of a single one.
LEAST = 0.9


def has_choice(engine: Engine) -> bool:
    """Whether calls of ``engine`` may run side by side, and nobody said yet whether they do."""
    return engine.streams is None and engine.threads > 1 and engine.device == "cpu"


def quicker_form(
    engine: Engine, device_batch_size: int, source: str, images: int, rate: Callable[[Engine, int, int], float]
) -> tuple[Engine, dict[int, float]]:
    """``engine`` with a stream for each thread, or as it is where that is quicker by more than a tenth.

    Both are timed by turns, once for an engine, a batch size and a source; what was found is kept in ``engine.forms``.
    An engine stays as it is where that would cost more than it gives: for a short run, and for a model so slow that not
    even one image per stream fits into TURN_S, whose matrices are large enough to keep every thread busy.

    Args:
        engine: what ``convert`` made.
        device_batch_size: images at once.
        source: where they come from.
        images: how many there are to be run.
        rate: images/s of a form over so many images, in batches of such a size.

    Returns:
        The form, and the median rate in images/s by the number of streams, which is empty where nothing was timed.
    """
    key, most = (device_batch_size, source), images // (2 * (1 + ROUNDS) * SHARE)
    if not has_choice(engine):
        return engine, {}
    if key not in engine.forms and most >= engine.threads * device_batch_size:
        try:
            _, per_s = (rate(engine, 1, 1) for _ in range(2))
            fitting = min(most, int(TURN_S * per_s))
            if not (size := min(device_batch_size, fitting // engine.threads)):
                return engine, {}
            count = fitting // (size * engine.threads) * size * engine.threads
            forms = engine, engine.side_by_side()
            rounds = [[rate(form, count, size) for form in forms] for _ in range(1 + ROUNDS)][1:]
        except EngineFailure:  # it will fail in the run too, which says so
            return engine, {}
        one, many = map(median, zip(*rounds, strict=True))
        ratio = median(many / one for one, many in rounds)  # what slows the machine for a while slows both of a round
        engine.forms[key] = forms[1] if ratio > LEAST else None, {1: one, engine.threads: many}
    form, rates = engine.forms.get(key, (None, {}))
    return form or engine, rates


def quicker_on_images(
    engine: Engine, data: Sequence[Sample], images: int, *, device_batch_size: int, input_path: str
) -> tuple[Engine, dict[int, float]]:
    """``quicker_form`` from file to row, on the first images of ``data``, whose rows are thrown away.

    Args:
        engine, data, device_batch_size, input_path: as in ``evaluate``.
        images: how many are to be run.
    """

    def rate(form: Engine, count: int, size: int) -> float:
        start = now()
        try:
            options = dict(device_batch_size=size, input_path=input_path, phases=Phases(), times=[])
            for _ in predict(form, data, range(count), **options):
                pass
            return count / (now() - start)
        finally:
            form.close()

    return quicker_form(engine, device_batch_size, input_path, images, rate)
