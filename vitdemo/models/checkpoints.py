"""Reads a model's files without executing code in them: tensors, settings, and the names of the outputs."""

import re
import sys
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple
from warnings import catch_warnings

import numpy as np
import torch
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from timm.models import clean_state_dict

from vitdemo.errors import VitdemoError, named_errors, reason_of

# The names in training scripts' files.
PLAIN, AVERAGED = ("state_dict", "model", "model_state_dict", "net"), ("state_dict_ema", "model_ema")
LFS = b"version https://git-lfs"  # the first bytes of the text that Git LFS puts in the place of a large file
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".npz")


class Checkpoint(NamedTuple):
    """The content of a checkpoint file.

    state_dict: the tensors by the file's names, without the prefixes of DDP and torch.compile. said: the arguments of
    timm's training script, such as ``model``, ``img_size`` and ``mean``; for other files only ``model``, or nothing.
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    said: Mapping[str, Any]


def read_checkpoint(path: Path | str, *, ema: bool = False) -> Checkpoint:
    """Read the tensors of a ``.safetensors`` or ``.npz`` file, or of a torch file with ``weights_only=True``.

    Args:
        path: the file; ``~`` is not expanded.
        ema: take the moving average of the weights, which training scripts store together with the weights.

    Raises:
        VitdemoError: for a missing or damaged file, for a pickle that holds anything but tensors and settings, and
            where ``ema`` is given and there is no moving average.
    """
    path = Path(path)
    if not path.is_file():
        if path.with_name(f"{path.name}.index.json").exists():
            whole = "save the model again with max_shard_size='100GB'"
            raise VitdemoError(f"{path}: its weights are split into several files; {whole}")
        problem = "is a folder" if path.is_dir() else "no such weights file"
        raise VitdemoError(f'{path}: {problem}; give a .safetensors, .pth or .bin file, "pretrained" or "random"')
    try:
        content = _content(path)
        averages = next((content[name] for name in AVERAGED if content.get(name)), None)
        weights = next((content[name] for name in PLAIN if name in content), averages or content)
        chosen = clean_state_dict(averages or weights if ema else weights)
        chosen.pop("n_averaged", None)  # torch's AveragedModel counts its steps
        if not all(isinstance(tensor, torch.Tensor) for tensor in chosen.values()):
            raise TypeError("it holds more than tensors by name")
    except Exception as error:  # each reader raises other types for each kind of damage
        reason = reason_of(error)
        with named_errors(path), open(path, "rb") as file:
            start = file.read(len(LFS))
        if start == LFS:
            raise VitdemoError(f"{path}: stands for a large file of Git; run `git lfs pull` in its folder") from None
        if not start or start.startswith(b"<"):
            what = "is a web page" if start else "is empty"
            raise VitdemoError(f"{path}: {what}, and not the weights; download them again") from None
        if "weights_only" in str(error):  # torch's message for a pickle that would execute code
            reason = "it holds more than tensors, perhaps code, and is not opened"
        raise VitdemoError(f"{path}: cannot be read as weights ({reason}); save only the state_dict() again") from None
    if ema and averages is None:
        raise VitdemoError(f"{path}: holds no {' or '.join(AVERAGED)}; leave the moving average (ema) out")
    if averages is not None and weights is not averages:
        took = "the average" if ema else "the weights, as ema was not asked for"
        print(f"{path}: holds weights and their moving average (EMA); took {took}", file=sys.stderr)
    arguments = content.get("args")
    said = {"model": content.get("arch")} | (vars(arguments) if isinstance(arguments, Namespace) else {})
    return Checkpoint(path, chosen, said)


def _content(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays}
    with torch.serialization.safe_globals([Namespace]), catch_warnings(action="ignore"):  # timm's files have one
        return torch.load(path, map_location="cpu", weights_only=True)


def unwrapped(checkpoint: Checkpoint, expected: Set[str]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint without the prefix that a wrapper gave them, such as Lightning's ``model.``.

    Args:
        checkpoint: the content of the file.
        expected: the model's keys. A prefix is removed only if no key matches with it. Tensors outside it, such as
            the weights of the classes in a loss function, are left out, if all of the model's keys are below it.
    """
    state_dict = checkpoint.state_dict
    if expected & state_dict.keys():
        return state_dict
    prefixes = {key[: dot.end()] for key in state_dict for dot in re.finditer(r"\.", key)}
    matching = Counter(prefix for prefix in prefixes for key in expected if prefix + key in state_dict)
    (prefix, most), (_, second) = [*matching.most_common(2), ("", 0), ("", 0)][:2]
    bare = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    left = [key for key in state_dict if not key.startswith(prefix)]
    if most == second or left and most < len(expected):
        return state_dict
    if left:
        print(f"{checkpoint.path}: left out what is not below {prefix!r}: {', '.join(left[:3])}", file=sys.stderr)
    return bare


IMAGENET = ImageNetInfo("imagenet-1k")
WNIDS = tuple(IMAGENET.label_names())
GENERIC = re.compile(r"LABEL_\d+")  # the names that transformers, and timm in 2021, write for unnamed outputs


class Labels(NamedTuple):
    """The names of a model's outputs.

    classes: one id per output. names: one readable name per output. Each is None where it is unknown; ``classes`` is
    also None where two outputs have the same name.
    """

    classes: tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None


IMAGENET_LABELS = Labels(WNIDS, tuple(IMAGENET.label_descriptions()))


def labels_of(given: object, descriptions: object = None) -> Labels:
    """The Labels that the entries of a configuration give.

    Args:
        given: ``id2label`` or ``label_names``: a list, or an object by the outputs' numbers.
        descriptions: timm's ``label_descriptions``, by those names.

    Returns:
        Empty Labels where an output has no name or all names are generic. Only names where two outputs share a name,
        because classes cannot be matched by it. The wnids as classes for ImageNet-1k's descriptions in their order.
    """
    names = _in_order(given)
    if not names or not all(isinstance(name, str) and name for name in names):
        return Labels()
    if names == WNIDS or _are_imagenet_names(names):
        return IMAGENET_LABELS
    if all(map(GENERIC.fullmatch, names)):
        return Labels()
    words = tuple(str(descriptions.get(name, name)) for name in names) if isinstance(descriptions, Mapping) else names
    return Labels(names if len(set(names)) == len(names) else None, words)


def _in_order(given: object) -> tuple:
    """The items of a list, or the values of an object whose keys are 0 to n - 1; otherwise an empty tuple."""
    if isinstance(given, Mapping):
        by_number = {str(key): value for key, value in given.items()}
        given = [by_number.get(str(k)) for k in range(len(by_number))] if "0" in by_number else ()
    return tuple(given) if isinstance(given, (list, tuple)) else ()


def _are_imagenet_names(labels: tuple[str, ...]) -> bool:
    """Whether ``labels`` name the synsets of ImageNet-1k in their order, as in "tench, Tinca tinca".

    Each label must share at least as many names with its own synset as with any other. A few labels may share none at
    all, such as "crane2", with which some lists distinguish the machine from the bird.
    """
    if len(labels) != len(WNIDS):
        return False
    having = defaultdict(set)  # name -> the synsets with this name
    for index, description in enumerate(IMAGENET_LABELS.names):
        for name in _names(description):
            having[name].add(index)
    unknown = 0
    for index, label in enumerate(labels):
        shared = Counter(synset for name in _names(label) for synset in having[name])
        if shared and shared[index] < max(shared.values()):
            return False
        unknown += not shared
    return unknown <= len(labels) // 100


def _names(label: str) -> set[str]:
    return {name.strip().casefold() for name in label.split(",")}
