"""``verify``: compares an engine with the eager fp32 reference of its model, at the logits and layer by layer."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Subset
from tqdm.auto import tqdm

from vitdemo.dataset.batches import prefetched_batches
from vitdemo.dataset.dataset import Dataset, open_data
from vitdemo.engines.contract import Engine
from vitdemo.engines.eager import EagerEngine
from vitdemo.errors import EngineFailure, VitdemoError, at_least_1, reason_of
from vitdemo.models.classes import match_classes
from vitdemo.models.model import Model, ModelInfo
from vitdemo.paths import SHAPES20, data_root
from vitdemo.precisions import TORCH_TYPES
from vitdemo.stats import spread
from vitdemo.verification.comparison import LOGITS, Comparison, LayerErrors
from vitdemo.verification.tolerances import RANDOM, REAL, TOLERANCES, Report, make_report

RANDOM_IMAGES = 32
MOST_VALUES = 8 * 3 * 224**2  # in a batch, whose layers' outputs are all in memory, the reference's and the engine's
FLOOR_IMAGES = 16  # per kind of images; each other way to compute takes the reference's time once more
ITS_MODEL = "give the model it was made from"
CROP = ("input_size", "crop_pct", "crop_mode", "interpolation")

Layers = Callable[[torch.Tensor], dict[str, torch.Tensor]]  # the type of ``Engine.layers``


def verify(
    engine: Engine,
    model: Model,
    data: Dataset | Path | str | None = None,
    *,
    images: int = 256,
    progress: bool = True,
) -> Report:
    """Compare ``engine`` with ``model`` in torch eager fp32 on the CPU, on real images and on random ones.

    Up to 32 images of random pixels, always the same, are used in addition to the real images, or alone if there is no
    data. Both sides get the same pixels. Layers are compared on every image, in batches of 8 (fewer where images are
    larger than 224 px, down to 1), so that memory does not grow with the number of images.

    The noise floor is the difference that rounding alone produces: the error of other legitimate ways to compute the
    reference, on the first 16 images of each kind. For fp32 these ways are one thread, image by image, and attention
    as plain matrix products; for bf16, torch eager in bf16; for int8, the reference with only its weights rounded to 8
    bits. The tolerances are in ``tolerances.py``.

    Args:
        engine: the candidate.
        model: the reference, from which the engine was made.
        data: a data set or its path; images that cannot be read are left out. None takes the bundled shapes20 if the
            model has its classes.
        images: the number of images, evenly spread over the data set.
        progress: show a progress bar.

    Returns:
        The report.

    Raises:
        VitdemoError: for a model or data with other classes, images of another size or crop, images < 1, and a
            precision without tolerances or a noise floor.
        EngineFailure: when the engine breaks.
    """
    _check_input(engine, model, images)
    data = _data_for(model.info, data)
    reference = EagerEngine(model, "fp32", device="cpu", threads=engine.threads)
    ways = _other_ways(engine.precision, model, reference)
    sources, real, drawn = {}, 0, min(images, RANDOM_IMAGES)
    batch = min(max(MOST_VALUES // model.info.random_pixels().numel(), 1), 8)
    if data is not None:
        real = min(images, len(data))
        sources[REAL] = _real_batches(data, real, model.info, batch)
    sources[RANDOM] = ((pixels, []) for pixels in model.info.random_pixels(drawn).split(batch))
    with tqdm(total=real + drawn, unit="image", desc="verify", disable=not progress) as bar:
        comparisons = {kind: _compare(engine, reference, ways, source, bar) for kind, source in sources.items()}
    return make_report(engine, model.info, data, comparisons)


def _check_input(engine: Engine, model: Model, images: int) -> None:
    what = f"{engine.name} {engine.precision}"
    at_least_1(images=images)
    if engine.precision not in TOLERANCES:
        raise VitdemoError(f"{what}: there are tolerances for {', '.join(TOLERANCES)} only, so nothing to verify by")
    if engine.info.classes != model.info.classes:
        raise VitdemoError(f"{what} was made from a model of other classes than {model.info.tag}; {ITS_MODEL}")
    for name in CROP:
        theirs, ours = (getattr(info.preprocessing, name) for info in (engine.info, model.info))
        if theirs != ours:
            made_for = f"images with {name} {theirs}, {model.info.tag} is for {ours}"
            raise VitdemoError(f"{what} was made for {made_for}; {ITS_MODEL}")


def _data_for(info: ModelInfo, data: Dataset | Path | str | None) -> Dataset | None:
    if data is None:
        path = data_root() / SHAPES20
        if info.classes is None or not path.exists():
            return None
        data = open_data(path)
        return match_classes(info, data) if list(info.classes) == data.classes else None
    if isinstance(data, (str, Path)):
        data = open_data(data)
    return data if info.classes is None else match_classes(info, data)


def _real_batches(data: Dataset, images: int, info: ModelInfo, size: int) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Yield uint8[B, 3, H, W] and the indices in ``data``, without the images that cannot be read."""
    indices = spread(len(data), images)
    read = 0
    chosen = Subset(data, indices)
    for batch in prefetched_batches(chosen, range(images), info.preprocessing, size):
        readable = [k for k, error in enumerate(batch.errors) if not error]
        read += len(readable)
        if readable:
            yield batch.pixels[readable], [indices[batch.start + k] for k in readable]
    if not read:
        raise VitdemoError(f"{data.path}: none of {images} images can be read; give verify other data")


def _other_ways(precision: str, model: Model, reference: EagerEngine) -> dict[str, Layers]:
    """Other legitimate ways to compute the reference in this precision, by name."""

    def one_by_one(x: torch.Tensor) -> dict[str, torch.Tensor]:
        singles = [reference.layers(image) for image in x.split(1)]
        return {name: torch.cat([single[name] for single in singles]) for name in singles[0]}

    if precision == "fp32":
        one_thread = EagerEngine(model, "fp32", device="cpu", threads=1)
        plain_attention = sdpa_kernel(SDPBackend.MATH)(reference.layers)
        return {"one thread": one_thread.layers, "one by one": one_by_one, "plain attention": plain_attention}
    if precision == "int8":
        rounded = Model(_rounded(model.module), model.info)
        return {"weights in 8 bits": EagerEngine(rounded, "fp32", device="cpu", threads=reference.threads).layers}
    if precision in TORCH_TYPES:
        eager = EagerEngine(model, precision, device="cpu", threads=reference.threads)
        return {f"eager {precision}": eager.layers}
    raise VitdemoError(f"{precision}: no other way to compute in it is known, so no noise floor to verify by")


def _rounded(module: nn.Module) -> nn.Module:
    """A copy with the weights of convolutions and linear layers rounded to 255 levels per output channel, around 0."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            rows = part.weight.data.flatten(1)
            step = (rows.abs().amax(dim=1, keepdim=True) / 127).clamp(min=torch.finfo(rows.dtype).tiny)
            part.weight.data = ((rows / step).round() * step).view_as(part.weight)
    return module


def _compare(
    engine: Engine,
    reference: EagerEngine,
    ways: dict[str, Layers],
    batches: Iterator[tuple[torch.Tensor, list[int]]],
    bar: tqdm,
) -> Comparison:
    comparison = Comparison(floors={way: LayerErrors() for way in ways})
    for number, (pixels, indices) in enumerate(batches):
        expected = reference.layers(pixels)
        logits, layers = _run(engine, pixels)
        if logits.shape != expected[LOGITS].shape:
            shapes = f"logits {list(logits.shape)} where the model gives {list(expected[LOGITS].shape)}"
            raise VitdemoError(f"{engine.name} {engine.precision} gives {shapes}; {ITS_MODEL}")
        comparison.indices += indices
        comparison.reference.append(expected[LOGITS])
        comparison.candidate.append(logits)
        if layers:
            comparison.layers.add(expected, layers)
            comparison.twin.add({LOGITS: logits}, {LOGITS: layers[LOGITS]})
        if number * len(pixels) < FLOOR_IMAGES:
            for way, compute in ways.items():
                comparison.floors[way].add(expected, compute(pixels))
        bar.update(len(pixels))
    return comparison


def _run(engine: Engine, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    try:
        return engine(pixels), engine.layers(pixels)
    except VitdemoError:
        raise
    except Exception as error:  # each runtime raises its own types
        raise EngineFailure(f"the {engine.name} engine failed: {reason_of(error)}") from error
