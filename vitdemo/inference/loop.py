"""Runs an engine over samples and turns its logits into rows, one row per image; decoding and computing overlap."""

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
    """Split ``images`` into batches.

    Args:
        images: the indices, without a step.
        device_batch_size: images per batch; the last batch has the images that are left.
    """
    return [images[k : k + device_batch_size] for k in range(0, len(images), device_batch_size)]


def merge_ranges(batches: Iterable[range]) -> list[range]:
    """Join batches that follow one another without a gap; ``batches`` are in ascending order."""
    spans: list[range] = []
    for batch in batches:
        joins = spans and spans[-1].stop == batch.start
        spans.append(range(spans.pop().start if joins else batch.start, batch.stop))
    return spans


TOP = 5
PREDICTED = [f"predicted_{k}" for k in range(1, TOP + 1)]
PROBABILITY = [f"probability_{k}" for k in range(1, TOP + 1)]
GUESSES = dict.fromkeys(PREDICTED, int) | dict.fromkeys(PROBABILITY, float)  # None for missing predictions
COLUMNS = {"file": str, "label": int, "class_id": str, **GUESSES, "correct": int, "correct_present": int, "error": str}
Row = namedtuple("Row", COLUMNS)  # for one image; probabilities are rounded to six digits, as in predictions.csv


class BatchTimes(NamedTuple):
    """The times of one batch in seconds since 1970, which are comparable between machines.

    decode_began, decode_ended: when reading its first image began and decoding its last one ended; images of other
    batches may be decoded in between. submitted, finished: when the engine got the batch and had its logits; other
    batches may be before it in the queue. decode_cpu_s: the CPU seconds of its decoding. fallbacks: the number of
    images that the reference path decoded instead of the fast path. rotated: the number of images with an EXIF
    orientation other than upright. replica: the number of the replica, 0 without replicas.
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
    """A batch that was submitted to the engine, with the times of submission and completion."""

    batch: Batch
    future: Future
    submitted: float
    finished: float | None = None

    def __post_init__(self):
        self.future.add_done_callback(lambda _: setattr(self, "finished", time.time()))

    def times(self) -> BatchTimes:
        """The times, once the future is done. If result() returned before the done-callback ran, it finished now."""
        batch, finished = self.batch, self.finished or time.time()
        moments = batch.began, batch.ended, self.submitted, finished
        return BatchTimes(len(batch.files), *moments, batch.decode_cpu_s, batch.fallbacks, batch.rotated)


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
    """Yield the rows of ``data`` over ``indices``, one list per batch, in order.

    Args:
        engine: the engine that classifies.
        data: the samples.
        indices: the indices of the samples, without a step.
        device_batch_size: images per batch, from ``indices.start``; the last batch has the images that are left.
        input_path: as in ``prefetched_batches``.
        phases: receives the seconds in which this thread waited for decoded batches ("decode_wait") and for the engine
            ("compute_wait"), and made rows ("postprocess").
        times: receives one ``BatchTimes`` per batch.

    Raises:
        EngineFailure: when the engine raises or its logits are not finite float32[B, C].
    """
    in_flight: deque[InFlight] = deque()
    present = data.present if getattr(data, "decided", "") else None  # else these are no outputs of the model
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
            # The engine gets its next batch before the rows of the last one are made, so that it never waits for them.
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
        wait([batch.future for batch in in_flight])  # their pixels must not change while the engine reads them
        batches.close()


def _logits(engine: Engine, batch: Batch, future: Future) -> torch.Tensor:
    try:
        logits = future.result()
    except Exception as error:
        raise EngineFailure(f"the {engine.name} engine failed at {batch.files[0]}: {reason_of(error)}") from error
    shape_ok = logits.dtype == torch.float32 and logits.ndim == 2 and len(logits) == len(batch.files)
    if not shape_ok or not torch.isfinite(logits).all():
        wrong = f"gave logits that are not finite float32[B, C] at {batch.files[0]}"
        raise EngineFailure(f"the {engine.name} engine {wrong}")
    return logits


def _rows(batch: Batch, logits: torch.Tensor, present: list[int] | None) -> list[Row]:
    """The rows of a batch. Equal logits rank by class index, so that ties are broken in the same way everywhere.

    present: the outputs among which ``correct_present`` chooses; None for all outputs.
    """
    classes = ranking(logits)  # not of the probabilities, because small ones are equal to 0
    # numpy, because torch starts threads even for such small work, which would take cores from the engine.
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
