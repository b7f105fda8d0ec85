"""An engine that computes nothing, with which the cost of the harness itself is measured."""

import torch

from vitdemo.engines.contract import Engine
from vitdemo.errors import VitdemoError
from vitdemo.models.model import Model


class NullEngine(Engine):
    """Returns zeros. Its rate is the upper bound that reading, decoding and bookkeeping set for every other engine."""

    name = "null"
    precisions = ("none",)
    streams = 1  # its calls take no time

    def __init__(self, model: Model, precision: str, *, device: str, threads: int):
        super().__init__(model.info, precision, device=device, threads=threads)
        if self.info.classes is None:
            raise VitdemoError(
                f"{self.info.tag}: the null engine answers one zero per class; give the model its classes"
            )

    def _infer(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), len(self.info.classes))

    @property
    def precision_ran(self) -> dict[str, float]:
        return {"none": 1.0}
