"""Torch, operation by operation: the reference that every other engine is held against."""

import copy
from functools import cached_property

import torch
from torch import nn

from vitdemo.conversion.engines.contract import Engine
from vitdemo.conversion.models import FlopsByPrecision, Model
from vitdemo.dataset.images import Preprocessing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRECISION_OF = {str(dtype).removeprefix("torch."): precision for precision, dtype in DTYPES.items()}


class Normalised(nn.Module):
    """uint8[B, 3, H, W] -> logits: ``(x / 255 - mean) / std`` in float32, a cast, then the model.

    The normalisation is never folded into the patch embedding's weights by hand: a convolution that pads
    with zeros would then see zeros where it must see the normalised black of the padding.
    """

    def __init__(self, module: nn.Module, preprocessing: Preprocessing, dtype: torch.dtype):
        super().__init__()
        self.module = module
        self.dtype = dtype
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x.float() / 255 - self.mean) / self.std
        return self.module(x.to(self.dtype)).float()


class EagerEngine(Engine):
    """timm's module as it is; bf16 casts a copy of the weights."""

    name = "eager"
    precisions = ("fp32", "bf16")

    def __init__(self, model: Model, precision: str, *, device: str, threads: int):
        super().__init__(model, precision, device=device, threads=threads)
        dtype = DTYPES[precision]
        module = model.module
        if dtype != torch.float32 or device != "cpu":  # .to() would change the caller's model in place
            module = copy.deepcopy(module).to(device, dtype)
        self._module = Normalised(module, self.info.preprocessing, dtype).eval().to(device)

    def _infer(self, x: torch.Tensor) -> torch.Tensor:
        torch.set_num_threads(self.threads)
        with torch.inference_mode():
            return self._module(x.to(self.device)).cpu()

    @cached_property
    def precision_ran(self) -> dict[str, float]:
        """Read off the operations that torch really ran on one black image, by the dtype of their operands."""
        x = torch.zeros(1, *self.info.preprocessing.input_size, dtype=torch.uint8, device=self.device)
        with torch.no_grad(), FlopsByPrecision() as counter:
            self._module(x)
        total = sum(counter.flops.values())
        return {PRECISION_OF.get(dtype, dtype): flops / total for dtype, flops in counter.flops.items()}
