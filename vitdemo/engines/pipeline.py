"""The schedule of an engine on a GPU: copies in, captured graphs and copies out, each in a stream of its own.

While a graph computes one batch, the next one's pixels and the last one's logits are copied. Four waits keep that in
order, each named where it is: ``WAITS``. What is here knows no GPU; ``cuda`` does.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitdemo.engines.cuda import Cuda

# Batch sizes that a graph is captured for. The largest comes first: the others then fit into the memory that it freed.
SIZES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
SLOTS = 2  # batches on their way: one is computed while the next one is copied
WAITS = ("slot", "copied in", "computed", "copied out")
# What computes attention, in this order. cuDNN's, which torch would prefer on an H100, is left out: some versions of it
# gave NaN, or read beyond their memory, for lengths such as the 197 tokens of a ViT (pytorch #138649, #169849).
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class Slot:
    """The buffers of one batch on its way, and what has become of it. last: the future of the batch that was here."""

    pixels: torch.Tensor
    logits: torch.Tensor
    fetched: torch.Tensor
    events: dict[str, torch.cuda.Event]
    last: Future | None = None


class Pipeline:
    """``submit(x: uint8[B, 3, H, W] on the host) -> Future`` of float32 logits [B, C] on the host, any B >= 1.

    A batch is filled up to the next size that a graph was captured for, and cut to its own length again; one that is
    larger than all of them goes through in parts. All memory is taken, and all graphs are captured, when it is made.

    Args:
        device: what runs it.
        compute: uint8 pixels on the device -> float32 logits on the device; is called only here.
        input_size: (3, H, W).
        sizes: see ``SIZES``.
    """

    def __init__(
        self,
        device: Cuda,
        compute: Callable[[torch.Tensor], torch.Tensor],
        input_size: tuple[int, int, int],
        sizes: tuple[int, ...] = SIZES,
    ):
        self._device, self._sizes, self._lock, most = device, sizes, Lock(), sizes[0]
        with torch.no_grad(), sdpa_kernel(ATTENTION, set_priority=True):
            self._take_memory(most, input_size, compute)
            self._graphs = {size: device.capture(lambda size=size: self._work(compute, size)) for size in sizes}
        self._waiter = device.waiter()

    def _take_memory(self, most: int, input_size: tuple[int, int, int], compute: Callable) -> None:
        device = self._device
        # What graphs read and write, at addresses that never change, and outside their pool.
        self._pixels = device.empty((most, *input_size), torch.uint8)
        outputs = compute(self._pixels[:1].zero_()).shape[1]
        self._logits = device.empty((most, outputs), torch.float32)
        self._slots = [
            Slot(
                device.empty((most, *input_size), torch.uint8),
                device.empty((most, outputs), torch.float32),
                device.pinned((most, outputs), torch.float32),
                {name: device.event() for name in WAITS[1:]},
            )
            for _ in range(SLOTS)
        ]

    def _work(self, compute: Callable, size: int) -> None:
        self._logits[:size].copy_(compute(self._pixels[:size]))

    def submit(self, x: torch.Tensor) -> "Future[torch.Tensor]":
        """Queue one batch and return; ``x`` must stay untouched until the future is done."""
        with self._lock, torch.no_grad():
            parts = [self._queue(part) for part in x.split(self._sizes[0])]
        if len(parts) == 1:
            return parts[0]
        return self._waiter.submit(lambda: torch.cat([part.result() for part in parts]))

    def _queue(self, x: torch.Tensor) -> "Future[torch.Tensor]":
        device, slot, count = self._device, self._slots[0], len(x)
        self._slots.append(self._slots.pop(0))
        if slot.last:
            device.wait("slot", slot.last)
        device.copy("in", slot.pixels[:count], x)
        device.record("in", slot.events["copied in"])
        device.wait("copied in", slot.events["copied in"], "compute")
        device.copy("compute", self._pixels[:count], slot.pixels[:count])
        device.replay(self._graphs[min(size for size in self._sizes if size >= count)])
        device.copy("compute", slot.logits[:count], self._logits[:count])
        device.record("compute", slot.events["computed"])
        device.wait("computed", slot.events["computed"], "out")
        device.copy("out", slot.fetched[:count], slot.logits[:count])
        device.record("out", slot.events["copied out"])
        slot.last = self._waiter.submit(self._result, slot, count)
        return slot.last

    def _result(self, slot: Slot, count: int) -> torch.Tensor:
        self._device.wait("copied out", slot.events["copied out"])
        return slot.fetched[:count].clone()

    def close(self) -> None:
        """Wait for what is in flight and give the thread back; the next batch starts another."""
        self._waiter.shutdown()
        self._device.finish()
        self._waiter = self._device.waiter()
