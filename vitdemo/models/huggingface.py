"""Hugging Face's layout; loads its ViTForImageClassification, configuration and tensors, as timm's VisionTransformer.

The entries of the configuration, and the defaults of those left out, are as in transformers' ViTConfig.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from timm.layers import GELUTanh, LayerNorm, QuickGELU, to_2tuple
from timm.models import VisionTransformer
from torch import nn

from vitdemo.models import loading, transformers_models
from vitdemo.models.checkpoints import Checkpoint, labels_of, unwrapped
from vitdemo.models.loading import WEIGHTS_FILE, Plan
from vitdemo.models.processors import read_processor, refuse

ARCHITECTURE = "ViTForImageClassification"
WEIGHTS_FILES = (WEIGHTS_FILE, "pytorch_model.bin")  # google/vit-large-patch16-224 has only the second

SIDES = {"image_size": 224, "patch_size": 16, "num_channels": 3}
DEPTHS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LAYERS = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True}
DEFAULTS = SIDES | DEPTHS | LAYERS | {"architectures": None, "num_labels": 2}
ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU, "relu": nn.ReLU, "silu": nn.SiLU, "swish": nn.SiLU}
ACTIVATIONS |= dict.fromkeys(("gelu_fast", "gelu_new", "gelu_pytorch_tanh"), GELUTanh)

# timm's layer -> Hugging Face's layers. Several are concatenated in this order along the output channels.
EMBEDDINGS_AND_HEAD = {
    "cls_token": ("vit.embeddings.cls_token",),
    "pos_embed": ("vit.embeddings.position_embeddings",),
    "patch_embed.proj": ("vit.embeddings.patch_embeddings.projection",),
    "norm": ("vit.layernorm",),
    "head": ("classifier",),
}
# The names inside a block, by the prefix of the blocks. save_pretrained writes the first set. transformers 5 uses the
# second set in memory, so torch.save(model.state_dict()) writes that.
NORMS = {"norm1": ("layernorm_before",), "norm2": ("layernorm_after",)}
BLOCKS = {
    "vit.encoder.layer": {
        "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attn.proj": ("attention.output.dense",),
        "mlp.fc1": ("intermediate.dense",),
        "mlp.fc2": ("output.dense",),
    },
    "vit.layers": {
        "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attn.proj": ("attention.o_proj",),
        "mlp.fc1": ("mlp.fc1",),
        "mlp.fc2": ("mlp.fc2",),
    },
}
# The pooler follows the last norm in a bare ViTModel. The classifier reads the class token after that norm directly.
UNUSED = ("vit.pooler.dense.weight", "vit.pooler.dense.bias")


def is_config(config: Mapping) -> bool:
    """Whether a config.json is in Hugging Face's layout, and not in timm's."""
    return "architecture" not in config and ("architectures" in config or "model_type" in config)


def is_state_dict(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether the weights have Hugging Face's keys."""
    return any(key.startswith(("vit.embeddings.", *BLOCKS)) for key in state_dict)


def plan_from_config(path: Path, config: Mapping, find: Callable[..., Path]) -> Plan:
    """The plan of a folder in Hugging Face's layout.

    Args:
        path: the path of the folder's config.json.
        config: the content of the config.json.
        find: returns the path of the first of several files in the folder that exists.

    Raises:
        VitdemoError: with the file and the entry that cannot be expressed.
    """
    several = config.get("problem_type") == "multi_label_classification"
    refuse({"problem_type": not several}, config, str(path), "models for which one class per image is right")
    if config.get("model_type", "vit") != "vit" and config.get("architectures") != [ARCHITECTURE]:
        return transformers_models.plan_from_config(path, config, find, WEIGHTS_FILES)
    module = build_module(config, str(path))
    preprocessing, _ = read_processor(config, find, "ViTImageProcessor")
    said, own = preprocessing.input_size[1:], module.patch_embed.img_size
    known = f"one that ends in {own[0]} x {own[1]}, as the model has it"
    refuse({"size": said == own}, {"size": said}, str(find("preprocessor_config.json")), known)
    labels = labels_of(config.get("id2label"))
    return Plan(module, preprocessing, labels, partial(find, *WEIGHTS_FILES), load_checkpoint)


def build_module(config: Mapping, source: str) -> VisionTransformer:
    """Build timm's module for a config.json, with random weights.

    Raises VitdemoError with ``source`` and the entry that timm's module cannot express.
    """
    # an entry that is null counts as left out
    values = DEFAULTS | {key: config[key] for key in DEFAULTS if config.get(key) is not None}
    if isinstance(labels := config.get("id2label"), dict) and labels:
        values["num_labels"] = len(labels)
    expressible = {
        "architectures": values["architectures"] == [ARCHITECTURE],
        "hidden_act": values["hidden_act"] in tuple(ACTIVATIONS),
        "num_channels": values["num_channels"] == 3,
    }
    refuse(expressible, values, source, f"{ARCHITECTURE} with 3 channels and one of {', '.join(ACTIVATIONS)}")
    return VisionTransformer(
        img_size=to_2tuple(values["image_size"]),
        patch_size=to_2tuple(values["patch_size"]),
        num_classes=values["num_labels"],
        embed_dim=values["hidden_size"],
        depth=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        mlp_ratio=(values["intermediate_size"] + 0.5) / values["hidden_size"],  # timm rounds their product down
        qkv_bias=values["qkv_bias"],
        norm_layer=partial(LayerNorm, eps=float(values["layer_norm_eps"])),
        act_layer=ACTIVATIONS[values["hidden_act"]],
    )


def load_checkpoint(module: VisionTransformer, checkpoint: Checkpoint) -> VisionTransformer:
    """Copy Hugging Face's tensors into timm's module.

    Args:
        module: a module of the checkpoint's architecture.
        checkpoint: a checkpoint with either of Hugging Face's two sets of names.

    Raises:
        VitdemoError: for missing, extra and misshapen keys, with the file's own names.
    """
    state_dict, source = unwrapped(checkpoint, _targets(module, next(iter(BLOCKS))).keys()), checkpoint.path
    unused = [key for key in UNUSED if key in state_dict]
    if unused:
        print(f"{source}: {', '.join(unused)} not used, because the classifier does not need it", file=sys.stderr)
    prefix = next((prefix for prefix in BLOCKS if any(key.startswith(f"{prefix}.") for key in state_dict)), None)
    theirs = nn.Module()  # a module with Hugging Face's names over the memory of timm's tensors
    for key, part in _targets(module, prefix or next(iter(BLOCKS))).items():
        *path, name = key.split(".")
        place = theirs
        for step in path:
            place = place._modules.setdefault(step, nn.Module())
        place.register_buffer(name, part)
    loading.load_weights(theirs, {key: tensor for key, tensor in state_dict.items() if key not in unused}, source)
    return module


def _targets(module: VisionTransformer, prefix: str) -> dict[str, torch.Tensor]:
    """Map each of Hugging Face's keys to the part of timm's tensor that it fills."""
    layers = dict(EMBEDDINGS_AND_HEAD)
    for block in range(len(module.blocks)):
        for ours, theirs in (NORMS | BLOCKS[prefix]).items():
            layers[f"blocks.{block}.{ours}"] = tuple(f"{prefix}.{block}.{name}" for name in theirs)
    targets = {}
    for key, tensor in module.state_dict().items():
        layer, dot, kind = (key, "", "") if key in layers else key.rpartition(".")
        parts = tensor.chunk(len(layers[layer]))
        targets |= {f"{name}{dot}{kind}": part for name, part in zip(layers[layer], parts, strict=True)}
    return targets
