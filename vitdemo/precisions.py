"""Whether a runtime computes in a precision natively on this processor, emulates it, or does not have it."""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache

import torch

from vitdemo.errors import reason_of

NATIVE, EMULATED, ABSENT = "native", "emulated", "absent"
TORCH_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # per number
# Environment variables that hide instructions from oneDNN (in torch and in OpenVINO) and from torch's own kernels. The
# runtimes still report the processor's real instructions.
MASKS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
# The names of the precisions in torch, ONNX Runtime and OpenVINO.
NAMES = {
    "fp32": ("float32", "float", "f32"),
    "fp16": ("float16", "f16"),
    "bf16": ("bfloat16",),
    "int8": ("uint8", "i8", "u8"),
}
PRECISION_OF = {theirs: precision for precision, names in NAMES.items() for theirs in names}
SIDE, ROUNDS = 256, 15  # the side of the small matrix product that decides, and how often it is timed

Shape = tuple[int, int, int]  # m, k, n of the product of an [m, k] and a [k, n] matrix
Call = Callable[[], object]
Product = Callable[[str, Shape, int], Call | None]


def support_of(precision: str, words: Iterable[bool], product: Product) -> str:
    """NATIVE, EMULATED or ABSENT: how a runtime computes in ``precision`` on this machine.

    words: what the runtime and the processor report about native support. If all are true and no instructions are
    masked, the precision is native. Otherwise the runtime times a small matrix product: a precision in which it is
    slower than in fp32 is emulated.
    product: the runtime's ``Engine.product``; it returns None for a precision in which the runtime cannot multiply.
    """
    if all(words) and not any(os.environ.get(name) for name in MASKS):
        return NATIVE
    calls = [product(each, (SIDE,) * 3, 1) for each in ("fp32", precision)]
    if None in calls:
        return ABSENT
    fp32_s, asked_s = _shortest_s(calls)
    return NATIVE if asked_s < fp32_s else EMULATED


def _shortest_s(calls: Iterable[Call]) -> list[float]:
    """The shortest duration of each of ``calls``, in seconds; they run interleaved, and the first round is not counted.

    Other work on the machine makes a call longer, never shorter. These calls use one thread and take a fraction of a
    millisecond, so even a busy machine leaves one of them undisturbed.
    """
    taken: list[list[float]] = [[] for _ in calls]
    for number in range(ROUNDS + 1):
        for call, seconds in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            if number:
                seconds.append(time.perf_counter() - start)
    return [min(seconds) for seconds in taken]


def torch_product(precision: str, shape: Shape, threads: int, device: str = "cpu") -> Call | None:
    """A function that multiplies an [m, k] by a [k, n] matrix in torch, on a GPU without waiting; None for int8."""
    if precision not in TORCH_TYPES:
        return None
    m, k, n = shape
    left, right = (torch.rand(size, device=device).to(TORCH_TYPES[precision]) for size in ((m, k), (n, k)))
    out = torch.empty(m, n, dtype=TORCH_TYPES[precision], device=device)
    if device == "cuda":
        return lambda: torch.mm(left, right.T, out=out)

    def call() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.mm(left, right.T, out=out)
        finally:
            torch.set_num_threads(before)

    return call


@cache
def no_cuda() -> str:
    """Why torch cannot compute on CUDA here, or "" where it can. It may see a GPU for which it has no kernels."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    try:
        (torch.ones(1, device="cuda") + 1).item()
    except Exception as error:  # an error of CUDA, or of a torch that was built without CUDA
        reason = f"torch sees a CUDA device and cannot compute on it ({reason_of(error)})"
        print(f"{reason}; the CPU computes", file=sys.stderr)
        return reason
    return ""


@cache
def torch_support() -> dict[str, str]:
    """How torch computes in each precision on this processor.

    ``_is_mkldnn_bf16_supported`` is also True on processors that have AVX512 but no bf16 instructions, where oneDNN
    emulates bf16. A torch without oneDNN, as on a Mac, cannot report it, and may leave the processor's bf16
    instructions unused.
    """
    has = torch.cpu.get_capabilities()
    words = [any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))]
    words.append(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return {"fp32": NATIVE, "bf16": support_of("bf16", words, torch_product)}


def cuda_support() -> dict[str, str]:
    """How torch computes in each precision on the GPU; *not run*. All GPUs that torch supports have fp16."""
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return {"fp32": NATIVE, "fp16": NATIVE, "bf16": NATIVE if bf16 else EMULATED}


def adds_products_exactly() -> bool:
    """Whether this CPU adds up products of uint8 and int8 exactly.

    An x86 processor without VNNI adds pairs of products in 16 bits. Two large products overflow, unless the weights
    have only 7 bits.
    """
    cpu = torch.cpu.get_capabilities()
    return not cpu["architecture"].startswith("x86") or cpu["avx512_vnni"] or cpu["avx_vnni"]


def shares_that_ran(work: Mapping[str, float], support: Mapping[str, str], expected: float = 0.0) -> dict[str, float]:
    """The share of a model's work in each precision; an emulated precision is named like ``bf16 emulated``.

    Args:
        work: the counted multiply-accumulates or FLOPs, by precision or by a runtime's name for it.
        support: how each precision is computed here.
        expected: the model's total work. If more than 1 % of it was not counted, because it ran in kernels of an
            unknown kind, that share is named "unknown".
    """
    seen: Counter[str] = Counter()
    for name, count in work.items():
        precision = PRECISION_OF.get(name, name)
        seen[f"{precision} {EMULATED}" if support.get(precision) == EMULATED else precision] += count
    if (missing := expected - seen.total()) > 0.01 * expected:
        seen["unknown"] = missing
    return {name: count / seen.total() for name, count in seen.items()}
