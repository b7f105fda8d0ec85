"""timm's models: by name, by the config.json of timm's hub layout, and with weights from a checkpoint file."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import timm
import torch
from timm.data import resolve_data_config
from timm.models import PretrainedCfg
from timm.models._hub import load_model_config_from_path
from torch import nn

from vitdemo.dataset.decoding import Preprocessing
from vitdemo.errors import VitdemoError, reason_of
from vitdemo.models import loading
from vitdemo.models.checkpoints import IMAGENET_LABELS, SUFFIXES, Checkpoint, Labels, labels_of, unwrapped
from vitdemo.models.huggingface import WEIGHTS_FILES, is_state_dict
from vitdemo.models.loading import WEIGHTS_FILE, Plan, hub_file, is_name

KNOWN = {field.name for field in fields(PretrainedCfg)}  # configurations written in 2021 may have more entries


def plan_from_name(name: str, *, pretrained: bool, others: Iterable[str], said: Mapping) -> Plan:
    """The plan of a model with one of timm's names.

    Args:
        name: an architecture, or a full tag, which pretrained weights need.
        pretrained: whether timm's pretrained weights will be loaded.
        others: further valid names, which the error for an unknown name may suggest.
        said: ``Checkpoint.said`` of the checkpoint that will be loaded.

    Raises:
        VitdemoError: for an unknown name, with the most similar ones, and for an unknown tag, with the known ones.
    """
    architecture, _, tag = name.partition(".")
    if not is_name(name):
        if os.sep in name or Path(name).suffix in SUFFIXES:
            hub = f"; a repository of the hub is hf-hub:{name}" if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else ""
            raise VitdemoError(f"{name}: no such file or folder; check the path{hub}")
        near = get_close_matches(architecture, [*others, *timm.list_models()], n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists all"
        raise VitdemoError(f"{name}: no such model; {hint}")
    tags = timm.list_pretrained(f"{architecture}.*")
    if (tag and name not in tags) or (not tag and pretrained):
        problem = "has no such weights tag" if tag else "is an architecture; its weights need a full tag"
        raise VitdemoError(f"{name}: {problem}: {', '.join(tags) or 'timm has none for it'}")
    options, said = _options(name, said)
    build = partial(timm.create_model, name, **options)
    module = build()
    if not tag or said.get("model"):  # timm's test input size belongs to its own weights, not to a training's
        said = {"input_size": module.pretrained_cfg["input_size"]} | said
    repo_id = module.pretrained_cfg.get("hf_hub_id") or f"timm/{name}"
    bring = f"run `hf download {repo_id} {WEIGHTS_FILE}`, bring the file here and give it as weights"
    bring = f"{bring} (or use weights=random for speed alone)"
    return _plan(module, said, partial(hub_file, repo_id, WEIGHTS_FILE, bring=bring), build)


def _options(name: str, said: Mapping) -> tuple[dict, dict]:
    """The options with which timm's training script built the model, and the arguments for its preprocessing."""
    options = dict(said.get("model_kwargs") or {}) | ({"global_pool": said["gp"]} if said.get("gp") else {})
    size = said.get("input_size") or said.get("img_size") or options.get("img_size")
    size = tuple(size)[-2:] if isinstance(size, (list, tuple)) else (size, size)
    said = {key: value for key, value in said.items() if key not in ("input_size", "img_size", "in_chans")}
    if not isinstance(size[0], int):
        return options, said
    if timm.get_pretrained_cfg(name).fixed_input_size:
        options["img_size"] = size
    return options, said | {"input_size": (3, *size)}


def plan_from_config(path: Path, config: Mapping, find: Callable[..., Path], *, pretrained: bool) -> Plan:
    """The plan of a folder in timm's hub layout, or in its layout of 2021, where all entries are in one object.

    Args:
        path: the path of the folder's config.json.
        config: the content of the config.json.
        find: returns the path of the first of several files in the folder that exists.
        pretrained: whether the folder's weights will be loaded; their number of outputs must then be the config's.

    Raises:
        VitdemoError: for a config that is not timm's.
    """
    nested = config.get("pretrained_cfg", config if "num_classes" in config else None)
    if "architecture" not in config or not isinstance(nested, dict):
        both = '"architecture" and "pretrained_cfg", as timm writes, nor "architectures", as transformers writes'
        raise VitdemoError(f"{path}: has neither {both}; save the model with one of them")
    said, architecture, options = load_model_config_from_path(path.parent)
    said = {key: value for key, value in said.items() if key in KNOWN}
    build = partial(timm.create_model, architecture, pretrained_cfg=said, **options)
    module = build()

    def contradiction(num_classes: int):
        wrong = f"says {module.num_classes} classes, and the weights next to it have {num_classes} outputs"
        raise VitdemoError(f"{path}: {wrong}; correct that, or give them with --weights to the architecture's name")

    return _plan(module, {}, partial(find, *WEIGHTS_FILES), contradiction if pretrained else build)


def _plan(module: nn.Module, said: Mapping, file: Callable[[], Path], build: Callable[..., nn.Module]) -> Plan:
    config = module.pretrained_cfg
    # timm's published accuracies are measured at the test input size.
    tested = "input_size" not in said and not config.get("fixed_input_size")
    preprocessing = resolve_data_config(said, config, use_test_size=tested)
    labels = labels_of(config.get("label_names"), config.get("label_descriptions"))
    if labels == Labels() and config.get("num_classes") == module.num_classes == len(IMAGENET_LABELS.classes):
        labels = IMAGENET_LABELS
    return Plan(module, Preprocessing(**preprocessing), labels, file, partial(load_weights, build))


def load_weights(build: Callable[..., nn.Module], module: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Copy weights into timm's module, or into another one with as many outputs as the weights have.

    Args:
        build: builds the module with ``num_classes`` outputs.
        module: the module with the number of outputs that belongs to its name.
        checkpoint: a checkpoint in timm's layout, or in one that timm can translate.

    Raises:
        VitdemoError: for weights that do not fit.
    """
    if is_state_dict(checkpoint.state_dict):
        folder = "give the folder where they lie with their config.json as the model"
        raise VitdemoError(f"{checkpoint.path}: Hugging Face's weights do not go into timm's module; {folder}")
    state_dict = _translated(checkpoint, module)
    head = module.pretrained_cfg.get("classifier") or ""
    head = head if isinstance(head, str) else head[0]
    heads = [tensor for key, tensor in state_dict.items() if key == f"{head}.weight" or key.endswith("head/bias")]
    if heads and len(heads[0]) != module.num_classes:
        module = build(num_classes=len(heads[0]))
    if checkpoint.path.suffix == ".npz":
        _load_npz(module, checkpoint)
    else:
        loading.load_weights(module, state_dict, str(checkpoint.path))
    return module


def _translated(checkpoint: Checkpoint, module: nn.Module) -> dict[str, torch.Tensor]:
    """Rename the tensors to timm's names where timm's filter for this architecture knows the file's names."""
    expected = module.state_dict().keys()
    state_dict = unwrapped(checkpoint, expected)
    translate = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if translate and state_dict.keys() != expected:
        with suppress(Exception):  # the filter does not know the layout; the wrong keys are reported later
            return translate(state_dict, module)
    return state_dict


def _load_npz(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Load weights in Google's format. timm's reader ignores missing tensors, so the number of values is compared."""
    values = sum(tensor.numel() for tensor in checkpoint.state_dict.values())
    try:
        if values != sum(tensor.numel() for tensor in module.parameters()):
            raise ValueError("its values are not as many as the model's")
        module.load_pretrained(str(checkpoint.path))
    except Exception as error:  # the reader's exceptions, and those of an architecture without a reader
        raise VitdemoError(loading.misfit(checkpoint.path, reason_of(error))) from None
