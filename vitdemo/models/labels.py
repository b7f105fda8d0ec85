"""What a checkpoint calls its outputs: an id for each, and the words that people read."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from timm.data import ImageNetInfo

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
