"""Runs an engine on a GPU: CUDA's streams, events and graphs behind a small interface, and the schedule for them.

Copies to the GPU, captured graphs and copies from the GPU have one stream each. While a graph computes one batch, the
pixels of the next batch and the logits of the last one are copied. Four waits, named in ``WAITS``, keep the order.
``Pipeline`` is the schedule and does not use CUDA itself; ``Cuda`` does, and was **not run**.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import CDLL, byref, c_ulonglong, c_void_p
from dataclasses import dataclass
from threading import Lock

import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Batch sizes for which a graph is captured. The largest comes first, so that the others fit into the memory it freed.
SIZES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
SLOTS = 2  # batches in flight: one is computed while the next one is copied
WAITS = ("slot", "copied in", "computed", "copied out")
# The backends for attention, in order of preference. cuDNN's, which torch would prefer on an H100, is left out: some of
# its versions gave NaN, or read beyond their memory, for lengths such as a ViT's 197 tokens (pytorch #138649, #169849).
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
WARM_UP = 3  # calls before a capture, in which libraries choose and load their kernels; a graph must not contain that
NVML = "libnvidia-ml.so.1"  # comes with the driver


class Cuda:
    """The GPU of a ``Pipeline``. Tests replace it by a device that runs queued work in any permitted order.

    The streams are "in" for copies to the GPU, "compute" for graphs, and "out" for copies to the host. Only ``wait``
    sets an order between two streams. Creating a Cuda turns off TF32, which rounds products and convolutions of float32
    to 10 bits of fraction. Torch raises an error if these settings are mixed with the older ones, ``allow_tf32``.
    https://docs.pytorch.org/docs/stable/notes/cuda.html
    """

    def __init__(self):
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"
        self._streams = {name: torch.cuda.Stream() for name in ("in", "compute", "out")}
        self._pool = torch.cuda.graph_pool_handle()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in the GPU's memory."""
        return torch.empty(shape, dtype=dtype, device="cuda")

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in pinned host memory, which the GPU reads and writes directly."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def event(self) -> torch.cuda.Event:
        """An event. A host thread that waits for it sleeps, and leaves its core to decoding."""
        return torch.cuda.Event(blocking=True, enable_timing=True)

    def waiter(self) -> ThreadPoolExecutor:
        """The single thread that waits for results; it does not queue work."""
        return ThreadPoolExecutor(1, "engine-cuda")

    def copy(self, stream: str, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy. The host waits for it only if ``source`` is in host memory that is not pinned."""
        with torch.cuda.stream(self._streams[stream]):
            target.copy_(source, non_blocking=True)

    def record(self, stream: str, event: torch.cuda.Event) -> None:
        """Queue ``event``, which happens when all work queued before it in the stream is done."""
        event.record(self._streams[stream])

    def wait(self, name: str, what: torch.cuda.Event | Future, stream: str | None = None) -> None:
        """Make ``stream``, or the host where no stream is given, wait until ``what`` has happened.

        Args:
            name: the wait's name in ``WAITS``.
            what: an event; for the host also a future.
            stream: the stream that waits.
        """
        if stream:
            self._streams[stream].wait_event(what)
        elif isinstance(what, Future):
            what.exception()
        else:
            what.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture ``work`` as a graph; return the function that replays it by one driver call on the same memory.

        Graphs share a memory pool, because they run one at a time. With ``capture_error_mode``, other threads may use
        CUDA during the capture.
        """
        stream, graph = self._streams["compute"], torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                work()
        stream.synchronize()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def replay(self, graph: Callable[[], None]) -> None:
        """Queue a captured graph on the stream "compute"."""
        with torch.cuda.stream(self._streams["compute"]):
            graph()

    def finish(self) -> None:
        """Wait for all queued work."""
        torch.cuda.synchronize()


class Timed:
    """Another device that also keeps, by its own events, when each copy and each graph began and ended."""

    def __init__(self, device: Cuda):
        self._device, self._origin, self._spans, self._batch = device, device.event(), [], -1
        device.record("compute", self._origin)

    def __getattr__(self, name: str) -> object:
        return getattr(self._device, name)

    def copy(self, stream: str, target: torch.Tensor, source: torch.Tensor) -> None:
        """As the device's."""
        self._batch += stream == "in"  # a batch begins with its only copy there
        self._keep(stream, lambda: self._device.copy(stream, target, source))

    def replay(self, graph: Callable[[], None]) -> None:
        """As the device's."""
        self._keep("compute", lambda: self._device.replay(graph))

    def _keep(self, stream: str, queue: Callable[[], None]) -> None:
        begin, end = self._device.event(), self._device.event()
        self._device.record(stream, begin)
        queue()
        self._device.record(stream, end)
        self._spans.append((stream, self._batch, begin, end))

    def table(self) -> pd.DataFrame:
        """Wait for the device; a row for each copy and graph, in milliseconds since this was made."""
        self._device.finish()
        rows = [(*span[:2], *map(self._origin.elapsed_time, span[2:])) for span in self._spans]
        return pd.DataFrame(rows, columns=["stream", "batch", "begin_ms", "end_ms"])


def gpu_joules() -> float | None:
    """The energy that the whole board of the GPU here has used since its driver was loaded, as NVML counts it from
    Volta on; None where it does not tell. *Not run.* NVML is asked itself, as torch needs a package to do that.
    https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
    """
    try:
        nvml, board, millijoules = CDLL(NVML), c_void_p(), c_ulonglong()
        uuid = f"GPU-{torch.cuda.get_device_properties().uuid}".encode()
        failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid, byref(board))
        failed = failed or nvml.nvmlDeviceGetTotalEnergyConsumption(board, byref(millijoules))
    except (OSError, AttributeError):  # neither NVML nor, in an old one, this counter
        return None
    return None if failed else millijoules.value / 1000


def gpu_record() -> dict:
    """The facts on which machine code for this machine's GPU depends, as a dict for JSON."""
    gpu = torch.cuda.get_device_properties()
    versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {"name": gpu.name, "capability": [gpu.major, gpu.minor], **versions}


@dataclass
class Slot:
    """The buffers and events of one batch in flight. last: the future of the batch that last used this slot."""

    pixels: torch.Tensor
    logits: torch.Tensor
    fetched: torch.Tensor
    events: dict[str, torch.cuda.Event]
    last: Future | None = None


class Pipeline:
    """``submit(x: uint8[B, 3, H, W] on the host) -> Future`` of float32 logits [B, C] on the host, any B >= 1.

    A batch is padded to the next larger size for which a graph was captured, and its logits are cut to its own length.
    A batch larger than all sizes is computed in parts. The constructor allocates all memory and captures all graphs.

    Args:
        device: the device that runs the work.
        compute: a function from uint8 pixels on the device to float32 logits on the device; only the constructor calls
            it.
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
        self._device, self._sizes, self._lock = device, sizes, Lock()
        pixels = (sizes[0], *input_size), torch.uint8  # shape and dtype
        with torch.no_grad(), sdpa_kernel(ATTENTION, set_priority=True):
            # Graphs read and write these tensors, which are outside the graphs' pool and never move.
            self._pixels = device.empty(*pixels)
            logits = (sizes[0], compute(self._pixels[:1].zero_()).shape[1]), torch.float32
            self._logits = device.empty(*logits)
            buffers = [(device.empty(*pixels), device.empty(*logits), device.pinned(*logits)) for _ in range(SLOTS)]
            self._graphs = {size: device.capture(lambda size=size: self._work(compute, size)) for size in sizes}
        self._slots = [Slot(*three, {name: device.event() for name in WAITS[1:]}) for three in buffers]
        self._waiter = device.waiter()

    def _work(self, compute: Callable, size: int) -> None:
        self._logits[:size].copy_(compute(self._pixels[:size]))

    def submit(self, x: torch.Tensor) -> "Future[torch.Tensor]":
        """Queue one batch and return its future; ``x`` must not be changed until the future is done."""
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

    def spans(self, batches: torch.Tensor) -> pd.DataFrame:
        """When the device copied and computed each of ``batches``, by its own events: first with each one waited for
        before the next is submitted, then with SLOTS of them on their way.

        Args:
            batches: uint8[N, B, 3, H, W], B at most the largest of the sizes.

        Returns:
            The rows of ``Timed.table`` with ``in_flight``, 1 or SLOTS.
        """
        device, tables = self._device, []
        pixels = device.pinned(batches.shape, torch.uint8).copy_(batches)
        self.submit(pixels[0]).result()
        for in_flight in (1, SLOTS):
            self._device = Timed(device)
            for x in pixels:
                future = self.submit(x)
                if in_flight == 1:
                    future.result()
            tables.append(self._device.table().assign(in_flight=in_flight))
            self._device = device
        return pd.concat(tables, ignore_index=True)

    def close(self) -> None:
        """Wait for batches in flight and stop the thread; the next batch starts another one."""
        self._waiter.shutdown()
        self._device.finish()
        self._waiter = self._device.waiter()
