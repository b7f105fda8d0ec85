"""Hugging Face's ViTForImageClassification as timm's VisionTransformer: configuration, tensors, preprocessing, classes.

What the files mean by what they say, and by what they leave out, is transformers' ViTConfig and ViTImageProcessor.
"""

import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from timm.layers import GELUTanh, LayerNorm, QuickGELU
from timm.models import VisionTransformer
from torch import nn

from vitdemo.dataset.decoding import Preprocessing
from vitdemo.errors import VitdemoError
from vitdemo.models import loading
from vitdemo.models.loading import WEIGHTS_FILE, Plan, read_config

ARCHITECTURE = "ViTForImageClassification"
WEIGHTS_FILES = (WEIGHTS_FILE, "pytorch_model.bin")  # google/vit-large-patch16-224 has the second alone

DEFAULTS = {
    "architectures": None,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
    "num_labels": 2,
}
ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_fast": GELUTanh,
    "gelu_new": GELUTanh,
    "gelu_pytorch_tanh": GELUTanh,
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
}

# timm's layer -> Hugging Face's. Several are stacked in this order, output channel after output channel.
EMBEDDINGS_AND_HEAD = {
    "cls_token": ("vit.embeddings.cls_token",),
    "pos_embed": ("vit.embeddings.position_embeddings",),
    "patch_embed.proj": ("vit.embeddings.patch_embeddings.projection",),
    "norm": ("vit.layernorm",),
    "head": ("classifier",),
}
# By the prefix of the blocks: what save_pretrained writes, and what transformers 5 calls the same things in memory,
# which is what torch.save(model.state_dict()) writes.
BLOCKS = {
    "vit.encoder.layer": {
        "norm1": ("layernorm_before",),
        "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attn.proj": ("attention.output.dense",),
        "norm2": ("layernorm_after",),
        "mlp.fc1": ("intermediate.dense",),
        "mlp.fc2": ("output.dense",),
    },
    "vit.layers": {
        "norm1": ("layernorm_before",),
        "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attn.proj": ("attention.o_proj",),
        "norm2": ("layernorm_after",),
        "mlp.fc1": ("mlp.fc1",),
        "mlp.fc2": ("mlp.fc2",),
    },
}
# The pooler comes after the last norm of a bare ViTModel; the classifier reads that norm's class token itself.
UNUSED = ("vit.pooler.dense.weight", "vit.pooler.dense.bias")

PROCESSORS = ("ViTImageProcessor", "ViTImageProcessorFast", "ViTImageProcessorPil", "ViTFeatureExtractor")
PROCESSOR_DEFAULTS = {
    "image_processor_type": PROCESSORS[0],
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_center_crop": False,
    "do_pad": False,
    "size": 224,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # by PIL's numbers


def is_config(config: Mapping) -> bool:
    """Whether a config.json is Hugging Face's."""
    return "architectures" in config or "model_type" in config


def is_state_dict(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether weights have Hugging Face's keys."""
    return any(key.startswith(("vit.embeddings.", *BLOCKS)) for key in state_dict)


def plan_from_config(path: Path, config: Mapping, find: Callable[..., Path]) -> Plan:
    """The plan of a folder in Hugging Face's layout.

    Args:
        path: of the folder's config.json.
        config: what that holds.
        find: gives the path of the first of several files beside it that is there.

    Raises:
        VitdemoError: names the file and the entry that timm's module cannot express.
    """
    module = build_module(config, str(path))
    path = find("preprocessor_config.json")
    preprocessing = preprocessing_of(read_config(path), module.patch_embed.img_size, str(path))
    return Plan(module, preprocessing, classes_of(config), partial(find, *WEIGHTS_FILES), load_weights)


def build_module(config: Mapping, source: str) -> VisionTransformer:
    """timm's module for a config.json, with random weights.

    Raises VitdemoError that names ``source`` and the entry that timm's module cannot express.
    """
    values = _with_defaults(config)
    expressible = {
        "architectures": values["architectures"] == [ARCHITECTURE],
        "hidden_act": values["hidden_act"] in tuple(ACTIVATIONS),
        "num_channels": values["num_channels"] == 3,
    }
    _refuse(expressible, values, source, f"{ARCHITECTURE} with 3 channels and one of {', '.join(ACTIVATIONS)}")
    return VisionTransformer(
        img_size=_pair(values["image_size"]),
        patch_size=_pair(values["patch_size"]),
        num_classes=values["num_labels"],
        embed_dim=values["hidden_size"],
        depth=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        mlp_ratio=(values["intermediate_size"] + 0.5) / values["hidden_size"],  # timm rounds their product down
        qkv_bias=values["qkv_bias"],
        norm_layer=partial(LayerNorm, eps=float(values["layer_norm_eps"])),
        act_layer=ACTIVATIONS[values["hidden_act"]],
    )


def load_weights(module: VisionTransformer, state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy Hugging Face's tensors into timm's module; arguments and errors as of ``loading.load_weights``.

    Keys are named in errors as the file has them.
    """
    unused = [key for key in UNUSED if key in state_dict]
    if unused:
        print(f"{source}: {', '.join(unused)} not used, as the classifier does without", file=sys.stderr)
    prefix = next((prefix for prefix in BLOCKS if any(key.startswith(f"{prefix}.") for key in state_dict)), None)
    theirs = nn.Module()  # a module of their names over timm's memory
    for key, part in _targets(module, prefix or next(iter(BLOCKS))).items():
        *path, name = key.split(".")
        place = theirs
        for step in path:
            place = place._modules.setdefault(step, nn.Module())
        place.register_buffer(name, part)
    loading.load_weights(theirs, {key: tensor for key, tensor in state_dict.items() if key not in unused}, source)


def _targets(module: VisionTransformer, prefix: str) -> dict[str, torch.Tensor]:
    """Hugging Face's key -> the part of timm's tensor that it fills."""
    layers = dict(EMBEDDINGS_AND_HEAD)
    for block in range(len(module.blocks)):
        for ours, theirs in BLOCKS[prefix].items():
            layers[f"blocks.{block}.{ours}"] = tuple(f"{prefix}.{block}.{name}" for name in theirs)
    targets = {}
    for key, tensor in module.state_dict().items():
        layer, dot, kind = (key, "", "") if key in layers else key.rpartition(".")
        parts = tensor.chunk(len(layers[layer]))
        targets |= {f"{name}{dot}{kind}": part for name, part in zip(layers[layer], parts, strict=True)}
    return targets


def preprocessing_of(processor: Mapping, img_size: tuple[int, int], source: str) -> Preprocessing:
    """What a preprocessor_config.json says: resize to height x width whatever the aspect ratio, scale, normalise.

    Raises VitdemoError that names ``source`` and the entry that asks for something else.
    """
    values = PROCESSOR_DEFAULTS | {key: value for key, value in processor.items() if value is not None}
    if "image_processor_type" not in processor:
        values["image_processor_type"] = values.get("feature_extractor_type", PROCESSORS[0])
    size = values["size"]
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        size = [size["height"], size["width"]]
    expressible = {
        "image_processor_type": values["image_processor_type"] in PROCESSORS,
        **{step: values[step] is usual for step, usual in PROCESSOR_DEFAULTS.items() if step.startswith("do_")},
        "size": _pair(size) == img_size,
        "resample": values["resample"] in tuple(INTERPOLATIONS),
        "rescale_factor": _are_numbers([values["rescale_factor"]], 1)
        and math.isclose(values["rescale_factor"], 1 / 255, rel_tol=1e-6),
        "image_mean": _are_numbers(values["image_mean"], 3),
        "image_std": _are_numbers(values["image_std"], 3) and min(values["image_std"]) > 0,
    }
    steps = f"a resize to {img_size} by resample 2 or 3, a division by 255, image_mean and image_std"
    _refuse(expressible, values, source, steps)
    return Preprocessing(
        input_size=(3, *img_size),
        crop_pct=1.0,
        crop_mode="squash",
        interpolation=INTERPOLATIONS[values["resample"]],
        mean=values["image_mean"],
        std=values["image_std"],
    )


def classes_of(config: Mapping) -> tuple[str, ...] | None:
    """The wnid of each output, from ``id2label``; None where its labels are neither wnids nor ImageNet-1k's names."""
    by_index = config.get("id2label")
    labels = [by_index.get(str(k)) for k in range(len(by_index))] if isinstance(by_index, dict) else []
    if not labels or not all(isinstance(label, str) for label in labels):
        return None
    if all(re.fullmatch(r"n\d{8}", label) for label in labels) and len(set(labels)) == len(labels):
        return tuple(labels)
    return tuple(ImageNetInfo("imagenet-1k").label_names()) if _are_imagenet_names(labels) else None


def _are_imagenet_names(labels: list[str]) -> bool:
    """Whether ``labels`` name the synsets of ImageNet-1k in their order, as in "tench, Tinca tinca".

    Each shares at least as many names with its own synset as with any other; a few may share none at all, like the
    "crane2" by which some lists tell the machine from the bird.
    """
    synsets = ImageNetInfo("imagenet-1k").label_descriptions()
    if len(labels) != len(synsets):
        return False
    having = defaultdict(set)  # name -> the synsets that have it
    for index, description in enumerate(synsets):
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


def _with_defaults(config: Mapping) -> dict:
    """The entries of a config.json that shape the module; null means the same as left out."""
    values = DEFAULTS | {key: config[key] for key in DEFAULTS if config.get(key) is not None}
    labels = config.get("id2label")
    return values | ({"num_labels": len(labels)} if isinstance(labels, dict) and labels else {})


def _pair(value: object) -> tuple:
    """(height, width) of one number or two."""
    return tuple(value) if isinstance(value, list) else (value, value)


def _are_numbers(values: object, count: int) -> bool:
    """Whether it is a list of ``count`` finite numbers; JSON's true is none."""
    known = isinstance(values, list) and all(type(each) in (int, float) and math.isfinite(each) for each in values)
    return known and len(values) == count


def _refuse(expressible: Mapping[str, bool], values: Mapping, source: str, known: str) -> None:
    """Raise VitdemoError for the first entry that is not expressible."""
    for key, possible in expressible.items():
        if not possible:
            raise VitdemoError(f"{source}: {key} {values[key]!r} cannot be expressed; known here: {known}")
