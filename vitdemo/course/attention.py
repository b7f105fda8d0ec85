"""Where a Vision Transformer looks: its attention, block by block and rolled out, and patches that are hidden."""

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from timm.models import VisionTransformer

from vitdemo.engines.graph import Normalised
from vitdemo.errors import VitdemoError
from vitdemo.models.model import Model

GREY = 128  # what a hidden patch is filled with


def attention_maps(model: Model, pixels: torch.Tensor) -> torch.Tensor:
    """The attention of every block and head: float32[B, blocks, heads, T, T], rows are queries and sum to 1.

    T counts the class token, registers, and the patches. Computed in eager fp32 without fused attention, which never
    writes the probabilities down; afterwards the model is as it was.

    Args:
        model: a Vision Transformer.
        pixels: uint8[B, 3, H, W].

    Raises:
        VitdemoError: for what is no VisionTransformer with a class token.
    """
    module = _transformer(model)
    maps: list[torch.Tensor] = []
    # timm's AttentionExtract leaves its hooks in the module, and a copy of it takes longer than the model.
    with ExitStack() as stack, torch.inference_mode():
        for attention in (block.attn for block in module.blocks):
            stack.enter_context(attention.attn_drop.register_forward_hook(lambda _, __, weights: maps.append(weights)))
            stack.callback(setattr, attention, "fused_attn", attention.fused_attn)
            attention.fused_attn = False
        Normalised(module, model.info.preprocessing)(pixels)
    return torch.stack(maps, dim=1)


def rollout(model: Model, maps: torch.Tensor) -> torch.Tensor:
    """How much of each patch reaches the class token through all blocks: float32[B, rows, columns], sums to 1.

    Attention rollout (Abnar and Zuidema, 2020, arXiv 2005.00928): the heads' mean, half of it replaced by the identity
    for the residual connection, multiplied over the blocks. It follows attention alone: what the values hold and what
    the MLPs do is not in it. All zero where no patch reaches the token.

    Args:
        model: from which the maps are.
        maps: float32[B, blocks, heads, T, T], as ``attention_maps`` gives them.
    """
    flow = torch.eye(maps.shape[-1])[:1].expand(len(maps), 1, -1)  # the class token's row, from the last block down
    for attention in reversed(maps.mean(dim=2).unbind(dim=1)):
        flow = 0.5 * (flow @ attention + flow)
    return _on_patches(_transformer(model), flow[:, 0])


def class_attention(model: Model, maps: torch.Tensor) -> torch.Tensor:
    """What the class token attends to in each block, the heads' mean: float32[B, blocks, rows, columns], sums to 1.

    Args:
        model: from which the maps are.
        maps: float32[B, blocks, heads, T, T], as ``attention_maps`` gives them.
    """
    return _on_patches(_transformer(model), maps.mean(dim=2)[:, :, 0])


def most_looked_at(flow: torch.Tensor) -> list[tuple[int, int]]:
    """The (row, column) of every patch, the largest value first.

    Args:
        flow: float32[rows, columns], such as one image's rollout.
    """
    return [divmod(place, flow.shape[1]) for place in flow.flatten().argsort(descending=True, stable=True).tolist()]


def mask_patches(model: Model, pixels: torch.Tensor, patches: Iterable[tuple[int, int]]) -> torch.Tensor:
    """A copy of ``pixels`` in which some patches are grey.

    Args:
        model: whose patches.
        pixels: uint8[..., 3, H, W].
        patches: (row, column) of each, counted from 0.

    Raises:
        VitdemoError: for a place that is no patch's.
    """
    rows, columns = patch_grid(model)
    height, width = pixels.shape[-2] // rows, pixels.shape[-1] // columns  # a hybrid's patch_size counts features
    masked = pixels.clone()
    for row, column in patches:
        if not (0 <= row < rows and 0 <= column < columns):
            there = f"{model.info.tag} has {rows} x {columns} of them, counted from 0"
            raise VitdemoError(f"patch ({row}, {column}): {there}")
        masked[..., row * height : (row + 1) * height, column * width : (column + 1) * width] = GREY
    return masked


def patch_grid(model: Model) -> tuple[int, int]:
    """How many rows and columns of patches ``model`` cuts a picture into."""
    return _transformer(model).patch_embed.grid_size


def has_attention(model: Model) -> bool:
    """Whether the functions of this file take ``model``."""
    module = model.module
    if not (isinstance(module, VisionTransformer) and module.has_class_token and module.global_pool == "token"):
        return False
    return all(hasattr(getattr(block, "attn", None), "attn_drop") for block in module.blocks)  # parallel ones have none


def _transformer(model: Model) -> VisionTransformer:
    if not has_attention(model):
        needed = "a class token and one attention per block, and only of those patches and attention are shown"
        raise VitdemoError(f"{model.info.tag}: is no VisionTransformer of timm's with {needed}; take a ViT")
    return model.module


def _on_patches(module: VisionTransformer, weights: torch.Tensor) -> torch.Tensor:
    """[..., T] on the grid of the patches, without the class token and registers, to sum 1."""
    patches = weights[..., module.num_prefix_tokens :]
    total = patches.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, patches / total, 0.0).unflatten(-1, module.patch_embed.grid_size)
