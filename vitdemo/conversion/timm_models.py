"""timm's models, by name and by the config.json of its hub layout."""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import timm
from timm.data import ImageNetInfo, resolve_data_config
from torch import nn

from vitdemo.conversion.weights import WEIGHTS_FILE, Plan, load_weights, pretrained_file
from vitdemo.dataset.images import Preprocessing
from vitdemo.errors import VitdemoError, reason_of


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
