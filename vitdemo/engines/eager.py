"""Plain PyTorch, operation by operation: the reference with which every other engine is compared."""

import copy
from functools import cached_property

import torch

from vitdemo.engines.contract import Engine
from vitdemo.engines.graph import Normalised, tap_points
from vitdemo.engines.pipeline import Cuda
from vitdemo.models.model import FlopsByPrecision, Model
from vitdemo.precisions import TORCH_TYPES, cuda_support, shares_that_ran, torch_product, torch_support


class EagerEngine(Engine):
    """The unchanged module; fp16 and bf16 cast a copy of its weights. On CUDA (*not run*) it runs as CUDA graphs."""

    name = "eager"
    precisions = ("fp32", "fp16", "bf16")
    devices = ("cpu", "cuda")
    product = staticmethod(torch_product)
    script = """
import torch

model = torch.export.load(HERE / "model.pt2").module()
logits = lambda x: model(torch.from_numpy(x)).detach().numpy()
"""

    def __init__(self, model: Model, precision: str, *, device: str, threads: int):
        super().__init__(model.info, precision, device=device, threads=threads)
        dtype = TORCH_TYPES[precision]
        module = model.module
        if dtype != torch.float32 or device != "cpu":  # .to() would change the caller's model in place
            module = copy.deepcopy(module).to(device, dtype)
        self._module = Normalised(module, self.info.preprocessing, dtype).eval().to(device)
        if device == "cuda":
            self.captured(self._module, Cuda())

    @classmethod
    def support(cls, device: str) -> dict[str, str]:
        return cuda_support() if device == "cuda" else torch_support()

    def _infer(self, x: torch.Tensor) -> torch.Tensor:
        torch.set_num_threads(self.threads)
        with torch.inference_mode():
            # torch chooses the convolution by the memory format, and with AVX2 another format rounds differently
            return self._module(x.contiguous())

    def layers(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self._check(x)
        torch.set_num_threads(self.threads)
        with torch.inference_mode():
            logits, *taken = self._tapped(x.contiguous().to(self.device))
        names = (*self._tapped.taps, "logits")
        return {name: tensor.cpu() for name, tensor in zip(names, (*taken, logits), strict=True)}

    @cached_property
    def _tapped(self) -> Normalised:
        graph, preprocessing = self._module, self.info.preprocessing
        taps = tap_points(graph.module, preprocessing.input_size)
        return Normalised(graph.module, preprocessing, graph.dtype, taps).eval().to(self.device)

    @cached_property
    def precision_ran(self) -> dict[str, float]:
        """Counted from the operations that torch ran on one black image, by the dtype of their operands."""
        x = torch.zeros(1, *self.info.preprocessing.input_size, dtype=torch.uint8, device=self.device)
        self.has_run = True
        with torch.no_grad(), FlopsByPrecision() as counter:
            self._module(x)
        return shares_that_ran(counter.flops, self.support(self.device))
