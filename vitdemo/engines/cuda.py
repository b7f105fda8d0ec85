"""CUDA's streams, events, pinned buffers and captured graphs, as ``pipeline`` needs them. Written, **not run**."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

WARM_UP = 3  # calls before a capture: libraries choose and load their kernels in them, which no graph may hold


class Cuda:
    """The GPU behind ``Pipeline``. A test puts another device in its place that runs what is queued in any order.

    Streams are "in" for copies to the GPU, "compute" for graphs, "out" for copies to the host. Nothing but ``wait``
    orders what is in two of them. With the first one, products and convolutions of float32 are no longer rounded to
    TF32, which has 10 bits of fraction; torch refuses a mix of these settings with the older ones, ``allow_tf32``.
    https://docs.pytorch.org/docs/stable/notes/cuda.html
    """

    def __init__(self):
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"
        self._streams = {name: torch.cuda.Stream() for name in ("in", "compute", "out")}
        self._pool = torch.cuda.graph_pool_handle()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the GPU."""
        return torch.empty(shape, dtype=dtype, device="cuda")

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host that the GPU reads and writes by itself."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def event(self) -> torch.cuda.Event:
        """Whoever waits for it on the host sleeps, and leaves its core to decoding."""
        return torch.cuda.Event(blocking=True, enable_timing=True)

    def waiter(self) -> ThreadPoolExecutor:
        """The one thread that waits for results; it queues nothing."""
        return ThreadPoolExecutor(1, "engine-cuda")

    def copy(self, stream: str, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy. The host waits for it only where ``source`` is of its memory and is not pinned."""
        with torch.cuda.stream(self._streams[stream]):
            target.copy_(source, non_blocking=True)

    def record(self, stream: str, event: torch.cuda.Event) -> None:
        """Queue ``event``: it happens when all that was queued before it is done."""
        event.record(self._streams[stream])

    def wait(self, name: str, what: torch.cuda.Event | Future, stream: str | None = None) -> None:
        """Let ``stream``, or the host where none is given, go no further until ``what`` has happened.

        Args:
            name: which of the schedule's waits this is.
            what: an event, or on the host also a future.
            stream: which one waits.
        """
        if stream:
            self._streams[stream].wait_event(what)
        elif isinstance(what, Future):
            what.exception()
        else:
            what.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """``work`` once run is replayed by one call to the driver, on the very memory that it used now.

        Graphs share a pool of memory, as they run one at a time. ``capture_error_mode``: other threads may go on using
        CUDA meanwhile.
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
        """Queue a captured graph in the stream "compute"."""
        with torch.cuda.stream(self._streams["compute"]):
            graph()

    def finish(self) -> None:
        """Wait for all that was queued."""
        torch.cuda.synchronize()


def gpu_record() -> dict:
    """What machine code for the GPU here depends on, as JSON can hold it."""
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
