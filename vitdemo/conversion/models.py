"""A model with everything needed to use it right: Model, ModelInfo, load_model."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path

import timm
import torch
from timm.data import ImageNetInfo, resolve_data_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vitdemo.conversion.weights import WEIGHTS_FILE, load_weights, pretrained_file, read_state_dict, weights_sha256
from vitdemo.dataset.images import Preprocessing
from vitdemo.errors import VitdemoError
from vitdemo.paths import data_root

# torch's own formulas; before 2.15 they leave out the attention that CPUs run.
aten = torch.ops.aten
ATTENTION = flop_registry[aten._scaled_dot_product_flash_attention]
FLOP_FORMULAS = {aten._scaled_dot_product_flash_attention_for_cpu: ATTENTION, **flop_registry}

BUNDLED = {"vit_shapes20": "shapes20/vit_shapes20"}  # model name -> folder below the data root


@dataclass(frozen=True)
class ModelInfo:
    """What a model is, without its weights; goes onto every engine, card and result.

    tag: the full name, e.g. ``vit_base_patch16_224.augreg2_in21k_ft_in1k``. weights: "pretrained", "random"
    or the file they came from. classes: the wnid of each output, or None where nobody knows them.
    flops_per_image: 2 x the multiply-accumulates of convolutions and matrix products, attention's
    included, at batch 1 (counted by torch's own formulas, ``torch.utils.flop_counter``).
    """

    tag: str
    weights: str
    weights_sha256: str
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    flops_per_image: int

    def to_dict(self) -> dict:
        """A dict that JSON can hold."""
        return asdict(self)


class Model:
    """A torch module that takes normalised float32[B, 3, H, W] and gives logits [B, C], and its ModelInfo."""

    def __init__(self, module: nn.Module, info: ModelInfo):
        self.module = module.eval().requires_grad_(False)
        self.info = info

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        preprocessing: Preprocessing,
        *,
        name: str,
        classes: tuple[str, ...] | None = None,
        weights: str = "as given",
    ) -> "Model":
        """Any ``torch.nn.Module`` that classifies images.

        Raises VitdemoError when it does not run on float32[1, 3, H, W] or ``classes`` is not as long as its output.
        """
        module = module.eval().requires_grad_(False)
        flops, outputs = _count_on_meta(module, preprocessing.input_size)
        if classes is not None and len(classes) != outputs:
            raise VitdemoError(f"{name}: the model has {outputs} outputs but {len(classes)} classes were given")
        info = ModelInfo(
            tag=name,
            weights=weights,
            weights_sha256=weights_sha256(module),
            preprocessing=preprocessing,
            classes=None if classes is None else tuple(classes),
            flops_per_image=flops,
        )
        return cls(module, info)


class FlopsByPrecision(TorchDispatchMode):
    """While active, adds up the FLOPs that torch executes by the dtype of their first operand.

    ``.flops``: Counter of dtype name ("float32") -> FLOPs, 2 x multiply-accumulates.
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


def _count_on_meta(module: nn.Module, input_size: tuple[int, int, int]) -> tuple[int, int]:
    """FLOPs an image and the number of outputs, from shapes alone (the meta device computes nothing)."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    on_meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    try:
        with torch.no_grad(), FlopsByPrecision() as counter:
            logits = torch.func.functional_call(module, on_meta, (torch.empty(1, *input_size, device="meta"),))
        _, outputs = logits.shape
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise VitdemoError(
            f"{type(module).__name__}: does not give logits [B, C] for an input of {input_size} ({reason})"
        ) from None
    return sum(counter.flops.values()), outputs


def load_model(name: str, weights: str = "pretrained") -> Model:
    """A model by name, in evaluation mode and float32.

    name: "vit_shapes20" (bundled), a full timm tag such as "resnet18.tv_in1k", or a folder in timm's hub
    layout (config.json and model.safetensors). weights: "pretrained", "random" (seed 0, for speed alone),
    or a file for that architecture. Raises VitdemoError for anything that cannot be found or does not fit.
    """
    folder = _model_folder(name)
    module, config = _from_folder(folder) if folder else _from_timm(name, weights)
    if weights == "pretrained":
        file = folder / WEIGHTS_FILE if folder else pretrained_file(_hub_id(name))
        load_weights(module, read_state_dict(file), str(file))
    elif weights != "random":
        load_weights(module, read_state_dict(weights), weights)
    source = weights if weights in ("pretrained", "random") else Path(weights).name
    preprocessing = Preprocessing(**resolve_data_config(pretrained_cfg=config))
    tag = folder.name if folder else name
    return Model.from_module(module, preprocessing, name=tag, classes=_class_list(config), weights=source)


def _model_folder(name: str) -> Path | None:
    """The folder that ``name`` means; None for timm's names, which a folder of the same name does not hide."""
    if name in BUNDLED:
        return data_root() / BUNDLED[name]
    is_folder = name and Path(name).is_dir() and not timm.is_model(name.partition(".")[0])
    return Path(name).resolve() if is_folder else None


def _from_folder(folder: Path) -> tuple[nn.Module, dict]:
    """The architecture and pretrained_cfg that a folder's config.json (timm's hub layout) describes."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        architecture, pretrained_cfg = config["architecture"], dict(config["pretrained_cfg"])
    except FileNotFoundError:
        raise VitdemoError(
            f"{path}: not there; a model folder holds config.json and {WEIGHTS_FILE} in timm's layout"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise VitdemoError(f'{path}: is not JSON with "architecture" and "pretrained_cfg"; save it with timm') from None
    # As timm does: what the top level says of the outputs holds for the weights in this folder.
    pretrained_cfg |= {key: config[key] for key in ("num_classes", "label_names") if config.get(key)}
    if not timm.is_model(architecture):
        raise VitdemoError(f"{path}: architecture {architecture!r} is not known to timm {timm.__version__}")
    arguments = {"num_classes": pretrained_cfg.get("num_classes", 1000), **(config.get("model_args") or {})}
    try:
        return _created(architecture, **arguments), pretrained_cfg
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise VitdemoError(f"{path}: timm cannot build this model ({reason}); check model_args") from None


def _from_timm(name: str, weights: str) -> tuple[nn.Module, dict]:
    """The architecture and pretrained_cfg of a timm name; with pretrained weights the name must be a full tag."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, [*BUNDLED, *timm.list_models()], n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists those there are"
        raise VitdemoError(f"{name}: no such model; {hint}")
    tags = timm.list_pretrained(f"{architecture}.*")
    if (tag and name not in tags) or (not tag and weights == "pretrained"):
        problem = "has no such weights tag" if tag else "is an architecture; its weights need a full tag"
        raise VitdemoError(f"{name}: {problem}: {', '.join(tags) or 'timm has none for it'}")
    return _created(name), timm.get_pretrained_cfg(name).to_dict()


def _created(name: str, **arguments) -> nn.Module:
    """timm's module with random weights, the same ones every time, leaving torch's global seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name, pretrained=False, **arguments)


def _hub_id(name: str) -> str:
    hub_id = timm.get_pretrained_cfg(name).hf_hub_id or "timm/"
    return hub_id + name if hub_id.endswith("/") else hub_id


def _class_list(config: dict) -> tuple[str, ...] | None:
    """The wnids a timm config names; ImageNet-1k's own list for 1,000 unnamed outputs."""
    if config.get("label_names"):
        return tuple(config["label_names"])
    return tuple(ImageNetInfo("imagenet-1k").label_names()) if config.get("num_classes") == 1000 else None
