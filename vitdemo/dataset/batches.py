"""Samples to batches of uint8 crops, decoded ahead by threads."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from vitdemo.dataset.decoding import Preprocessing, UnreadableImage, fast_crop, is_rotated, reference_crop
from vitdemo.dataset.samples import Sample, UnreadableFile
from vitdemo.machine import cores


@dataclass
class Batch:
    """Consecutive samples, decoded.

    Attributes:
        start: the first one's index in the data set.
        files, class_ids, labels: of each sample, as in ``Sample``.
        pixels: uint8[B, 3, H, W]; zeros where an image cannot be read.
        errors: of each sample, why it cannot be read; "" where it can.
        fallbacks: how many images of the fast path the reference path had to decode.
        rotated: how many have an EXIF orientation other than upright, which is ignored.
        began, ended: seconds since 1970, from the first image's first byte to the last one's last pixel.
        decode_cpu_s: CPU seconds of all of them.
        recycle: to be called once nobody needs the pixels any more: gives their memory to a batch to come.
    """

    start: int
    files: list[str]
    class_ids: list[str]
    labels: list[int]
    pixels: torch.Tensor
    errors: list[str]
    fallbacks: int
    rotated: int
    began: float
    ended: float
    decode_cpu_s: float
    recycle: Callable[[], None]


def _load_into(
    pixels: torch.Tensor, data: Sequence[Sample], index: int, preprocessing: Preprocessing, input_path: str
) -> tuple[str, str, int, str, bool, bool, float, float, float]:
    """Decode one sample to its place in a batch; what a ``Batch`` says of it, from file to decode_cpu_s."""
    began, cpu, error, fell_back, rotated = time.time(), time.thread_time(), "", False, False
    try:
        sample = data[index]
        crop = fast_crop(sample.image, preprocessing) if input_path == "fast" else None
        fell_back = crop is None and input_path == "fast"
        rotated = is_rotated(sample.image)
        pixels.copy_(reference_crop(sample.image, preprocessing) if crop is None else crop)
    except UnreadableFile as unreadable:
        sample, error = unreadable.sample, str(unreadable)
    except UnreadableImage as unreadable:
        error = str(unreadable)
    if error:
        pixels.zero_()
    times = began, time.time(), time.thread_time() - cpu
    return sample.file, sample.class_id, sample.label, error, fell_back, rotated, *times


def prefetched_batches(
    data: Sequence[Sample],
    indices: range,
    preprocessing: Preprocessing,
    device_batch_size: int,
    *,
    input_path: str = "reference",
    ahead: int = 2,
    pinned: bool = False,
) -> Iterator[Batch]:
    """Batches of ``data`` over ``indices``, in order, the last one as small as what is left.

    One thread per core decodes: the decoders work outside Python's lock. Closing the iterator stops the threads.

    Args:
        data: the samples.
        indices: which of them, without a step.
        preprocessing: the crop that the model's weights expect.
        device_batch_size: images in a batch.
        input_path: "reference" is ``reference_crop`` for every image, "fast" is ``fast_crop`` where that can.
        ahead: batches that wait at the most, so that memory does not grow with the data set.
        pinned: decode into memory that a GPU reads by itself.

    Yields:
        Batches; an image that cannot be read is a row of zeros with its error.
    """
    # Each decodes on one core: torch would resize on all of them, beside the other threads' and the engine's.
    pool = ThreadPoolExecutor(cores(), "decode", torch.set_num_threads, (1,))
    waiting, buffers = deque(), []

    def begin(start):
        rows = range(start, min(start + device_batch_size, indices.stop))
        shape = device_batch_size, *preprocessing.input_size
        buffer = buffers.pop() if buffers else torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        futures = [pool.submit(_load_into, buffer[k], data, i, preprocessing, input_path) for k, i in enumerate(rows)]
        return start, buffer[: len(rows)], futures, lambda: buffers.append(buffer)

    try:
        for start in range(indices.start, indices.stop, device_batch_size):
            waiting.append(begin(start))
            if len(waiting) > ahead:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(start: int, pixels: torch.Tensor, futures: list, recycle: Callable[[], None]) -> Batch:
    columns = map(list, zip(*(future.result() for future in futures), strict=True))
    files, class_ids, labels, errors, fell_back, rotated, began, ended, cpu_s = columns
    times = min(began), max(ended), sum(cpu_s)
    return Batch(start, files, class_ids, labels, pixels, errors, sum(fell_back), sum(rotated), *times, recycle)
