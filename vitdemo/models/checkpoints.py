"""What a model's files say, read without executing them: tensors, settings, and what the outputs are called."""

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

from vitdemo.errors import VitdemoError, reason_of

PLAIN, AVERAGED = ("state_dict", "model"), ("state_dict_ema", "model_ema")  # what training scripts call them
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".npz")


class Checkpoint(NamedTuple):
    """What a file holds.

    state_dict: by the file's names, without the prefixes of DDP and torch.compile. said: the arguments of timm's
    training script, such as ``model``, ``img_size`` and ``mean``; in other files ``model`` alone, or nothing.
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    said: Mapping[str, Any]


def read_checkpoint(path: Path | str, *, ema: bool = False) -> Checkpoint:
    """The tensors of a ``.safetensors`` or ``.npz`` file, or of a torch file read with ``weights_only=True``.

    Args:
        path: of that file; ``~`` is not expanded.
        ema: take the moving average of the weights, which training scripts keep beside them.

    Raises:
        VitdemoError: for a missing or damaged file, for a pickle that holds anything but tensors and settings, and
            where there is no moving average.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such weights file"
        raise VitdemoError(f'{path}: {problem}; give a .safetensors, .pth or .bin file, "pretrained" or "random"')
    try:
        content = _content(path)
        averages = next((content[name] for name in AVERAGED if content.get(name)), None)
        weights = next((content[name] for name in PLAIN if name in content), averages or content)
        chosen = clean_state_dict(averages or weights if ema else weights)
        if not all(isinstance(tensor, torch.Tensor) for tensor in chosen.values()):
            raise TypeError("it holds more than tensors by name")
    except Exception as error:  # each reader and each kind of damage has exceptions of its own
        reason = reason_of(error)
        if "weights_only" in str(error):  # torch's word for a pickle that wants to run something
            reason = "it holds more than tensors, perhaps code, and is not opened"
        raise VitdemoError(f"{path}: cannot be read as weights ({reason}); save the state_dict() alone anew") from None
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
    with torch.serialization.safe_globals([Namespace]), catch_warnings(action="ignore"):  # timm's own files hold one
        return torch.load(path, map_location="cpu", weights_only=True)


def unwrapped(state_dict: dict[str, torch.Tensor], expected: Set[str]) -> dict[str, torch.Tensor]:
    """Without the prefix that a wrapper gave to all keys, such as Lightning's ``model.``, where that is what differs.

    Args:
        state_dict: of a file.
        expected: keys of which some are there without the prefix.
    """
    first = next(iter(state_dict), "")
    for dot in re.finditer(r"\.", first) if not expected & state_dict.keys() else ():
        prefix = first[: dot.end()]
        bare = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        if len(bare) == len(state_dict) and expected & bare.keys():
            return bare
    return state_dict


IMAGENET = ImageNetInfo("imagenet-1k")
WNIDS = tuple(IMAGENET.label_names())
GENERIC = re.compile(r"LABEL_\d+")  # what transformers, and timm in 2021, write where nobody named anything


class Labels(NamedTuple):
    """classes: an id for each output. names: what people call it. Each None where nobody knows, or they are not told
    apart."""

    classes: tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None


IMAGENET_LABELS = Labels(WNIDS, tuple(IMAGENET.label_descriptions()))


def labels_of(given: object, descriptions: object = None) -> Labels:
    """What the entries of a configuration say.

    Args:
        given: ``id2label`` or ``label_names``: a list, or an object by the outputs' numbers.
        descriptions: timm's ``label_descriptions``, by those names.

    Returns:
        Nothing where an output has no name of its own or all are generic; names alone where two outputs share one, as
        no data can be told apart by them; wnids for ImageNet-1k's descriptions in their order.
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
    """A list, or the values of an object whose keys are 0 to n - 1; else nothing."""
    if isinstance(given, Mapping):
        by_number = {str(key): value for key, value in given.items()}
        given = [by_number.get(str(k)) for k in range(len(by_number))] if "0" in by_number else ()
    return tuple(given) if isinstance(given, (list, tuple)) else ()


def _are_imagenet_names(labels: tuple[str, ...]) -> bool:
    """Whether ``labels`` name the synsets of ImageNet-1k in their order, as in "tench, Tinca tinca".

    Each shares at least as many names with its own synset as with any other; a few may share none at all, like the
    "crane2" by which some lists tell the machine from the bird.
    """
    if len(labels) != len(WNIDS):
        return False
    having = defaultdict(set)  # name -> the synsets that have it
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
