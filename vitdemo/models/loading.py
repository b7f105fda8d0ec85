"""Shared by the loaders of both layouts: a plan, files of folders and repositories, loading weights, and their hash."""

import hashlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
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
from torch import nn

from vitdemo.dataset.decoding import Preprocessing
from vitdemo.errors import VitdemoError, reason_of
from vitdemo.models.checkpoints import Checkpoint, Labels

WEIGHTS_FILE = "model.safetensors"
MOST = 300  # the largest number of characters of torch's list of keys that do not fit


class Plan(NamedTuple):
    """A model before its weights are loaded.

    file: finds the file with the model's own weights. load: copies a checkpoint into ``module`` and returns it, or
    returns another module that has as many outputs as the checkpoint.
    """

    module: nn.Module
    preprocessing: Preprocessing
    labels: Labels
    file: Callable[[], Path]
    load: Callable[[nn.Module, Checkpoint], nn.Module]


def read_config(path: Path, otherwise: str = "") -> dict:
    """Read the object in a JSON file.

    Args:
        path: the file.
        otherwise: where to get the file, for the error when it is missing.

    Raises:
        VitdemoError: when the file is missing or does not hold a JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        usual = f"a model folder has it next to {WEIGHTS_FILE}, in timm's layout or Hugging Face's"
        raise VitdemoError(f"{path}: not there; {otherwise or usual}") from None
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise VitdemoError(f"{path}: is not a JSON object; save the model again or download it again")
    return config


def load_weights(module: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy weights into a module; every key must be there exactly once and have the right shape.

    Args:
        module: the module, which converts the weights to its own dtype.
        state_dict: the tensors of a file.
        source: the file's name, for errors.

    Raises:
        VitdemoError: with torch's list of missing, extra and misshapen keys, in one line.
    """
    try:
        module.load_state_dict(state_dict)
    except RuntimeError as error:
        raise VitdemoError(misfit(source, str(error).partition(":")[2])) from None


def misfit(source: Path | str, wrong: str) -> str:
    """The error message about the keys of the file ``source`` that do not fit, shortened where there are many."""
    wrong = shorten(wrong, MOST, placeholder=" …")
    cure = "give the architecture that they belong to, or the size as docs/your_own.md says"
    return f"{source}: weights of another architecture, or trained at another image size; {cure} (torch: {wrong})"


_found: WeakKeyDictionary[nn.Module, tuple[list, str]] = WeakKeyDictionary()  # the tensors' addresses, and their hash


def weights_sha256(module: nn.Module, *, anew: bool = True) -> str:
    """The sha256 over every tensor's name, dtype, shape and bytes. It does not depend on how the weights were stored.

    Args:
        module: the module, whose parameters and buffers count, including buffers that no weights file holds.
        anew: False returns the last hash if torch has noticed no write since; torch does not notice writes through
            ``.data``.
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
    """A file of a hub repository: the newest one, or the one in the local Hugging Face cache if the hub fails.

    Args:
        repo_id: owner/name.
        names: the possible names; the first that exists is taken.
        bring: the advice for a machine with a network, for errors.

    Raises:
        VitdemoError: when there is no such repository or file, or neither a network nor a cached copy.
    """
    bring = f"on a machine with a network {bring}"
    try:
        cached = [path for name in names if isinstance(path := try_to_load_from_cache(repo_id, name), str)]
        for name in names if hub_answers() else ():
            try:
                return Path(hf_hub_download(repo_id, name))  # the cached one, if the hub has no newer one
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError) or name == names[-1]:  # no connection, or no file
                    raise
    except HFValidationError:
        raise VitdemoError(f"{repo_id!r}: is not the name of a hub repository, which is owner/name") from None
    except RepositoryNotFoundError:
        raise VitdemoError(f"{repo_id}: the hub has no such repository, or it is private; check the name") from None
    except Exception as error:  # many libraries' types, for broken connections, full disks and invalid names
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise VitdemoError(f"{repo_id}: has no {' or '.join(names)} in it; check the name, or {bring}") from None
        if not cached:
            reason = reason_of(error)
            raise VitdemoError(f"{repo_id}: cannot download {names[0]} ({reason}); try again, or {bring}") from None
    if cached:
        return Path(cached[0])
    why = "HF_HUB_OFFLINE forbids asking the hub" if constants.HF_HUB_OFFLINE else "the hub does not answer"
    raise VitdemoError(f"{repo_id}: {names[0]} is not in the Hugging Face cache and {why}; {bring}")


def hub_answers() -> bool:
    """Whether the hub takes a connection. It is checked first, because a failing download retries for 45 s."""
    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for proxy in ("HTTPS_PROXY", "ALL_PROXY") for name in (proxy, proxy.lower())):
        return True  # the proxy connects
    hub = urlsplit(constants.ENDPOINT)
    port = hub.port or (443 if hub.scheme == "https" else 80)
    with suppress(OSError), socket.create_connection((hub.hostname, port), timeout=3):
        return True
    return False


def is_name(name: str) -> bool:
    """Whether timm knows the architecture in ``name``; the weights tag is not checked, unless it is a path as well."""
    is_path = "." in name and os.path.exists(name) and name not in timm.list_pretrained()  # such as resnet50.pth
    return not is_path and timm.is_model(name.partition(".")[0])


def full_tag(name: str) -> str:
    """``name``, with timm's default tag appended if it is only an architecture and timm has weights for it."""
    if "." in name or not is_name(name) or not (weights := timm.get_pretrained_cfg(name)) or not weights.tag:
        return name
    return f"{name}.{weights.tag}"
