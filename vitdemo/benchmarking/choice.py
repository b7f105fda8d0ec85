"""The verb ``choose``: selects the best of the measured engines, and exports it with a script that needs no vitdemo."""

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
from vitdemo.models.classes import match_classes, short_names
from vitdemo.models.model import Model, load_model
from vitdemo.paths import PART, claim_folder, replacing
from vitdemo.precisions import TORCH_TYPES
from vitdemo.stats import spread
from vitdemo.verification.verification import Report, verify

SCRIPT, CLASSES, PROGRAM = "classify.py", "classes.txt", "model.pt2"
DEVICE_BATCH_SIZES, LARGEST_LOSS = (1, 2, 4, 8, 16, 32), 0.01
TEMPLATE = Path(__file__).with_name(f"{SCRIPT}.j2")


def choose_engine(rows: pd.DataFrame, latency_budget_ms: float, largest_accuracy_loss: float) -> pd.Series:
    """The row with the most images/s among those that are fast enough and accurate enough.

    Args:
        rows: rows of ``benchmark`` for one model on one machine, with measured accuracies.
        latency_budget_ms: a row is fast enough if nine of ten calls (``p90_ms``) stay within it.
        largest_accuracy_loss: a row is accurate enough if its top-1 is at most this fraction below eager fp32's on the
            same images.

    Raises:
        VitdemoError: where there is no such row, with the nearest one, and for rows of several machines or models.
    """
    for name in ("machine", "model"):
        if rows[name].nunique() > 1:
            raise VitdemoError(f"which engine: these rows are of several {name}s; take those of one")
    found = rows[rows["status"] == OK]
    of_eager = rows[(rows["engine"] == EAGER.engine) & (rows["precision"] == EAGER.precision)]
    reference = of_eager.loc[of_eager["status"] == OK, "top1"].dropna()
    if (of_eager["status"] != OK).all() and len(of_eager):
        why = f"eager fp32, the reference, is {of_eager['status'].iloc[0]}"
        raise VitdemoError(f"which engine: {why}; give smaller batches, or more time (row_budget_s)")
    if reference.empty:
        raise VitdemoError("which engine: no accuracy was measured; measure a model with its weights on real images")
    right = found[reference.iloc[0] - found["top1"] <= largest_accuracy_loss + 1e-12]  # allows rounding errors
    fast = right[right["p90_ms"] <= latency_budget_ms]
    if fast.empty:
        least = right["p90_ms"].min()
        none = f"no engine is accurate enough within {latency_budget_ms} ms; the fastest takes {least:.1f} ms"
        raise VitdemoError(f"which engine: {none}; allow more time, or a larger loss")
    return fast.loc[fast["images_per_s"].idxmax()]


def choose(
    name: Path | str,
    data: Dataset,
    *,
    latency_ms: float = math.inf,
    largest_loss: float = LARGEST_LOSS,
    engines: Sequence[str] | str | None = None,
    weights: Path | str = "pretrained",
    ema: bool = False,
    class_map: Path | str | None = None,
    calibration: Path | str | None = None,
    images: int = 1000,
    device_batch_sizes: Sequence[int] = DEVICE_BATCH_SIZES,
    row_budget_s: float = 5.0,
    out: Path | str,
) -> tuple[pd.Series, Report, Path]:
    """Measure, choose, verify and export the engine for a model on this machine.

    ``benchmark`` measures every engine and native precision for which a script can be written, or those in ``engines``.
    Among those that are fast and accurate enough, the one with the most images/s that passes ``verify`` is chosen.

    Args:
        name: the model, as in ``load_model``.
        data: labelled images. Without ``calibration``, a quarter of them, at most 256, is used to find the ranges of
            int8 and is not scored.
        latency_ms: an engine is fast enough if nine of ten calls stay within it.
        largest_loss: an engine is accurate enough if its top-1 is at most this fraction below eager fp32's.
        engines, weights, ema, class_map, calibration, images, device_batch_sizes, row_budget_s: as in ``benchmark``.
        out: a new folder for ``sweeps/`` with all rows, and ``choice/`` with the engine and ``classify.py``.

    Returns:
        The row of the engine, its report from ``verify``, and the path of the script.

    Raises:
        VitdemoError: for bad input, and where no engine is fast and accurate enough.
    """
    model = load_model(name, weights, ema=ema)
    if len(set(model.info.preprocessing.input_size[1:])) > 1:
        raise VitdemoError(f"{model.info.tag}: a script needs square input; vitdemo benchmark measures this model")
    data, out = match_classes(model.info, data, class_map), claim_folder(out)
    if calibration is None:
        ranges = set(spread(len(data), min(256, len(data) // 4)))
        calibration = data.take(sorted(ranges)) if ranges else None
        data = data.take([i for i in range(len(data)) if i not in ranges])
    engines = [str(pair) for pair in choose_pairs(engines, "cpu") if find_engines()[pair.engine].script]
    options = dict(device_batch_sizes=device_batch_sizes, row_budget_s=row_budget_s, images=images, device="cpu")
    options |= dict(engines=engines, weights=weights, ema=ema, calibration=calibration, out=out / "sweeps")
    rows = benchmark(name, data=data, **options)
    for row in rows[rows["status"] != OK].drop_duplicates(["engine", "precision"]).itertuples():
        print(f"not measured: {row.engine} {row.precision}, batch {row.batch}: {row.status}", file=sys.stderr)
    while True:
        chosen = choose_engine(rows, latency_ms, largest_loss)
        engine = convert(model, chosen["engine"], chosen["precision"], calibration=calibration, device="cpu")
        report = verify(engine, model, data)
        if report.ok:
            return chosen, report, write_script(engine, out / "choice", short_names(data.class_names))
        print(f"{report}\nnot taken: {engine.name} {engine.precision} fails verify", file=sys.stderr)
        rows = rows[(rows["engine"] != engine.name) | (rows["precision"] != engine.precision)]


def write_script(engine: Engine, out: Path | str, class_names: Sequence[str] | None = None) -> Path:
    """Write ``classify.py`` and its files into the new folder ``out``; return the path of the script.

    The script takes paths of images and prints the likeliest classes of each. It needs numpy, Pillow and the engine's
    runtime, but not vitdemo. It is written last, so that a folder with the script is complete.

    Args:
        engine: an engine from ``convert`` for the CPU, with square input.
        out: an empty folder, or one that does not exist yet.
        class_names: the names by class index; by default the wnids.

    Raises:
        VitdemoError: for any other engine, an engine without ``script``, and an artifact that is gone from the cache.
    """
    preprocessing, recipe = engine.info.preprocessing, engine.recipe
    _, height, width = preprocessing.input_size
    if recipe is None or engine.device != "cpu" or height != width:
        raise VitdemoError(f"{engine.info.tag}: a script needs an engine from convert, on the CPU, with square images")
    if not engine.script:
        known = ", ".join(name for name, cls in find_engines().items() if cls.script)
        raise VitdemoError(f"{engine.name}: it has no script; these have one: {known}")
    out = claim_folder(out)
    with named_errors(out), TemporaryDirectory(dir=out, prefix=".", suffix=PART) as part:
        for file in _model_files(engine, Path(part)):
            file.rename(out / file.name)
        lines = (" ".join(name.splitlines()) for name in class_names or engine.info.classes or ())
        (out / CLASSES).write_text("\n".join(lines), encoding="utf-8")
        template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True)
        with replacing(out / SCRIPT) as file:
            file.write(template.render(engine=engine, crop=preprocessing))
    return out / SCRIPT


def _model_files(engine: Engine, folder: Path) -> list[Path]:
    """Write the files that the runtime reads into ``folder``; return their paths."""
    if isinstance(engine, CompiledEngine):
        artifact = artifacts_root() / engine.recipe.folder_name
        for file in artifact.glob("model.*"):  # without the files that only verify reads
            shutil.copy2(file, folder)
        if not any(folder.iterdir()):
            raise VitdemoError(f"{artifact}: is gone from the cache; convert the model again")
    else:
        dtype = TORCH_TYPES[engine.precision]
        module = copy.deepcopy(engine.recipe.model.module).to(dtype)
        torch.export.save(export_graph(Model(module, engine.info), dtype=dtype), folder / PROGRAM)
    return sorted(folder.iterdir())
