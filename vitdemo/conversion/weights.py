"""Weights from files and from timm's hub into a state dict for timm's module; nothing here executes a pickle."""

import hashlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from timm.models import load_state_dict
from torch import nn

from vitdemo.errors import VitdemoError

WEIGHTS_FILE = "model.safetensors"


def read_state_dict(path: Path | str) -> dict[str, torch.Tensor]:
    """The tensors of a ``.safetensors`` file, or of a torch file read with ``weights_only=True``.

    Raises VitdemoError for a missing or damaged file and for a pickle that holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise VitdemoError(f"{path}: no such weights file; give a .safetensors or .pth file")
    try:
        state_dict = load_state_dict(str(path), use_ema=False, weights_only=True)
        if not all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
            raise TypeError("it holds more than tensors by name")
        return state_dict
    except Exception as error:  # each reader and each kind of damage has exceptions of its own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if "weights_only" in str(error):  # torch's word for a pickle that wants to run something
            reason = "it holds more than tensors, perhaps code, and is not opened"
        raise VitdemoError(f"{path}: cannot be read as weights ({reason}); give a sound .safetensors file") from None


def load_weights(module: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy ``state_dict`` into ``module``, every key exactly once and in its own shape.

    Raises VitdemoError that names the first missing, extra or misshapen key; ``source`` names the weights in it.
    """
    own = module.state_dict()
    wrong = (
        [f"key {key} is missing" for key in own if key not in state_dict]
        + [f"key {key} is not in this architecture" for key in state_dict if key not in own]
        + [
            f"key {key} has shape {tuple(state_dict[key].shape)} where {tuple(tensor.shape)} is needed"
            for key, tensor in own.items()
            if key in state_dict and state_dict[key].shape != tensor.shape
        ]
    )
    if wrong:
        more = f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
        raise VitdemoError(f"{source}: weights of another architecture: {wrong[0]}{more}")
    module.load_state_dict(state_dict)


def weights_sha256(module: nn.Module) -> str:
    """sha256 over every tensor's name, dtype, shape and bytes: the same however the weights were stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def pretrained_file(repo_id: str) -> Path:
    """The weights file of a hub repository, e.g. ``timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k``.

    Taken from the local Hugging Face cache, otherwise downloaded into it. Raises VitdemoError that says
    how to bring the file when there is neither a network nor a cached copy.
    """
    cached = try_to_load_from_cache(repo_id, WEIGHTS_FILE)
    if isinstance(cached, str):
        return Path(cached)
    bring = (
        f"on a machine with a network run `hf download {repo_id} {WEIGHTS_FILE}`, bring the file here and give it as "
        "weights (or use weights=random for speed alone)"
    )
    if not hub_resolves():
        raise VitdemoError(
            f"{repo_id}: its weights are not in the Hugging Face cache and the hub does not answer; {bring}"
        )
    try:
        return Path(hf_hub_download(repo_id, WEIGHTS_FILE))
    except Exception as error:  # connections break, disks fill and repositories close in types of many libraries
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise VitdemoError(f"{repo_id}: cannot download its weights ({reason}); try again, or {bring}") from None


def hub_resolves() -> bool:
    """Whether the hub's name resolves: asked first because a download retries for 45 s before it gives up."""
    if constants.HF_HUB_OFFLINE:
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True  # the proxy resolves names
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        return True
    except OSError:
        return False
