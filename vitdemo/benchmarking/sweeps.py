"""benchmark: models x engines x precisions x batch sizes on random pixels, by turns, a row each."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from vitdemo.benchmarking.arms import SHAPES20, Run
from vitdemo.benchmarking.files import check_resumable, open_sweep
from vitdemo.benchmarking.pairs import choose_pairs
from vitdemo.conversion.models import Model, load_model
from vitdemo.dataset.imagenet import ImageNetVal
from vitdemo.errors import VitdemoError
from vitdemo.inference.cluster import check_ray
from vitdemo.measure.clock import describe_machine, machine_record, source_commit
from vitdemo.paths import data_path, user_path

DEVICE_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def benchmark(
    models: Sequence[str] | str,
    *,
    engines: Sequence[str] | str | None = None,
    device_batch_sizes: Sequence[int] = DEVICE_BATCH_SIZES,
    weights: Path | str = "pretrained",
    replicas: int | None = None,
    row_budget_s: float = 20.0,
    data: Path | str | None = None,
    images: int = 1000,
    calibration: Path | str | None = None,
    out: Path | str,
    resume: bool = False,
) -> pd.DataFrame:
    """Measure every model in every engine and batch size; the rows, which are also in ``out``, a file a model.

    models, weights: as in ``load_model``. engines: such as "openvino:int8" or "openvino" (all its precisions), or a
    list of these with commas; None is all there are. Eager fp32, and eager in each precision that it has, is always
    measured beside them. replicas: how many share each batch (``device_batch_size`` each), by Ray, in the synchronous
    split. data: images for the accuracy, the bundled ones for vit_shapes20; the first ``images`` of them.

    Each pair of engine and precision lives in a process of its own. All take turns, in ROUNDS rounds: a turn is TURN_S
    seconds of calls, less for a small budget, one call at least; before them up to WARM_UP as much until the calls are
    equally long. A pair whose calls have taken ``row_budget_s`` sits out the rest of the rounds; where one call takes
    longer, the row and those of larger batches are skipped, and say so. A pair that does not fit into memory beside the
    others runs alone, marked so. What fails is a row that says why. A row's columns are in ``rows.COLUMNS``.

    resume: go on with what was stopped in ``out``, of the same settings, machine and source. Raises VitdemoError for
    bad input.
    """
    names = [models] if isinstance(models, str) else list(models)
    pairs, sizes = choose_pairs(engines), check_sizes(device_batch_sizes)
    for name, value in (("replicas", replicas), ("images", images)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise VitdemoError(f"{name} {value!r}: must be a whole number of at least 1")
    if not row_budget_s > 0:
        raise VitdemoError(f"row_budget_s {row_budget_s!r}: must be more than 0 seconds")
    if replicas:
        check_ray(None)
    loaded = [load_model(name, weights) for name in names]  # before anything is measured: a mistyped name says so now
    scored = [scored_data(model, data) for model in loaded]
    tables, wanted, out = [], [], user_path(out)
    for name, model, own in zip(names, loaded, scored, strict=True):
        settings = dict(model=name, tag=model.info.tag, weights=str(weights), pairs=list(map(str, pairs)))
        settings |= dict(device_batch_sizes=sizes, replicas=replicas, row_budget_s=row_budget_s)
        settings |= dict(data=own and str(own.path), images=images, weights_sha256=model.info.weights_sha256)
        settings |= dict(calibration=calibration and str(calibration), commit=source_commit())
        wanted.append(settings | dict(machine=describe_machine(machine_record())))
    if resume:
        check_resumable(out, wanted)
    for model, own, settings in zip(loaded, scored, wanted, strict=True):
        with open_sweep(out, settings, resume) as sweep:
            Run(model, sweep, own, calibration, replicas).do(pairs)
        tables.append(sweep.rows)
    return pd.concat(tables, ignore_index=True)


def check_sizes(sizes: Sequence[int]) -> list[int]:
    """In ascending order, each once. Raises VitdemoError for what is no batch size."""
    sizes = list(sizes)
    for size in sizes:
        if not isinstance(size, int) or size < 1:
            raise VitdemoError(f"device_batch_sizes {size!r}: must be a whole number of at least 1")
    if not sizes:
        raise VitdemoError("device_batch_sizes: there are none; give some, such as 1,8")
    return sorted(set(sizes))


def scored_data(model: Model, data: Path | str | None) -> ImageNetVal | None:
    """The images that ``model`` is scored on; None where nothing could be said with them."""
    if model.info.weights == "random":
        if data:
            raise VitdemoError(f"data {data}: random weights are right by chance alone; leave it out, or give weights")
        return None
    bundled = data_path(SHAPES20) if model.info.tag == "vit_shapes20" else None
    found = data or bundled
    found = ImageNetVal(found) if found else None
    if found and model.info.classes is not None and list(found.classes) != list(model.info.classes):
        raise VitdemoError(f"{found.path}: its classes are not those of {model.info.tag}; give the data set it is for")
    return found
