"""AOTInductor: torch's own compiler, run once; its package then runs without a compiler and without tracing."""

import copy
import json
import os
import re
import tempfile
from collections import Counter
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import torch
from sympy import sympify
from torch import fx
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.nn.attention import sdpa_kernel
from torch.utils.flop_counter import conv_flop_count

from vitdemo.engines.contract import CompiledEngine
from vitdemo.engines.graph import export_graph, tap_points
from vitdemo.engines.pipeline import ATTENTION, Cuda
from vitdemo.errors import VitdemoError
from vitdemo.models.model import FLOP_FORMULAS, Model, ModelInfo
from vitdemo.precisions import TORCH_TYPES, cuda_support, shares_that_ran, torch_support

PACKAGE, TAPPED, FACTS = "model.pt2", "tapped.pt2", "facts.json"

SHARED = {
    "freezing": True,  # the weights become constants in the layout of oneDNN's kernels
    "aot_inductor.precompile_headers": False,  # would take 300 MB in the temporary folder and need openssl
    "cpp.vec_isa_ok": True,  # assume that the compiler knows this CPU's instructions; testing them takes 20 seconds
}
OPTIONS = {
    "cpu": SHARED | {"cpp.dynamic_threads": True},  # the number of threads is read at run time, not compiled in
    # Matrix products use cuBLAS. Inductor would tune its own only for the example's batch size, and use them for all.
    "cuda": SHARED,
}

# Freezing replaces convolutions and linear layers by these operations, for which torch has no FLOP formulas. A torch
# without oneDNN, as on a Mac, does not have the operations.
MKLDNN_FLOPS = {
    "_convolution_pointwise": lambda x, w, *_, out_val: conv_flop_count(x.shape, w.shape, out_val.shape),
    "_linear_pointwise": lambda x, *_, out_val: 2 * x.shape[-1] * out_val.numel(),
}


class InductorEngine(CompiledEngine):
    """The module, exported for any batch size and compiled to machine code, with weights in oneDNN's layout.

    On CUDA, which was *not run*, it is compiled for the machine's GPU, and its calls are captured as graphs. Building
    needs a C++ compiler that knows the CPU's instructions (g++, or the one named in CXX); loading needs no compiler.
    """

    name = "inductor"
    precisions = ("fp32", "fp16", "bf16")
    devices = ("cpu", "cuda")
    streams = 1  # a call of the package holds Python's lock, so a second call would have to wait
    script = """
import torch

# torch._inductor.aoti_load_package would test the compiler, which takes twenty seconds
model = torch._C._aoti.AOTIModelPackageLoader(str(HERE / "model.pt2"), "model", False, 1, -1)
logits = lambda x: model.run([torch.from_numpy(x)])[0].numpy()
"""

    @classmethod
    def check_requirements(cls) -> None:
        """Raise VitdemoError, before the long build, where torch finds no C++ compiler or may not run compiled code."""
        if os.statvfs(tempfile.gettempdir()).f_flag & getattr(os, "ST_NOEXEC", 0):
            raise VitdemoError(
                f"inductor engine: {tempfile.gettempdir()} is mounted noexec, and machine code is run from there; set "
                "TMPDIR to another folder"
            )
        from torch._inductor import config
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, OSError):
            raise VitdemoError(
                f"inductor engine: needs a C++ compiler, and {config.cpp.cxx[-1]} does not run; install g++ (with apt) "
                "or cxx-compiler (with conda), or name yours in the environment variable CXX"
            ) from None

    @classmethod
    def support(cls, device: str) -> dict[str, str]:
        return cuda_support() if device == "cuda" else {"bf16": torch_support()["bf16"]}

    @classmethod
    def build(
        cls, model: Model, precision: str, folder: Path, *, device: str, calibration: torch.Tensor | None
    ) -> None:
        cls.check_requirements()
        dtype = TORCH_TYPES[precision]
        # .to() would change the caller's model in place
        cast = Model(copy.deepcopy(model.module).to(dtype), model.info)
        taps = tap_points(cast.module, model.info.preprocessing.input_size)
        torch.export.save(export_graph(cast, dtype=dtype, taps=taps), folder / TAPPED)
        # With its index, because the exported graph asserts its tensors' device, and "cuda" is not equal to "cuda:0".
        exported = move_to_device_pass(export_graph(cast, dtype=dtype), {"cuda": "cuda:0"}.get(device, device))
        facts = {"taps": taps, "flops": _compile(exported, folder / PACKAGE, device)}
        (folder / FACTS).write_text(json.dumps(facts, indent=2), encoding="utf-8")

    def __init__(self, folder: Path, info: ModelInfo, precision: str, *, device: str, threads: int):
        super().__init__(folder, info, precision, device=device, threads=threads)
        self._folder = folder
        self._facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        # torch._inductor.aoti_load_package is not used: it tests in every process which instructions the compiler
        # knows, which takes some twenty seconds, and its function parses its own signature at every call. On CUDA the
        # runner is for a single thread: the other kind waits between calls, which a captured graph must not do.
        package = folder / PACKAGE
        self._run = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", device == "cuda", 1, -1).run
        if device == "cuda":
            self.captured(lambda x: self._run([x])[0], Cuda())

    def _infer(self, x: torch.Tensor) -> torch.Tensor:
        torch.set_num_threads(self.threads)
        (logits,) = self._run([x.contiguous()])  # the machine code ignores strides
        return logits

    def layers(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The layers of the exported graph from which the code was compiled, run by torch operation by operation.

        The layers of a package cannot be read, because fused values are never written to memory. So an error in the
        model shows in a layer, and an error of the compiler shows as a difference between the graph's logits and the
        engine's.
        """
        self._check(x)
        torch.set_num_threads(self.threads)
        with torch.inference_mode():
            logits, *taken = self._twin(x)
        return dict(zip((*self._facts["taps"], "logits"), (*taken, logits), strict=True))

    @property
    def precision_ran(self) -> dict[str, float]:
        """Counted by the operands' dtype in the graph that Inductor compiled.

        It is Inductor's graph after decompositions, constant folding and freezing, so it includes the casts and
        fallbacks that Inductor inserted. Multiply-accumulates of the model that are missing in it are "unknown". The
        graph does not show how oneDNN multiplies; that comes from ``support`` on this machine, not on the one that
        built the package.
        """
        return shares_that_ran(self._facts["flops"], self.support(self.device), self.info.flops_per_image)

    @cached_property
    def _twin(self) -> torch.nn.Module:
        return torch.export.load(self._folder / TAPPED).module()


def _compile(exported: ExportedProgram, package: Path, device: str) -> Counter[str]:
    """Compile ``exported`` into the file ``package``; return the FLOPs of one image by dtype name."""
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

    flops: Counter[str] = Counter()
    options = {**OPTIONS[device], "post_grad_custom_pre_pass": lambda graph: flops.update(_count_flops(graph))}
    # Freezing needs inference mode, which torch recognises by disabled gradients. Blanks break the compiler's command.
    beside = None if re.search(r"\s", str(package.parent)) else package.parent
    attention = sdpa_kernel(ATTENTION, set_priority=True) if device == "cuda" else nullcontext()
    with tempfile.TemporaryDirectory(dir=beside) as scratch, temporary_cache_dir(scratch), torch.no_grad(), attention:
        try:
            aoti_compile_and_package(exported, package_path=str(package), inductor_configs=options)
        except RuntimeError as error:
            if "CppCompileError" not in str(error):
                raise
            reason = next((line for line in str(error).splitlines() if "error:" in line), "it gives no reason")
            raise VitdemoError(f"inductor engine: the C++ compiler failed ({reason}); name another in CXX") from None
    return flops


def _count_flops(graph: fx.Graph) -> Counter[str]:
    """The FLOPs of one image by the dtype of the first operand."""
    theirs = {getattr(torch.ops.mkldnn, name, None): formula for name, formula in MKLDNN_FLOPS.items()}
    formulas = FLOP_FORMULAS | theirs
    flops: Counter[str] = Counter()
    formulas.pop(None, None)
    for node in graph.nodes:
        if formula := formulas.get(getattr(node.target, "overloadpacket", None)):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
            count = sympify(formula(*args, **kwargs, out_val=node.meta["val"]))  # depends on the batch size
            operand = next(arg for arg in args if isinstance(arg, torch.Tensor))
            flops[str(operand.dtype).removeprefix("torch.")] += int(count.subs(dict.fromkeys(count.free_symbols, 1)))
    return flops
