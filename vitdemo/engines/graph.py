"""The graph that every engine runs (uint8 pixels -> normalised floats -> model -> logits), and its layers' outputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from timm.models import VisionTransformer
from torch import nn
from torch.export import Dim, ExportedProgram

from vitdemo.dataset.decoding import Preprocessing
from vitdemo.models.model import Model


class Normalised(nn.Module):
    """uint8[B, 3, H, W] -> float32 logits [B, C]: ``(x / 255 - mean) / std`` in float32, a cast, then the model.

    The normalisation is not folded into the patch embedding's weights. A convolution that pads with zeros pads the
    normalised values; after folding it would pad the pixels, where zero has another meaning.

    With ``taps``, the names of submodules, the result is a tuple of the logits and then the output of each submodule,
    in float32. An empty ``taps`` gives a tuple too.
    """

    def __init__(
        self,
        module: nn.Module,
        preprocessing: Preprocessing,
        dtype: torch.dtype = torch.float32,
        taps: tuple[str, ...] | None = None,
    ):
        super().__init__()
        self.module = module
        self.dtype = dtype
        self.taps = taps
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1))

    def forward(self, x: torch.Tensor):
        x = ((x.float() / 255 - self.mean) / self.std).to(self.dtype)
        if self.taps is None:
            return self.module(x).float()
        taken: dict[str, torch.Tensor] = {}

        def take(name: str, _, output: torch.Tensor | tuple) -> None:
            taken[name] = _first(output).clone()  # because an in-place ReLU would change the output afterwards

        with watched(self.module, self.taps, take):
            logits = self.module(x)
        return logits.float(), *(taken[name].float() for name in self.taps)


@contextmanager
def watched(module: nn.Module, names: Iterable[str], note: Callable[[str, tuple, object], None]) -> Iterator[None]:
    """Within the block, call ``note(name, inputs, output)`` whenever one of the submodules ``names`` has run."""
    with ExitStack() as hooks:
        for name in names:
            part = module.get_submodule(name)
            hooks.enter_context(part.register_forward_hook(lambda _, *seen, name=name: note(name, *seen)))
        yield


def tap_points(module: nn.Module, input_size: tuple[int, int, int]) -> tuple[str, ...]:
    """The submodules whose outputs are compared, from input to output; the logits follow as the last point.

    For timm's VisionTransformer these are the patch embedding, each block's attention and MLP before they are added to
    the residual stream, each block, and the last norm. For any other module they are its children with parameters
    (each member of a list or dict of modules counts as a child), except the last one, which gives the logits. A
    submodule counts only if it outputs a new tensor for a black image: some parts of a model are only used in training,
    and some return their input.

    Args:
        module: the module, which is run once.
        input_size: (3, H, W) of the black image.
    """
    if isinstance(module, VisionTransformer):
        blocks = [f"blocks.{k}{part}" for k in range(len(module.blocks)) for part in (".attn", ".mlp", "")]
        return _that_run(module, ["patch_embed", *blocks, "norm"], input_size)
    return _that_run(module, _children(module)[:-1], input_size)


def _children(module: nn.Module) -> list[str]:
    """The children of a module that have parameters; for a wrapper around one module, the children of that module."""
    children = [(name, child) for name, child in _parts(module) if next(child.parameters(), None) is not None]
    if len(children) == 1:
        ((name, child),) = children
        return [f"{name}.{inner}" for inner in _children(child)] or [name]
    return [name for name, _ in children]


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # these are never called themselves
            yield from ((f"{name}.{key}", part) for key, part in child.named_children())
        else:
            yield name, child


def _that_run(module: nn.Module, names: list[str], input_size: tuple[int, int, int]) -> tuple[str, ...]:
    ran: set[str] = set()

    def note(name: str, inputs: tuple, output: object) -> None:
        given = _first(output)
        if isinstance(given, torch.Tensor) and not any(given is each for each in inputs):
            ran.add(name)

    like = next(module.parameters(), torch.empty(0))
    known = {name for name, _ in module.named_modules()}
    with torch.no_grad(), watched(module, known.intersection(names), note):
        module(torch.zeros(1, *input_size, dtype=like.dtype, device=like.device))
    return tuple(name for name in names if name in ran)


def _first(output: object) -> object:
    if isinstance(output, Mapping) and output:  # the output classes of transformers
        return next(iter(output.values()))
    return output[0] if isinstance(output, tuple) and output else output


def export_graph(
    model: Model, *, dtype: torch.dtype = torch.float32, taps: tuple[str, ...] | None = None
) -> ExportedProgram:
    """Export ``model`` with its normalisation by ``torch.export``: uint8[B, 3, H, W], any B >= 1, -> logits.

    Args:
        model: the model, which is not changed.
        dtype: the dtype in which the model computes; its parameters must have it.
        taps: as in ``Normalised``.
    """
    graph = Normalised(model.module, model.info.preprocessing, dtype, taps).eval()
    # torch.export would take a batch size of 1 for a constant.
    example = torch.zeros(2, *model.info.preprocessing.input_size, dtype=torch.uint8)
    with torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes=({0: Dim("batch", min=1)},))
