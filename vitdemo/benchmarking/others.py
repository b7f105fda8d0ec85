"""Performance as other projects published it: reads ``data/published/performance.csv``."""

from collections import defaultdict

import pandas as pd

from vitdemo.paths import data_path

TABLE = "published/performance.csv"
TEXT = ["source", "system", "hardware", "model", "precision", "note"]
COUNTS = ["devices", "batch"]
COMPARED = ["source", "hardware", "model", "batch"]  # the sides of one comparison have these in common


def published_performance() -> pd.DataFrame:
    """The published performance of ViTs and a ResNet-18, one row per side of a comparison; NaN: nothing is printed.

    From ``data/published/performance.csv``; ``data/README.md`` names the documents and says what was changed.

    - ``source``, ``system``: the document; what computed. ``baseline``: whether the others are held against this row.
    - ``hardware``, ``devices``, ``model``, ``precision``: how many devices shared a batch; models by timm's names.
    - ``batch``: images in the whole batch, over all devices.
    - ``latency_ms``, ``images_per_s``: of one batch; of inference alone (FlagPerf's p_val_core or p_infer_core).
    - ``images_per_s_whole``: of the whole loop, with loading and scoring (FlagPerf's p_val_whole or p_infer_whole).
    - ``first_run_s``, ``second_run_s``, ``compile_s``, ``e2e_s``: seconds; e2e is the whole job, validation included.
    - ``speedup``: over the baseline, where the document prints it.
    - ``mfu_percent``: of the device's peak, a multiply-accumulate counted as one operation: half of the usual number.
    - ``top1_percent``: on ILSVRC2012 val. ``memory_gib``, ``memory_total_gib``: the device's, used and there.
    """
    # A number is whatever is neither text nor a count.
    dtypes = defaultdict(lambda: "float64", dict.fromkeys(TEXT, "str") | dict.fromkeys(COUNTS, "Int64"))
    table = pd.read_csv(data_path(TABLE), dtype=dtypes)
    return table.assign(baseline=table["baseline"].notna(), **table[TEXT].fillna(""))
