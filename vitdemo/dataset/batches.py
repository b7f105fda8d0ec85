"""Turns samples into batches of uint8 crops, which threads decode ahead of time."""

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
        start: the first sample's index in the data set.
        files, class_ids, labels: one value per sample, as in ``Sample``.
        pixels: uint8[B, 3, H, W]; zeros where an image cannot be read.
        errors: why each sample cannot be read; "" where it can.
        fallbacks: the number of images that the reference path had to decode instead of the fast path.
        rotated: the number of images with an EXIF orientation other than upright, which is ignored.
        began, ended: seconds since 1970, when reading the first image began and decoding the last one ended.
        decode_cpu_s: the CPU seconds of reading and decoding all samples.
        recycle: call it when the pixels are no longer needed; a later batch reuses their memory.
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
    """Decode one sample into its place in a batch; return its values of ``Batch``, from file to decode_cpu_s."""
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
    """Yield batches of ``data`` over ``indices``, in order; the last batch has the images that are left.

    One thread per core decodes, because the decoders release Python's lock. Closing the iterator stops the threads.

    Args:
        data: the samples.
        indices: the indices of the samples, without a step.
        preprocessing: the model's own preprocessing.
        device_batch_size: images per batch.
        input_path: "reference" uses ``reference_crop`` for every image, "fast" uses ``fast_crop`` where it can.
        ahead: the largest number of waiting batches, which limits the memory.
        pinned: decode into pinned memory, which a GPU reads directly.

    Yields:
        Batches; an image that cannot be read is a row of zeros with its error.
    """
    # One core per thread: otherwise torch would resize on all cores, in competition with the other threads and the
    # engine.
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
