"""timm's models, by name and by the config.json of its hub layout."""

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError
from timm.data import ImageNetInfo, resolve_data_config
from timm.models import load_state_dict
from torch import nn

from vitdemo.dataset.decoding import Preprocessing
from vitdemo.errors import VitdemoError, reason_of

# Weights from files and from hubs into a module; nothing here executes a pickle.


WEIGHTS_FILE = "model.safetensors"
# BatchNorm's count of batches is read in training alone, and files older than torch 0.4.1 do not have it.
OPTIONAL_KEY = "num_batches_tracked"


class Plan(NamedTuple):
    """A model before its weights.

    file: finds those that belong to it. load: copies a state dict into ``module``; its third argument names that state
    dict in errors.
    """

    module: nn.Module
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    file: Callable[[], Path]
    load: Callable[[nn.Module, Mapping[str, torch.Tensor], str], None]


def read_config(path: Path) -> dict:
    """The object in a JSON file. Raises VitdemoError when there is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VitdemoError(
            f"{path}: not there; a model folder has it beside {WEIGHTS_FILE}, in timm's layout or Hugging Face's"
        ) from None
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise VitdemoError(f"{path}: is not a JSON object; save the model again or fetch it anew")
    return config


def read_state_dict(path: Path | str) -> dict[str, torch.Tensor]:
    """The tensors of a ``.safetensors`` file, or of a torch file read with ``weights_only=True``.

    Raises VitdemoError for a missing or damaged file and for a pickle that holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such weights file"
        raise VitdemoError(f'{path}: {problem}; give a .safetensors, .pth or .bin file, "pretrained" or "random"')
    try:
        state_dict = load_state_dict(str(path), use_ema=False, weights_only=True)
        if not all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
            raise TypeError("it holds more than tensors by name")
        return state_dict
    except Exception as error:  # each reader and each kind of damage has exceptions of its own
        reason = reason_of(error)
        if "weights_only" in str(error):  # torch's word for a pickle that wants to run something
            reason = "it holds more than tensors, perhaps code, and is not opened"
        raise VitdemoError(f"{path}: cannot be read as weights ({reason}); give a sound .safetensors file") from None


def load_weights(module: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy ``state_dict`` into ``module``, every key exactly once and in its own shape.

    Raises VitdemoError that names the first missing, extra or misshapen key; ``source`` names the weights in it.
    """
    fill(module.state_dict(), state_dict, source)


def fill(targets: Mapping[str, torch.Tensor], state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy each tensor of ``state_dict`` into the target of the same key; errors as in ``load_weights``."""
    needed = [key for key in targets if key in state_dict or key.rpartition(".")[2] != OPTIONAL_KEY]
    wrong = (
        [f"key {key} is missing" for key in needed if key not in state_dict]
        + [f"key {key} is not in this architecture" for key in state_dict if key not in targets]
        + [
            f"key {key} has shape {tuple(state_dict[key].shape)} where {tuple(targets[key].shape)} is needed"
            for key in needed
            if key in state_dict and state_dict[key].shape != targets[key].shape
        ]
    )
    if wrong:
        more = f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
        raise VitdemoError(f"{source}: weights of another architecture: {wrong[0]}{more}")
    with torch.no_grad():
        for key in needed:
            targets[key].copy_(state_dict[key])


def weights_sha256(module: nn.Module) -> str:
    """sha256 over every tensor's name, dtype, shape and bytes: the same however the weights were stored.

    Parameters and buffers, those that no file of weights holds included.
    """
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def pretrained_file(repo_id: str) -> Path:
    """The weights file of timm's hub repository, e.g. ``timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k``.

    Taken from the local Hugging Face cache, otherwise downloaded into it. Raises VitdemoError that says
    how to bring the file when there is neither a network nor a cached copy.
    """
    bring = f"run `hf download {repo_id} {WEIGHTS_FILE}`, bring the file here and give it as weights"
    return hub_file(repo_id, WEIGHTS_FILE, bring=f"{bring} (or use weights=random for speed alone)")


def hub_file(repo_id: str, *names: str, bring: str) -> Path:
    """The first of ``names`` that a hub repository has, from the local Hugging Face cache or downloaded into it.

    Raises VitdemoError when there is no such repository or file, or neither a network nor a cached copy; it ends
    with ``bring``, what to do on a machine with a network.
    """
    bring = f"on a machine with a network {bring}"
    try:
        for name in names:
            if isinstance(cached := try_to_load_from_cache(repo_id, name), str):
                return Path(cached)
        if hub_resolves():
            return _download(repo_id, *names)
    except HFValidationError:
        raise VitdemoError(f"{repo_id!r}: is not the name of a hub repository, which is owner/name") from None
    except RepositoryNotFoundError:
        raise VitdemoError(f"{repo_id}: the hub has no such repository, or keeps it closed; check the name") from None
    except Exception as error:  # connections break, disks fill and names are odd in types of many libraries
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise VitdemoError(f"{repo_id}: the hub has no {' or '.join(names)} in it; check the name") from None
        reason = reason_of(error)
        raise VitdemoError(f"{repo_id}: cannot download {names[0]} ({reason}); try again, or {bring}") from None
    raise VitdemoError(f"{repo_id}: {names[0]} is not in the Hugging Face cache and the hub does not answer; {bring}")


def _download(repo_id: str, *names: str) -> Path:
    for name in names[:-1]:
        try:
            return Path(hf_hub_download(repo_id, name))
        except LocalEntryNotFoundError:  # the connection broke, which says nothing about the repository
            raise
        except EntryNotFoundError:
            continue
    return Path(hf_hub_download(repo_id, names[-1]))


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


def is_name(name: str) -> bool:
    """Whether timm knows the architecture, whatever the weights tag after its dot."""
    return timm.is_model(name.partition(".")[0])


def full_tag(name: str) -> str:
    """``name``, with the tag of timm's own choice where it is a bare architecture of timm's that has weights."""
    if "." in name or not is_name(name) or not (weights := timm.get_pretrained_cfg(name)) or not weights.tag:
        return name
    return f"{name}.{weights.tag}"


def plan_from_name(name: str, *, pretrained: bool, others: Iterable[str]) -> Plan:
    """The plan of a timm name; with pretrained weights it must be a full tag.

    Raises VitdemoError for an unknown one, with the nearest of timm's names and ``others``.
    """
    architecture, _, tag = name.partition(".")
    if not is_name(name):
        near = get_close_matches(architecture, [*others, *timm.list_models()], n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists those there are"
        raise VitdemoError(f"{name}: no such model; {hint}")
    tags = timm.list_pretrained(f"{architecture}.*")
    if (tag and name not in tags) or (not tag and pretrained):
        problem = "has no such weights tag" if tag else "is an architecture; its weights need a full tag"
        raise VitdemoError(f"{name}: {problem}: {', '.join(tags) or 'timm has none for it'}")
    config = timm.get_pretrained_cfg(name)
    if config is None:  # an old name, which timm only forwards
        raise VitdemoError(f"{name}: timm has another name for it now; timm.list_models() lists those there are")
    config = config.to_dict()
    return _plan(timm.create_model(name), config, partial(pretrained_file, _hub_id(name)))


def plan_from_config(config: Mapping, find: Callable[..., Path], source: str) -> Plan:
    """The plan of a config.json; ``find`` gives the path of a file beside it, ``source`` names it in errors.

    Raises VitdemoError for a config that timm cannot build.
    """
    try:
        architecture, pretrained_cfg = config["architecture"], dict(config["pretrained_cfg"])
    except (KeyError, TypeError, ValueError):
        raise VitdemoError(
            f'{source}: has neither "architecture" and "pretrained_cfg", as timm writes, nor "architectures", as '
            "transformers writes; save the model with one of them"
        ) from None
    # As timm does: what the top level says of the outputs holds for the weights in this folder.
    pretrained_cfg |= {key: config[key] for key in ("num_classes", "label_names") if config.get(key)}
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise VitdemoError(f"{source}: architecture {architecture!r} is not known to timm {timm.__version__}")
    try:
        arguments = {"num_classes": pretrained_cfg.get("num_classes", 1000), **(config.get("model_args") or {})}
        module = timm.create_model(architecture, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise VitdemoError(f"{source}: timm cannot build this model ({reason_of(error)}); check model_args") from None
    try:
        return _plan(module, pretrained_cfg, partial(find, WEIGHTS_FILE))
    except (TypeError, ValueError) as error:
        raise VitdemoError(f"{source}: pretrained_cfg is not timm's ({reason_of(error)}); check its values") from None


def _plan(module: nn.Module, pretrained_cfg: dict, file: Callable[[], Path]) -> Plan:
    preprocessing = Preprocessing(**resolve_data_config(pretrained_cfg=pretrained_cfg))
    return Plan(module, preprocessing, _class_list(pretrained_cfg), file, load_weights)


def _hub_id(name: str) -> str:
    hub_id = timm.get_pretrained_cfg(name).hf_hub_id or "timm/"
    return hub_id + name if hub_id.endswith("/") else hub_id


def _class_list(pretrained_cfg: dict) -> tuple[str, ...] | None:
    """The wnids a timm config names; ImageNet-1k's own list for 1,000 unnamed outputs."""
    if pretrained_cfg.get("label_names"):
        return tuple(pretrained_cfg["label_names"])
    return tuple(ImageNetInfo("imagenet-1k").label_names()) if pretrained_cfg.get("num_classes") == 1000 else None
