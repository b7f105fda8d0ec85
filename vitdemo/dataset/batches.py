"""Samples to batches of uint8 crops, decoded ahead by threads."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vitdemo.dataset.decoding import Preprocessing, UnreadableImage, fast_crop, reference_crop
from vitdemo.dataset.imagenet import Sample, UnreadableFile


@dataclass
class Batch:
    """Consecutive samples, decoded. ``start`` is the first one's index in the data set.

    pixels: uint8[B, 3, H, W]; the row of an unreadable image is zeros and its ``errors`` entry the reason. Once nobody
    needs them any more, ``recycle()`` gives their memory to a batch to come.
    fallbacks: how many images of the fast path the reference path had to decode. began, ended: seconds since 1970, of
    the first image's first byte and the last one's last pixel. decode_cpu_s: CPU seconds of all of them.
    """

    start: int
    files: list[str]
    wnids: list[str]
    labels: list[int]
    pixels: torch.Tensor
    errors: list[str]
    fallbacks: int
    began: float
    ended: float
    decode_cpu_s: float
    recycle: Callable[[], None]


class Loaded(NamedTuple):
    """One image of a batch, whose pixels are in their place."""

    file: str
    wnid: str
    label: int
    error: str
    fell_back: bool
    began: float
    ended: float
    cpu_s: float


def _load_into(
    pixels: torch.Tensor, data: Sequence[Sample], index: int, preprocessing: Preprocessing, input_path: str
) -> Loaded:
    began, cpu = time.time(), time.thread_time()
    try:
        sample = data[index]
    except UnreadableFile as unreadable:
        pixels.zero_()
        sample, error, fell_back = unreadable.sample, str(unreadable), False
    else:
        error, fell_back = _crop_into(pixels, sample.jpeg, preprocessing, input_path)
    cpu_s = time.thread_time() - cpu
    return Loaded(sample.file, sample.wnid, sample.label, error, fell_back, began, time.time(), cpu_s)


def _crop_into(pixels: torch.Tensor, jpeg: bytes, preprocessing: Preprocessing, input_path: str) -> tuple[str, bool]:
    """Why there is no crop, "" when there is; and whether the fast path left it to the reference."""
    crop = fast_crop(jpeg, preprocessing) if input_path == "fast" else None
    fell_back = crop is None and input_path == "fast"
    try:
        pixels.copy_(reference_crop(jpeg, preprocessing) if crop is None else crop)
    except UnreadableImage as unreadable:
        pixels.zero_()
        return str(unreadable), fell_back
    return "", fell_back


def prefetched_batches(
    data: Sequence[Sample],
    indices: range,
    preprocessing: Preprocessing,
    device_batch_size: int,
    *,
    input_path: str = "reference",
    workers: int = 2,
    ahead: int = 2,
) -> Iterator[Batch]:
    """Batches of ``data`` over ``indices``, in order, the last one as small as what is left.

    Closing the iterator stops the threads.

    Args:
        data: the samples.
        indices: which of them, without a step.
        preprocessing: the crop that the model's weights expect.
        device_batch_size: images in a batch.
        input_path: "reference" is ``reference_crop`` for every image, "fast" is ``fast_crop`` where that can.
        workers: threads that decode; the decoders work outside Python's lock.
        ahead: batches that wait at the most, so that memory does not grow with the data set.
    """
    starts = iter(range(indices.start, indices.stop, device_batch_size))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    waiting, buffers = deque(), []

    def begin(start):
        rows = range(start, min(start + device_batch_size, indices.stop))
        shape = device_batch_size, *preprocessing.input_size
        buffer = buffers.pop() if buffers else torch.empty(shape, dtype=torch.uint8)
        futures = [pool.submit(_load_into, buffer[k], data, i, preprocessing, input_path) for k, i in enumerate(rows)]
        return start, buffer[: len(rows)], futures, lambda: buffers.append(buffer)

    try:
        for start in starts:
            waiting.append(begin(start))
            if len(waiting) > ahead:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(start: int, pixels: torch.Tensor, futures: list, recycle: Callable[[], None]) -> Batch:
    loaded = [future.result() for future in futures]
    return Batch(
        start=start,
        files=[image.file for image in loaded],
        wnids=[image.wnid for image in loaded],
        labels=[image.label for image in loaded],
        pixels=pixels,
        errors=[image.error for image in loaded],
        fallbacks=sum(image.fell_back for image in loaded),
        began=min(image.began for image in loaded),
        ended=max(image.ended for image in loaded),
        decode_cpu_s=sum(image.cpu_s for image in loaded),
        recycle=recycle,
    )
