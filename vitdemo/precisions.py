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
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # of a number
# Variables that hide instructions from oneDNN (in torch and in OpenVINO) and from torch's own kernels; what a runtime
# says of the processor does not follow them.
MASKS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
# What torch, ONNX Runtime and OpenVINO call them.
NAMES = {
    "fp32": ("float32", "float", "f32"),
    "fp16": ("float16", "f16"),
    "bf16": ("bfloat16",),
    "int8": ("uint8", "i8", "u8"),
}
PRECISION_OF = {theirs: precision for precision, names in NAMES.items() for theirs in names}
SIDE, ROUNDS = 256, 15  # of the small product that decides, and how often it is timed

Shape = tuple[int, int, int]  # m, k, n of an [m, k] matrix by a [k, n] one
Call = Callable[[], object]
Product = Callable[[str, Shape, int], Call | None]


def support_of(precision: str, words: Iterable[bool], product: Product) -> str:
    """NATIVE, EMULATED or ABSENT: how a runtime computes in ``precision`` here.

    words: what the runtime and the processor say of themselves. Where all of them say yes and no instructions are
    masked, that holds. Otherwise a small product of the runtime decides: a precision that is slower than fp32 on it is
    emulated.
    product: the runtime's ``Engine.product``; it gives None for a precision that the runtime does not multiply in.
    """
    if all(words) and not any(os.environ.get(name) for name in MASKS):
        return NATIVE
    calls = [product(each, (SIDE,) * 3, 1) for each in ("fp32", precision)]
    if None in calls:
        return ABSENT
    fp32_s, asked_s = _shortest_s(calls)
    return NATIVE if asked_s < fp32_s else EMULATED


def _shortest_s(calls: Iterable[Call]) -> list[float]:
    """Of each of ``calls``, by turns, the shortest after a cold one.

    What else the machine does makes calls longer, never shorter; those of one thread, a fraction of a millisecond each,
    find a moment of quiet on a busy machine too.
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
    """A call that multiplies an [m, k] matrix by a [k, n] one in torch; None for int8. On a GPU it is queued."""
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
    """Why torch computes nothing on CUDA here, "" where it does: it may see a GPU that it has no kernels for."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    try:
        (torch.ones(1, device="cuda") + 1).item()
    except Exception as error:  # CUDA's own, and torch's where it was built without it
        reason = f"torch sees a CUDA device and cannot compute on it ({reason_of(error)})"
        print(f"{reason}; the CPU computes", file=sys.stderr)
        return reason
    return ""


@cache
def torch_support() -> dict[str, str]:
    """How torch computes in each precision on this processor.

    ``_is_mkldnn_bf16_supported`` is also True of AVX512 without bf16 instructions, where oneDNN emulates them. A torch
    without oneDNN, as on a Mac, has no such word, and may use no bf16 instructions of a processor that has them.
    """
    has = torch.cpu.get_capabilities()
    words = [any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))]
    words.append(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return {"fp32": NATIVE, "bf16": support_of("bf16", words, torch_product)}


def cuda_support() -> dict[str, str]:
    """How torch computes in each precision on the GPU; *not run*. fp16 is older than every GPU that torch runs on."""
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return {"fp32": NATIVE, "fp16": NATIVE, "bf16": NATIVE if bf16 else EMULATED}


def adds_products_exactly() -> bool:
    """Whether this CPU adds up products of uint8 and int8 exactly.

    An x86 without VNNI adds them by pairs in 16 bits, which two large ones overflow; weights of 7 bits do not.
    """
    cpu = torch.cpu.get_capabilities()
    return not cpu["architecture"].startswith("x86") or cpu["avx512_vnni"] or cpu["avx_vnni"]


def shares_that_ran(work: Mapping[str, float], support: Mapping[str, str], expected: float = 0.0) -> dict[str, float]:
    """The share of a model's work in each precision; one that is emulated is called ``bf16 emulated``.

    Args:
        work: multiply-accumulates that were seen, or FLOPs, by precision or a runtime's name of it.
        support: how each precision is computed here.
        expected: the model's work. Where more than 1 % of it was not seen, in kernels of an unknown kind, that is
            "unknown".
    """
    seen: Counter[str] = Counter()
    for name, count in work.items():
        precision = PRECISION_OF.get(name, name)
        seen[f"{precision} {EMULATED}" if support.get(precision) == EMULATED else precision] += count
    if (missing := expected - seen.total()) > 0.01 * expected:
        seen["unknown"] = missing
    return {name: count / seen.total() for name, count in seen.items()}
