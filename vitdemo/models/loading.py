"""timm's models, by name and by the config.json of its hub layout."""

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

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
MOST = 300  # characters of torch's list of keys that do not fit


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
    """The object in a JSON file.

    Args:
        path: of that file.

    Raises:
        VitdemoError: when there is none.
    """
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

    Args:
        path: of that file; ``~`` is not expanded.

    Raises:
        VitdemoError: for a missing or damaged file, and for a pickle that holds anything but tensors.
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
    """Copy weights into a module, every key exactly once and in its own shape.

    Args:
        module: takes them in its own dtype.
        state_dict: from a file.
        source: names that file in errors.

    Raises:
        VitdemoError: torch's list of missing, extra and misshapen keys, in one line.
    """
    try:
        module.load_state_dict(state_dict)
    except RuntimeError as error:
        wrong = shorten(str(error).partition(":")[2], MOST, placeholder=" …")
        raise VitdemoError(f"{source}: weights of another architecture: {wrong}") from None


_found: WeakKeyDictionary[nn.Module, tuple[list, str]] = WeakKeyDictionary()  # where its tensors lie, and their hash


def weights_sha256(module: nn.Module, *, anew: bool = True) -> str:
    """sha256 over every tensor's name, dtype, shape and bytes: the same however the weights were stored.

    Args:
        module: parameters and buffers count, those that no file of weights holds included.
        anew: False takes what was found last where torch knows of no write since; it does not of one through ``.data``.
    """
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    state = [(name, x.data_ptr(), None if x.is_inference() else x._version) for name, x in tensors]
    if not anew and _found.get(module, (None,))[0] == state:
        return _found[module][1]
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    _found[module] = state, digest.hexdigest()
    return digest.hexdigest()


def hub_file(repo_id: str, *names: str, bring: str) -> Path:
    """A file of a hub repository, from the local Hugging Face cache or downloaded into it.

    Args:
        repo_id: owner/name.
        names: of which the first that is there is taken.
        bring: what to do on a machine with a network, for errors.

    Raises:
        VitdemoError: when there is no such repository or file, or neither a network nor a cached copy.
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
    why = "HF_HUB_OFFLINE forbids to ask the hub" if constants.HF_HUB_OFFLINE else "the hub does not answer"
    raise VitdemoError(f"{repo_id}: {names[0]} is not in the Hugging Face cache and {why}; {bring}")


def _download(repo_id: str, name: str, *others: str) -> Path:
    try:
        return Path(hf_hub_download(repo_id, name))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) or not others:  # the connection broke, or it was the last
            raise
        return _download(repo_id, *others)


def hub_resolves() -> bool:
    """Whether the hub's name resolves: asked first because a download retries for 45 s before it gives up."""
    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for proxy in ("HTTPS_PROXY", "ALL_PROXY") for name in (proxy, proxy.lower())):
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
    """The plan of one of timm's names.

    Args:
        name: an architecture, or a full tag, which pretrained weights need.
        pretrained: whether the weights are to be timm's.
        others: names that may have been meant as well.

    Raises:
        VitdemoError: for an unknown name, with the nearest ones, and for an unknown tag, with those there are.
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
    module = timm.create_model(name)
    repo_id = module.pretrained_cfg.get("hf_hub_id") or f"timm/{name}"
    bring = f"run `hf download {repo_id} {WEIGHTS_FILE}`, bring the file here and give it as weights"
    bring = f"{bring} (or use weights=random for speed alone)"
    return _plan(module, partial(hub_file, repo_id, WEIGHTS_FILE, bring=bring))


def plan_from_config(path: Path, config: Mapping, find: Callable[..., Path]) -> Plan:
    """The plan of a folder in timm's hub layout.

    Args:
        path: of the folder's config.json.
        config: what that holds.
        find: gives the path of a file beside it.

    Raises:
        VitdemoError: for a config that is not timm's.
    """
    if "architecture" not in config or not isinstance(config.get("pretrained_cfg"), dict):
        raise VitdemoError(
            f'{path}: has neither "architecture" and "pretrained_cfg", as timm writes, nor "architectures", as '
            "transformers writes; save the model with one of them"
        )
    return _plan(timm.create_model(f"local-dir:{path.parent}"), partial(find, WEIGHTS_FILE))


def _plan(module: nn.Module, file: Callable[[], Path]) -> Plan:
    config = module.pretrained_cfg
    classes = config.get("label_names") or ()
    if not classes and config.get("num_classes") == 1000:
        classes = ImageNetInfo("imagenet-1k").label_names()
    preprocessing = Preprocessing(**resolve_data_config(pretrained_cfg=config))
    return Plan(module, preprocessing, tuple(classes) or None, file, load_weights)
