"""``answers``: a model's predictions for images without labels."""

from collections.abc import Sequence
from contextlib import closing

import pandas as pd
from tqdm.auto import tqdm

from vitdemo.dataset.dataset import Dataset
from vitdemo.engines.contract import Engine
from vitdemo.errors import VitdemoError
from vitdemo.inference.loop import PREDICTED, PROBABILITY, TOP, predict
from vitdemo.machine import Phases
from vitdemo.models.classes import short_names

BATCH = 8


def answers(
    engine: Engine,
    images: Dataset,
    *,
    class_names: Sequence[str] | None = None,
    top: int = TOP,
    progress: bool = True,
) -> pd.DataFrame:
    """The likeliest classes of each image, with the same crops as ``evaluate``.

    Args:
        engine: an engine from ``convert``.
        images: a data set from ``open_images`` or ``open_data``; labels are ignored.
        class_names: a name per output, such as ``class_names`` of a data set from ``match_classes``; None takes the
            model's own, or the outputs' numbers where it has none.
        top: the number of classes per image, at most 5.
        progress: show a progress bar.

    Returns:
        One row per image, in the data set's order: file; class_1 …, the names of the outputs; predicted_1 …, their
        numbers; probability_1 …, as fractions; error, the reason why an image cannot be read, or "".

    Raises:
        VitdemoError: for a bad ``top``, and where no image can be read.
        EngineFailure: when the engine breaks.
    """
    if top not in range(1, TOP + 1):
        raise VitdemoError(f"top {top!r}: must be a whole number from 1 to {TOP}")
    info, rows = engine.info, []
    names = short_names(class_names or info.class_names or info.classes or [f"output {k}" for k in range(info.outputs)])
    options = dict(device_batch_size=BATCH, input_path="fast", phases=Phases(), times=[])
    bar = tqdm(total=len(images), unit="image", desc="predict", delay=1, disable=not progress)
    with bar, closing(predict(engine, images, range(len(images)), **options)) as batches:
        for batch in batches:
            rows += batch
            bar.update(len(batch))
    if all(row.error for row in rows):
        raise VitdemoError(f"{rows[0].file}: {rows[0].error}; none of {len(rows)} images can be read")
    table = pd.DataFrame(rows)
    numbers = table[PREDICTED[:top]].astype("Int64")
    called = numbers.map(lambda k: None if pd.isna(k) else names[k])
    called.columns = [f"class_{k}" for k in range(1, top + 1)]
    probabilities = table[PROBABILITY[:top]].astype(float)
    found = pd.concat([table["file"], called, numbers, probabilities, table["error"]], axis=1)
    found.attrs["rotated"] = sum(batch.rotated for batch in options["times"])
    return found
