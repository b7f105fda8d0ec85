"""A model with everything needed to use it correctly: Model, ModelInfo, load_model."""

import copy
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vitdemo.dataset.decoding import Preprocessing
from vitdemo.errors import VitdemoError, reason_of
from vitdemo.machine import free_memory_bytes, message_stream
from vitdemo.models.checkpoints import IMAGENET_LABELS, Labels, read_checkpoint
from vitdemo.models.loading import Plan, weights_sha256
from vitdemo.models.sources import architecture_of, is_file, planned
from vitdemo.paths import user_path

# torch's own formulas; before torch 2.15 they lack the attention operation of CPUs.
aten = torch.ops.aten
ATTENTION = flop_registry[aten._scaled_dot_product_flash_attention]
FLOP_FORMULAS = {aten._scaled_dot_product_flash_attention_for_cpu: ATTENTION, **flop_registry}


@dataclass(frozen=True)
class ModelInfo:
    """The description of a model, without its weights. It is part of every engine, card and result.

    tag: the full name, e.g. ``vit_base_patch16_224.augreg2_in21k_ft_in1k``. weights: "pretrained", "random"
    or the name of the weights file. classes: one id per output (a wnid or a word), or None where they are unknown.
    flops_per_image: 2 x the multiply-accumulates of convolutions and matrix products, including attention, at batch 1
    (counted by torch's own formulas, ``torch.utils.flop_counter``). class_names: a readable name per output, or None.
    outputs: the number of outputs.
    """

    tag: str
    weights: str
    weights_sha256: str
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    flops_per_image: int
    class_names: tuple[str, ...] | None = None
    outputs: int = 0

    def random_pixels(self, *counts: int, pinned: bool = False) -> torch.Tensor:
        """Random pixels, uint8[*counts, C, H, W], the same in every call.

        ``pinned`` is for an engine on a GPU, which copies pinned memory while it computes, as in ``evaluate``.
        """
        shape, generator = (*counts, *self.preprocessing.input_size), torch.Generator().manual_seed(0)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, pin_memory=pinned)


class Model:
    """A torch module from normalised float32[B, 3, H, W] to logits [B, C], and its ModelInfo.

    ``info.weights_sha256`` is computed from the module's present weights; the value in the given ``info`` is ignored.
    The weights are read once for it, and again by each ``convert``.
    """

    def __init__(self, module: nn.Module, info: ModelInfo):
        self.module = module.eval().requires_grad_(False)
        self.info = replace(info, weights_sha256=weights_sha256(module, anew=False))

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        preprocessing: Preprocessing,
        *,
        name: str,
        classes: tuple[str, ...] | None = None,
        class_names: tuple[str, ...] | None = None,
        weights: str = "as given",
    ) -> "Model":
        """A Model from any ``torch.nn.Module`` that classifies images.

        Args:
            module: the module. It is not copied: it is put into evaluation mode, and its parameters are frozen.
            preprocessing: the model's own preprocessing.
            name: the ``tag`` of its info.
            classes: the wnid of each output, or the id of the class in the data.
            class_names: a readable name of each output.
            weights: the origin of the weights.

        Raises:
            VitdemoError: when its parameters are not float32 on the CPU, when it does not run on float32[1, 3, H, W],
                or when ``classes`` or ``class_names`` does not have one entry per output.
        """
        _freeze(module, name)
        flops, outputs = _count(module, preprocessing.input_size)
        if outputs < 2:
            raise VitdemoError(f"{name}: has one output, and a softmax of one is always 1; give a model with more")
        given = [None if names is None else tuple(names) for names in (classes, class_names)]
        for names in given:
            if names is not None and len(names) != outputs:
                raise VitdemoError(f"{name}: the model has {outputs} outputs but {len(names)} classes were given")
        info = ModelInfo(name, weights, "", preprocessing, given[0], flops, given[1], outputs)  # Model adds the hash
        return cls(module, info)


class FlopsByPrecision(TorchDispatchMode):
    """While active, adds up the FLOPs that torch executes, by the dtype of the first operand.

    ``.flops``: a Counter of dtype name ("float32") -> FLOPs, 2 x multiply-accumulates.
    """

    def __init__(self):
        super().__init__()
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in FLOP_FORMULAS:
            tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.flops[dtype] += FLOP_FORMULAS[func._overloadpacket](*args, **kwargs, out_val=out)
        return out


def _freeze(module: nn.Module, name: str) -> None:
    """Put a module into evaluation mode without gradients. Raises VitdemoError unless it is float32 on the CPU."""
    if not isinstance(module, nn.Module):
        raise VitdemoError(f"{name}: {type(module).__name__} is not a torch.nn.Module")
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta or isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            raise VitdemoError(f"{name}: {key} has no values yet; load the module's weights first")
        if tensor.device.type != "cpu":
            raise VitdemoError(f"{name}: {key} is on {tensor.device}; give module.cpu(), convert moves what it makes")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise VitdemoError(f"{name}: {key} is {tensor.dtype}; give module.float(), convert sets the precision")
    try:
        module.eval().requires_grad_(False)
    except (NotImplementedError, RuntimeError) as error:  # raised by exported and scripted modules
        raise VitdemoError(f"{name}: {reason_of(error)}; give the module that it was made from") from None


def _count(module: nn.Module, input_size: tuple[int, int, int]) -> tuple[int, int]:
    """FLOPs per image and the number of outputs. Raises VitdemoError when the module does not run."""
    with suppress(Exception):  # the module may need values, or have tensors that are neither parameters nor buffers
        tensors = [*module.parameters(), *module.buffers()]
        # A copy on the device "meta" allocates and computes nothing, and keeps any cache of forward out of the module.
        twin = copy.deepcopy(module, {id(tensor): tensor.to("meta") for tensor in tensors})
        return _count_running(twin, torch.empty(1, *input_size, device="meta"))
    try:
        return _count_running(module, torch.zeros(1, *input_size))
    except Exception as error:  # the user's forward may raise anything
        wrong = f"does not give logits [B, C] for an input of {input_size} ({reason_of(error)})"
        raise VitdemoError(f"{type(module).__name__}: {wrong}") from None


def _count_running(module: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    with torch.no_grad(), FlopsByPrecision() as counter:
        _, outputs = module(x).shape
    return sum(counter.flops.values()), outputs


def load_model(name: Path | str, weights: Path | str = "pretrained", *, ema: bool = False) -> Model:
    """Load a model by name, in evaluation mode and float32.

    Args:
        name: "vit_shapes20" (bundled); a full timm tag such as "resnet18.tv_in1k"; "hf-hub:" or "hf:" and a repository
            of the Hugging Face hub such as "hf-hub:google/vit-base-patch16-224"; a folder with config.json and weights,
            in timm's hub layout or in Hugging Face's; or the checkpoint of timm's training script, a file.
        weights: "pretrained", "random" (seed 0, for measuring speed only), or a weights file for that architecture; the
            model then has as many outputs as the file.
        ema: take the moving average of the weights, where a file holds both.

    Raises:
        VitdemoError: for anything that cannot be found or does not fit, and for a model that is larger than the free
            memory.
    """
    name, pretrained, checkpoint = os.path.expanduser(str(name)), weights == "pretrained", None
    if is_file(name):
        if not pretrained:
            cure = "leave --weights out, or give an architecture as the model"
            raise VitdemoError(f"{name}: is a file of weights; {cure}")
        name, weights, pretrained = None, name, False
    if ema and weights == "random":
        raise VitdemoError("ema: random weights have no moving average; give weights, or leave it out")
    if not pretrained and weights != "random":
        checkpoint = read_checkpoint(user_path(weights), ema=ema)
        name = name or architecture_of(checkpoint)
    plan, free = shapes_of(name, pretrained=pretrained), free_memory_bytes()
    needed = sum(tensor.nbytes for tensor in plan.module.parameters()) if plan else 0
    if needed > free:  # the system kills a process that takes too much memory, and its notebook with it
        sizes = f"its weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
        raise VitdemoError(f"{name}: {sizes}; take a smaller model, or close other programs")
    try:
        with torch.random.fork_rng(devices=[]):  # random weights do not change the caller's random state
            torch.manual_seed(0)
            tag, plan = planned(name, pretrained=pretrained, said=checkpoint.said if checkpoint else {})
    except VitdemoError:
        raise
    except Exception as error:  # the models of timm and transformers raise many types
        raise VitdemoError(f"{name}: cannot be built ({reason_of(error)}); check its config.json") from None
    module, labels = plan.module, plan.labels
    if weights != "random":
        module = plan.load(module, checkpoint or read_checkpoint(plan.file(), ema=ema))
    if module is not plan.module:  # it has another number of outputs, and a weights file does not name them
        labels = Labels()
    source = weights if weights in ("pretrained", "random") else Path(weights).name
    if checkpoint:
        crop, known = plan.preprocessing, "; its outputs are taken to be ImageNet's" * (labels == IMAGENET_LABELS)
        prepared = f"{crop.input_size[1]} px, crop {crop.crop_pct:.3g}, {crop.interpolation}, mean {crop.mean}"
        print(f"{source}: images are prepared as for {tag}: {prepared}{known}", file=message_stream())
    options = dict(name=tag, classes=labels.classes, class_names=labels.names, weights=source)
    return Model.from_module(module, plan.preprocessing, **options)


def shapes_of(name: str, *, pretrained: bool = True) -> Plan | None:
    """The plan of a model whose tensors have shapes but no values, so that it takes no memory.

    Args:
        name: as in ``load_model``.
        pretrained: whether the weights that belong to the name will be loaded.

    Returns:
        The plan; None for a model that needs values to be built, and for a file, which must be read first.

    Raises:
        VitdemoError: where there is no model with this name.
    """
    try:
        with torch.device("meta"):
            return None if is_file(name) else planned(name, pretrained=pretrained, said={})[1]
    except VitdemoError:
        raise
    except Exception:  # timm's models may raise anything
        return None
