"""Runs an engine over samples and turns its logits into rows, one per image; decoding and computing overlap."""

import time
from collections import deque, namedtuple
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import softmax

from vitdemo.dataset.batches import Batch, prefetched_batches
from vitdemo.dataset.samples import Sample
from vitdemo.engines.contract import Engine
from vitdemo.errors import EngineFailure, reason_of
from vitdemo.machine import Phases
from vitdemo.verification.comparison import ranking


def batches_of(images: range, device_batch_size: int) -> list[range]:
    """The batches of ``images``.

    Args:
        images: their indices, without a step.
        device_batch_size: images in a batch; the last one is as long as what is left.
    """
    starts = range(images.start, images.stop, device_batch_size)
    return [range(start, min(start + device_batch_size, images.stop)) for start in starts]


def merge_ranges(batches: Iterable[range]) -> list[range]:
    """The ranges that lie without a gap in ``batches``, which ascend."""
    spans: list[range] = []
    for batch in batches:
        if spans and spans[-1].stop == batch.start:
            spans[-1] = range(spans[-1].start, batch.stop)
        else:
            spans.append(batch)
    return spans


TOP = 5
PREDICTED = [f"predicted_{k}" for k in range(1, TOP + 1)]
PROBABILITY = [f"probability_{k}" for k in range(1, TOP + 1)]
GUESSES = dict.fromkeys(PREDICTED, int) | dict.fromkeys(PROBABILITY, float)  # None where there is none
COLUMNS = {"file": str, "label": int, "class_id": str, **GUESSES, "correct": int, "correct_present": int, "error": str}
Row = namedtuple("Row", COLUMNS)  # of one image; probabilities have the six digits that predictions.csv has


class BatchTimes(NamedTuple):
    """What became of one batch when, in seconds since 1970, which machines share.

    decode_began, decode_ended: its first image's first byte and its last one's last pixel; others are decoded between.
    submitted, finished: when the engine was given it and had its logits; others may be before it in the queue.
    decode_cpu_s: CPU seconds of its decoding. fallbacks: images that the fast path left to the reference path.
    rotated: images whose EXIF orientation is not upright. replica: which one did it, 0 where there is none.
    """

    images: int
    decode_began: float
    decode_ended: float
    submitted: float
    finished: float
    decode_cpu_s: float
    fallbacks: int
    rotated: int = 0
    replica: int = 0


@dataclass
class InFlight:
    """A batch that the engine has been given, and when it was given and finished."""

    batch: Batch
    future: Future
    submitted: float
    finished: float | None = None

    def __post_init__(self):
        self.future.add_done_callback(lambda _: setattr(self, "finished", time.time()))

    def times(self) -> BatchTimes:
        """Once the future is done. result() may return just before the done-callback ran: then it is this moment."""
        batch = self.batch
        decoding = batch.began, batch.ended
        finished = self.finished or time.time()
        counts = batch.fallbacks, batch.rotated
        return BatchTimes(len(batch.files), *decoding, self.submitted, finished, batch.decode_cpu_s, *counts)


def predict(
    engine: Engine,
    data: Sequence[Sample],
    indices: range,
    *,
    device_batch_size: int,
    input_path: str,
    phases: Phases,
    times: list[BatchTimes],
) -> Iterator[list[Row]]:
    """Rows of ``data`` over ``indices``, one list per batch, in order.

    Args:
        engine: what answers.
        data: the samples.
        indices: which of them, without a step.
        device_batch_size: images in a batch, from ``indices.start``; the last one is as long as what is left.
        input_path: as in ``prefetched_batches``.
        phases: gets the seconds that this thread waited for decoded batches ("decode_wait") and for the engine
            ("compute_wait") and made rows ("postprocess").
        times: gets one ``BatchTimes`` per batch.

    Raises:
        EngineFailure: when the engine raises or its logits are not finite float32[B, C].
    """
    in_flight: deque[InFlight] = deque()
    present = getattr(data, "present", None)
    options = {"input_path": input_path, "pinned": engine.device == "cuda"}
    batches = prefetched_batches(data, indices, engine.info.preprocessing, device_batch_size, **options)

    def finish() -> tuple[Batch, torch.Tensor]:
        oldest = in_flight.popleft()
        with phases("compute_wait"):
            logits = _logits(engine, oldest.batch, oldest.future)
        times.append(oldest.times())
        oldest.batch.recycle()
        return oldest.batch, logits

    try:
        while True:
            with phases("decode_wait"):
                batch = next(batches, None)
            # The engine gets its next batch before the last one's rows are made: it never waits for Python.
            done = finish() if in_flight and (batch is None or len(in_flight) == engine.depth) else None
            if batch is not None:
                submitted = time.time()
                in_flight.append(InFlight(batch, engine.submit(batch.pixels), submitted))
            if done:
                with phases("postprocess"):
                    rows = _rows(*done, present)
                yield rows
            elif batch is None:
                return
    finally:
        wait([batch.future for batch in in_flight])  # what the engine still reads must not change
        batches.close()


def _logits(engine: Engine, batch: Batch, future: Future) -> torch.Tensor:
    try:
        logits = future.result()
    except Exception as error:
        raise EngineFailure(f"the {engine.name} engine failed at {batch.files[0]}: {reason_of(error)}") from error
    shape_ok = logits.dtype == torch.float32 and logits.ndim == 2 and len(logits) == len(batch.files)
    if not shape_ok or not torch.isfinite(logits).all():
        raise EngineFailure(
            f"the {engine.name} engine gave logits that are not finite float32[B, C] at {batch.files[0]}"
        )
    return logits


def _rows(batch: Batch, logits: torch.Tensor, present: list[int] | None) -> list[Row]:
    """Equal logits rank by class index, so that a tie is broken the same way everywhere.

    present: the outputs that ``correct_present`` chooses among; None for all.
    """
    classes = ranking(logits)  # and not of the probabilities: small ones tie at 0
    # Not by torch, which starts a team of threads for however little: they would take cores from the engine.
    probabilities = np.take_along_axis(softmax(logits.numpy(), axis=1), classes.numpy(), axis=1)
    rows = []
    samples = zip(batch.files, batch.labels, batch.class_ids, batch.errors, strict=True)
    among = classes[:, 0] if present is None else torch.tensor(present)[ranking(logits[:, present])[:, 0]]
    for k, (file, label, class_id, error) in enumerate(samples):
        top = [] if error else classes[k, :TOP].tolist()
        odds = [round(p, 6) for p in probabilities[k, : len(top)].tolist()]
        none = [None] * (TOP - len(top))
        correct = int(label in top[:1]), int(not error and label == among[k])
        rows.append(Row(file, label, class_id, *top, *none, *odds, *none, *correct, error))
    return rows
