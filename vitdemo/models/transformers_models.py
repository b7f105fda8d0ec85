"""Hugging Face's image classifiers of any architecture, as modules of transformers, which is an optional package."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from vitdemo.errors import VitdemoError, reason_of
from vitdemo.models.checkpoints import Checkpoint, labels_of, unwrapped
from vitdemo.models.loading import Plan, misfit
from vitdemo.models.processors import read_processor


class PixelsToLogits(nn.Module):
    """A classifier of transformers as a module from pixels to logits. flips: it was trained on blue, green, red."""

    def __init__(self, classifier: nn.Module, flips: bool):
        super().__init__()
        self.classifier = classifier
        self.flips = flips

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.classifier(pixel_values=pixels.flip(1) if self.flips else pixels).logits


def plan_from_config(path: Path, config: Mapping, find: Callable[..., Path], files: tuple[str, ...]) -> Plan:
    """The plan of a folder in Hugging Face's layout.

    Args:
        path: the path of the folder's config.json.
        config: the content of the config.json.
        find: returns the path of the first of several files in the folder that exists.
        files: the names that the weights file may have.

    Raises:
        VitdemoError: for a config that is not an image classifier of transformers, and where transformers is not
            installed.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else ""
    if "ForImageClassification" not in name:
        raise VitdemoError(f"{path}: architectures {names!r} cannot be expressed; known here: …ForImageClassification")
    try:
        import transformers
    except ImportError:
        raise VitdemoError(f'{path}: {name} needs transformers; run `pip install "vitdemo[hf]"`') from None
    if not hasattr(transformers, name):  # code that comes with the weights is never run
        raise VitdemoError(f"{path}: transformers {transformers.__version__} has no {name}; install one that has it")
    preprocessing, flips = read_processor(config, find)
    with _quiet():
        settings = getattr(transformers, name).config_class.from_dict(dict(config))
        classifier = transformers.AutoModelForImageClassification.from_config(settings, dtype=torch.float32)
    module = PixelsToLogits(classifier, flips)
    return Plan(module, preprocessing, labels_of(config.get("id2label")), partial(find, *files), load_weights)


def load_weights(module: PixelsToLogits, checkpoint: Checkpoint) -> PixelsToLogits:
    """Load weights into a classifier by transformers' own loader, which knows all names under which they were saved.

    Args:
        module: a module with the classifier's configuration.
        checkpoint: a checkpoint of that architecture.

    Raises:
        VitdemoError: for missing, extra and misshapen keys.
    """
    kind, settings = type(module.classifier), module.classifier.config
    state_dict = unwrapped(checkpoint, module.classifier.state_dict().keys())
    options = dict(config=settings, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True)
    try:
        with _quiet():
            classifier, found = kind.from_pretrained(None, state_dict=state_dict, **options)
        wrong = [f"{what.replace('_', ' ')} {sorted(keys)}" for what, keys in found.items() if keys]
    except Exception as error:  # transformers raises many types
        wrong = [reason_of(error)]
    if wrong:
        raise VitdemoError(misfit(checkpoint.path, "; ".join(wrong)))
    module.classifier = classifier
    return module


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block, hide transformers' reports and progress bars; errors are reported in one line instead."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
