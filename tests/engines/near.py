"""How far two computations lie apart, and what each precision is allowed."""

import torch

MOST = {"fp32": 1e-4, "bf16": 2e-2, "int8": 0.1}  # relative L2
LEAST = {"fp32": 1, "bf16": 0.995, "int8": 0.98}  # of the answers are eager's


def relative_l2(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def pearson(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of logits centred over the images."""
    return float(torch.corrcoef(torch.stack([(each - each.mean(0)).flatten() for each in (a, b)]))[0, 1])


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.argmax(1) == b.argmax(1)).float().mean().item()


def in_batches(engine, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([engine(batch) for batch in x.split(8)])
