"""An engine's answer to one picture, how it changes with the input, and where two engines differ most."""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import pandas as pd
import torch
from tqdm.auto import tqdm

from vitdemo.course.attention import attention_maps, has_attention, mask_patches, rollout
from vitdemo.dataset.batches import Batch, prefetched_batches
from vitdemo.dataset.dataset import Dataset
from vitdemo.dataset.decoding import Preprocessing, crop_picture
from vitdemo.engines.contract import Engine
from vitdemo.engines.eager import EagerEngine
from vitdemo.errors import EngineFailure, VitdemoError
from vitdemo.machine import cores
from vitdemo.models.checkpoints import IMAGENET_LABELS
from vitdemo.models.classes import short_names
from vitdemo.models.model import Model, ModelInfo
from vitdemo.verification.comparison import ranking

TOP = 5


class PictureResult(NamedTuple):
    """One picture through one engine.

    pixels: uint8[3, H, W], as the engine was given them. top5: as ``top5`` gives it. maps: float32[blocks, heads, T, T]
    and rollout: float32[rows, columns], of the model in eager fp32; None for a model without such attention.
    """

    pixels: torch.Tensor
    top5: pd.DataFrame
    maps: torch.Tensor | None
    rollout: torch.Tensor | None


def look_at(engine: Engine, model: Model, pixels: torch.Tensor, names: Sequence[str] | None = None) -> PictureResult:
    """An engine's answer to one picture, and where its model looks.

    Args:
        engine: gives the answer.
        model: from which it was made.
        pixels: uint8[3, H, W].
        names: the classes' names by index, as ``names_of`` gives them.
    """
    answers = top5(engine, pixels, names)
    if not has_attention(model):
        return PictureResult(pixels, answers, None, None)
    maps = attention_maps(model, pixels[None])
    return PictureResult(pixels, answers, maps[0], rollout(model, maps)[0])


def top5(engine: Engine, pixels: torch.Tensor, names: Sequence[str] | None = None) -> pd.DataFrame:
    """The five likeliest classes, or all where there are fewer: class (its index), answer, logit, probability.

    Args:
        engine: gives the answer.
        pixels: uint8[3, H, W].
        names: the classes' names by index, as ``names_of`` gives them.
    """
    logits = _logits(engine, pixels[None])
    probabilities = logits.double().softmax(dim=1)[0]
    best = ranking(logits)[0, :TOP].tolist()
    columns = {
        "class": best,
        "answer": [name_in(names, k) for k in best],
        "logit": logits[0, best].tolist(),
        "probability": probabilities[best].tolist(),
    }
    return pd.DataFrame(columns)


def names_of(info: ModelInfo, data: Dataset | None = None) -> list[str] | None:
    """A short name for each output, or None where nobody knows what the outputs mean.

    Args:
        info: a model's.
        data: names the outputs that it was matched with, or its own wnids; others are ImageNet's, or stay wnids.
    """
    if data is not None and data.matched_with == info.weights_sha256:  # by a class map, perhaps
        return short_names(data.class_names)
    if info.classes is None:
        return None
    own = () if data is None else zip(data.classes, data.class_names, strict=True)
    known = dict(zip(*IMAGENET_LABELS, strict=True)) | dict(own)
    return short_names(known.get(wnid, wnid) for wnid in info.classes)


def name_in(names: Sequence[str] | None, k: int) -> str:
    """The name of class ``k``, or its number where there are no names."""
    return names[k] if names else f"class {k}"


def with_preprocessing(model: Model, preprocessing: Preprocessing) -> Model:
    """The same module with another mean and std before it, and another crop, right for its weights or not."""
    return Model(model.module, replace(model.info, preprocessing=preprocessing))


def reference_of(model: Model) -> Engine:
    """``model`` in eager fp32, without the record that ``convert`` makes of it, which takes longer than an answer."""
    return EagerEngine(model, "fp32", device="cpu", threads=cores())


def answers_under(
    model: Model,
    jpeg: bytes,
    preprocessings: dict[str, Preprocessing],
    names: Sequence[str] | None = None,
    file: str = "the picture",
) -> pd.DataFrame:
    """The answers of ``model`` in eager fp32 to one picture under each preprocessing.

    Args:
        model: any.
        jpeg: the picture's bytes.
        preprocessings: by a name for each.
        names: the classes' names by index, as ``names_of`` gives them.
        file: the picture's name, for errors.

    Returns:
        One row per preprocessing, by its name. answer, probability: the likeliest class. first: the probability of the
        class that the first row answers.

    Raises:
        VitdemoError: as ``crop_picture`` does.
    """
    rows, first = {}, None
    for name, preprocessing in preprocessings.items():
        logits = reference_of(with_preprocessing(model, preprocessing))(crop_picture(file, jpeg, preprocessing)[None])
        p = logits.double().softmax(dim=1)[0]
        best = int(p.argmax())
        first = best if first is None else first
        rows[name] = {"answer": name_in(names, best), "probability": p[best].item(), "first": p[first].item()}
    return pd.DataFrame.from_dict(rows, orient="index")


def answers_masked(
    engine: Engine, model: Model, pixels: torch.Tensor, order: Sequence[tuple[int, int]], counts: Iterable[int]
) -> pd.DataFrame:
    """The answers of an engine to one picture while more and more of its patches are grey.

    Args:
        engine: gives the answers.
        model: from which it was made.
        pixels: uint8[3, H, W].
        order: (row, column) of the patches, those first that are hidden first.
        counts: how many of them are hidden.

    Returns:
        One row per count: hidden, class (the answer), first (the probability of the class that is answered with none
        hidden).
    """
    counts = list(counts)
    batch = torch.stack([pixels, *(mask_patches(model, pixels, order[:count]) for count in counts)])
    probabilities = engine(batch).double().softmax(dim=1)
    answers = probabilities.argmax(dim=1)
    columns = {"hidden": counts, "class": answers[1:].tolist(), "first": probabilities[1:, answers[0]].tolist()}
    return pd.DataFrame(columns)


def disagreements(
    candidate: Engine,
    reference: Engine,
    data: Dataset,
    *,
    limit: int | None = None,
    device_batch_size: int = 8,
    progress: bool = True,
) -> pd.DataFrame:
    """Images in the order of how differently two engines see them, the most different first.

    Args:
        candidate: an engine.
        reference: another one of the same model.
        data: the images.
        limit: only the first so many of them.
        device_batch_size: images at once.
        progress: show a bar.

    Returns:
        One row per image that can be read: index, file, label; candidate, reference: their answers, class indices;
        candidate_probability, reference_probability: of those. distance: half the sum of the differences of their
        probabilities (the total variation distance), 0 for the same to 1. logits_apart: the largest difference of two
        logits.

    Raises:
        VitdemoError: for engines of different outputs or preprocessing.
    """
    preprocessing = reference.info.preprocessing
    if candidate.info.preprocessing != preprocessing or candidate.info.classes != reference.info.classes:
        raise VitdemoError("disagreements: the engines have other classes or preprocessing; give two of one model")
    indices, tables = range(min(len(data), len(data) if limit is None else limit)), []
    batches = prefetched_batches(data, indices, preprocessing, device_batch_size, input_path="fast")
    with closing(batches), tqdm(total=len(indices), unit="image", disable=not progress) as bar:
        for batch in batches:
            table = _compared(batch, *(_logits(engine, batch.pixels) for engine in (candidate, reference)))
            tables.append(table[[not error for error in batch.errors]])
            bar.update(len(batch.files))
            batch.recycle()
    table = pd.concat(tables) if tables else pd.DataFrame()
    if table.empty:
        raise VitdemoError("disagreements: not one image could be read; see `vitdemo extract --check-images`")
    return table.sort_values("distance", ascending=False, kind="stable", ignore_index=True)


def _logits(engine: Engine, pixels: torch.Tensor) -> torch.Tensor:
    logits = engine(pixels)
    if not torch.isfinite(logits).all():  # such an image would rank as the one that is least apart
        cure = "compare it with `vitdemo verify`"
        raise EngineFailure(f"the {engine.name} engine gave logits that are not finite; {cure}")
    return logits


def _compared(batch: Batch, candidate: torch.Tensor, reference: torch.Tensor) -> pd.DataFrame:
    p, q = candidate.double().softmax(dim=1), reference.double().softmax(dim=1)
    columns = {
        "index": range(batch.start, batch.start + len(batch.files)),
        "file": batch.files,
        "label": batch.labels,
        "candidate": ranking(candidate)[:, 0],
        "reference": ranking(reference)[:, 0],
        "candidate_probability": p.max(dim=1).values,
        "reference_probability": q.max(dim=1).values,
        "distance": 0.5 * (p - q).abs().sum(dim=1),
        "logits_apart": (candidate.double() - reference.double()).abs().max(dim=1).values,
    }
    return pd.DataFrame(columns)
