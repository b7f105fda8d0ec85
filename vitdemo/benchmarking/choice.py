"""Which of the measured engines to use, and that engine as a script that needs no vitdemo."""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import jinja2
import pandas as pd
import torch

from vitdemo.benchmarking.pairs import EAGER
from vitdemo.benchmarking.rows import OK
from vitdemo.engines.artifacts import artifacts_root
from vitdemo.engines.contract import CompiledEngine, Engine, find_engines
from vitdemo.engines.graph import export_graph
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.models.model import Model
from vitdemo.paths import PART, claim_folder, replacing
from vitdemo.precisions import TORCH_TYPES

SCRIPT, CLASSES, PROGRAM = "classify.py", "classes.txt", "model.pt2"
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
        raise VitdemoError(
            f"which engine: none is right enough in {latency_budget_ms} ms; the fastest takes {least:.1f} ms; give "
            "more time, or take a larger loss"
        )
    return fast.loc[fast["images_per_s"].idxmax()]


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
