"""The verb ``choose``: which of the measured engines to use, and that engine as a script that needs no vitdemo."""

import copy
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import jinja2
import pandas as pd
import torch

from vitdemo.benchmarking.pairs import EAGER, choose_pairs
from vitdemo.benchmarking.rows import OK
from vitdemo.benchmarking.sweeps import benchmark
from vitdemo.dataset.dataset import Dataset
from vitdemo.engines.artifacts import artifacts_root, convert
from vitdemo.engines.contract import CompiledEngine, Engine, find_engines
from vitdemo.engines.graph import export_graph
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.inference.answers import output_names
from vitdemo.models.classes import match_classes
from vitdemo.models.model import Model, load_model
from vitdemo.paths import PART, claim_folder, replacing
from vitdemo.precisions import TORCH_TYPES
from vitdemo.stats import spread
from vitdemo.verification.verification import Report, verify

SCRIPT, CLASSES, PROGRAM = "classify.py", "classes.txt", "model.pt2"
DEVICE_BATCH_SIZES, LARGEST_LOSS = (1, 2, 4, 8, 16, 32), 0.01
TEMPLATE = Path(__file__).with_name(f"{SCRIPT}.j2")


def choose_engine(rows: pd.DataFrame, latency_budget_ms: float, largest_accuracy_loss: float) -> pd.Series:
    """The row with the most images/s among those fast enough and right enough.

    Args:
        rows: of ``benchmark``, of one model on one machine, with the accuracies measured.
        latency_budget_ms: fast enough is where nine calls in ten (``p90_ms``) stay within it.
        largest_accuracy_loss: right enough is a top-1 at most this fraction below eager fp32's on the same images.

    Raises:
        VitdemoError: where there is none, saying what comes nearest, and for rows of several machines or models.
    """
    for name in ("machine", "model"):
        if rows[name].nunique() > 1:
            raise VitdemoError(f"which engine: these rows are of several {name}s; take those of one")
    found = rows[rows["status"] == OK]
    reference = found.loc[(found["engine"] == EAGER.engine) & (found["precision"] == EAGER.precision), "top1"].dropna()
    if reference.empty:
        raise VitdemoError("which engine: no accuracy was measured; measure a model with its weights on real images")
    right = found[reference.iloc[0] - found["top1"] <= largest_accuracy_loss + 1e-12]  # of counts, not of rounding
    fast = right[right["p90_ms"] <= latency_budget_ms]
    if fast.empty:
        least = right["p90_ms"].min()
        none = f"none is right enough in {latency_budget_ms} ms; the fastest takes {least:.1f} ms"
        raise VitdemoError(f"which engine: {none}; give more time, or take a larger loss")
    return fast.loc[fast["images_per_s"].idxmax()]


def choose(
    name: Path | str,
    data: Dataset,
    *,
    latency_ms: float = math.inf,
    largest_loss: float = LARGEST_LOSS,
    engines: Sequence[str] | str | None = None,
    weights: Path | str = "pretrained",
    class_map: Path | str | None = None,
    calibration: Path | str | None = None,
    images: int = 1000,
    device_batch_sizes: Sequence[int] = DEVICE_BATCH_SIZES,
    row_budget_s: float = 5.0,
    out: Path | str,
) -> tuple[pd.Series, Report, Path]:
    """From a model and images to the engine to use on this machine: measured, verified, exported with its script.

    Every engine and native precision that a script can be written for is measured by ``benchmark``, or those that
    ``engines`` names; of those fast and right enough the one with the most images/s that passes ``verify`` is taken.

    Args:
        name: of the model, as in ``load_model``.
        data: labelled images. Without ``calibration`` a quarter of them, at most 256, is for finding int8's ranges and
            is not scored.
        latency_ms: fast enough is where nine calls in ten stay within it.
        largest_loss: right enough is a top-1 at most this fraction below eager fp32's.
        engines, weights, class_map, calibration, images, device_batch_sizes, row_budget_s: as in ``benchmark``.
        out: a new folder: ``sweeps/`` with all rows, and ``choice/`` with the engine and ``classify.py``.

    Returns:
        The row of the engine, its report, and the path of the script.

    Raises:
        VitdemoError: for bad input, and where none is fast and right enough.
    """
    model = load_model(name, weights)
    data, out = match_classes(model.info, data, class_map), claim_folder(out)
    if calibration is None:
        ranges = set(spread(len(data), min(256, len(data) // 4)))
        calibration = data.take(sorted(ranges)) if ranges else None
        data = data.take([i for i in range(len(data)) if i not in ranges])
    engines = [str(pair) for pair in choose_pairs(engines, "cpu") if find_engines()[pair.engine].script]
    options = dict(device_batch_sizes=device_batch_sizes, row_budget_s=row_budget_s, images=images, device="cpu")
    options |= dict(engines=engines, weights=weights, calibration=calibration, out=out / "sweeps")
    rows = benchmark(name, data=data, **options)
    while True:
        chosen = choose_engine(rows, latency_ms, largest_loss)
        engine = convert(model, chosen["engine"], chosen["precision"], calibration=calibration, device="cpu")
        report = verify(engine, model, data)
        if report.ok:
            return chosen, report, write_script(engine, out / "choice", output_names(model.info))
        print(f"{report}\nnot taken: {engine.name} {engine.precision} fails verify", file=sys.stderr)
        rows = rows[(rows["engine"] != engine.name) | (rows["precision"] != engine.precision)]


def write_script(engine: Engine, out: Path | str, class_names: Sequence[str] | None = None) -> Path:
    """Write ``classify.py`` and what it needs into the new folder ``out``; the path of the script.

    It takes paths of images and prints the likeliest classes of each; it needs numpy, Pillow and the engine's runtime,
    and no vitdemo. The script is written last: a folder that has it is whole.

    Args:
        engine: made by ``convert`` for the CPU, of a square input.
        out: a folder that is empty or not there yet.
        class_names: by class index; by default the wnids.

    Raises:
        VitdemoError: for any other engine, one whose artifact is gone from the cache, or one that has no ``script``.
    """
    preprocessing, recipe = engine.info.preprocessing, engine.recipe
    _, height, width = preprocessing.input_size
    if recipe is None or engine.device != "cpu" or height != width:
        raise VitdemoError(f"{engine.info.tag}: a script is written of what convert made for the CPU, of square images")
    if not engine.script:
        known = ", ".join(name for name, cls in find_engines().items() if cls.script)
        raise VitdemoError(f"{engine.name}: no script is written for it; there are {known}")
    out = claim_folder(out)
    with named_errors(out), TemporaryDirectory(dir=out, prefix=".", suffix=PART) as part:
        for file in _model_files(engine, Path(part)):
            file.rename(out / file.name)
        (out / CLASSES).write_text("\n".join(class_names or engine.info.classes or ()), encoding="utf-8")
        template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True)
        with replacing(out / SCRIPT) as file:
            file.write(template.render(engine=engine, crop=preprocessing))
    return out / SCRIPT


def _model_files(engine: Engine, folder: Path) -> list[Path]:
    """What the runtime reads, put into ``folder``."""
    if isinstance(engine, CompiledEngine):
        artifact = artifacts_root() / engine.recipe.folder_name
        for file in artifact.glob("model.*"):  # and not what only verify reads
            shutil.copy2(file, folder)
        if not any(folder.iterdir()):
            raise VitdemoError(f"{artifact}: is gone from the cache; convert the model again")
    else:
        dtype = TORCH_TYPES[engine.precision]
        module = copy.deepcopy(engine.recipe.model.module).to(dtype)
        torch.export.save(export_graph(Model(module, engine.info), dtype=dtype), folder / PROGRAM)
    return sorted(folder.iterdir())
