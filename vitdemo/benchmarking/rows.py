"""Makes the rows of a sweep's table from the seconds of calls: rates, latencies, speedups with their intervals."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import prod

import numpy as np
import pandas as pd

from vitdemo.benchmarking.pairs import EAGER, Pair
from vitdemo.machine import describe_machine, machine_record, source_commit
from vitdemo.models.loading import full_tag
from vitdemo.models.model import ModelInfo
from vitdemo.stats import median_interval, percentiles_ms

OK, WARM = "ok", "warm"
MFU_CONVENTION = "FLOPs = 2 x MACs, of the roof measured here"

# The columns are described at ``benchmark``.
COLUMNS = """model weights engine precision parameters flops_per_image input_bytes precision_ran device threads streams
replicas device_batch_size batch status turns build_s load_s first_run_s second_run_s compile_s warm_up_s calls p50_ms
p90_ms p99_ms mean_ms std_ms images_per_s speedup_over_eager_fp32 speedup_over_eager_fp32_low
speedup_over_eager_fp32_high speedup_over_eager_fp32_pairs speedup_equal_precision speedup_equal_precision_low
speedup_equal_precision_high speedup_equal_precision_pairs tflops roof_tflops of_roof of_roof_low of_roof_high mfu
mfu_convention peak_memory_bytes joules_per_image accuracy top1 images calibrated_on_scored agreement relative_l2
artifact measured machine commit""".split()


@dataclass
class Measured:
    """The measurements of a pair at one batch size.

    Attributes:
        pair: engine and precision.
        device_batch_size: images per batch of one replica.
        facts: the facts about its engine.
        replicas: the number of replicas that share each batch.
        status: "", or what went wrong.
        first_run_s: loading and the first call; None where the process had run before.
        second_run_s: the second call.
        warm_up_s: the calls before the timed ones.
        rounds: the seconds of each call, one list per round, empty for a round in which the pair did not run.
        roof: the FLOP/s of plain matrix products, one number per round, NaN where they were not measured.
        peak_memory_bytes, joules_per_image: None where not measured.
    """

    pair: Pair
    device_batch_size: int
    facts: dict
    replicas: int = 1
    status: str = ""
    first_run_s: float | None = None
    second_run_s: float | None = None
    warm_up_s: float | None = None
    rounds: list[list[float]] = field(default_factory=list)
    roof: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    joules_per_image: float | None = None

    @property
    def batch(self) -> int:
        return self.device_batch_size * self.replicas

    @property
    def calls(self) -> list[float]:
        """The seconds of every timed call."""
        return [second for calls in self.rounds for second in calls]

    @property
    def rate(self) -> float:
        """Images/s: all images over the seconds of all calls."""
        return self.batch * len(self.calls) / sum(self.calls)

    @property
    def rates(self) -> np.ndarray:
        """Images/s of each round, NaN for a round in which the pair did not run."""
        return np.array([self.batch * len(calls) / sum(calls) if calls else np.nan for calls in self.rounds])

    @property
    def ran_as_asked(self) -> bool:
        """Whether most of the work was done in the requested precision."""
        return self.facts.get("precision_ran", {}).get(self.pair.precision, 0) >= 0.5


def rows_of(found: list[Measured], info: ModelInfo, before: pd.DataFrame, turns: str) -> pd.DataFrame:
    """The rows of one batch size, with the columns COLUMNS.

    Args:
        found: one per pair; the pairs were measured interleaved.
        info: the model's info.
        before: the sweep's earlier rows, in which a pair that ran alone finds the rate of eager.
        turns: the value of the column ``turns``, see ``benchmark``.
    """
    good = {measured.pair: measured for measured in found if not measured.status}
    rows = []
    for measured in found:
        row = _identity(measured, info) | {"turns": turns}
        if measured.pair in good:
            row |= _latency(measured) | _speedups(measured, good, before)
            row |= _of_roof(measured, info.flops_per_image)
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def _identity(measured: Measured, info: ModelInfo) -> dict:
    facts, pair = measured.facts, measured.pair
    shares = ", ".join(f"{precision} {share:.3f}" for precision, share in facts.get("precision_ran", {}).items())
    row = facts | {"model": info.tag, "weights": info.weights, **pair._asdict(), "precision_ran": shares or None}
    row |= {"replicas": measured.replicas, "device_batch_size": measured.device_batch_size, "batch": measured.batch}
    row |= {"flops_per_image": info.flops_per_image, "input_bytes": prod(info.preprocessing.input_size)}
    row |= {"status": measured.status or OK, "accuracy": _accuracy(facts, pair, info)}
    row |= {"measured": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}", "commit": source_commit()}
    return row | {"machine": describe_machine(machine_record())}


def _accuracy(facts: dict, pair: Pair, info: ModelInfo) -> str:
    if facts.get("top1") is not None:
        seen = f", {n} of them seen in calibration" if (n := facts["calibrated_on_scored"]) else ""
        line = f"top-1 {facts['top1']:.2%} of {facts['images']} images{seen}"
        same = facts.get("agreement")
        return line if same is None else f"{line}, eager fp32's answer for {same:.2%}"
    if "unchecked" in facts:
        return f"not measured: {facts['unchecked']}"
    calibration = " --calibration PATH" if pair.precision == "int8" else ""
    file = info.weights not in ("pretrained", "random")
    model = f"{info.tag} --weights {info.weights}" if file else full_tag(info.tag)
    command = f"vitdemo evaluate {model} --engine {pair.engine} --precision {pair.precision}{calibration}"
    return f"not measured ({info.weights} weights, no images): {command} --data PATH --out DIR"


def _latency(measured: Measured) -> dict:
    latency = percentiles_ms(measured.calls)
    cold = measured.first_run_s is not None
    own = ("second_run_s", "warm_up_s", "peak_memory_bytes", "joules_per_image")
    return {name: getattr(measured, name) for name in own} | {
        "first_run_s": measured.first_run_s if cold else WARM,
        "compile_s": measured.first_run_s - measured.second_run_s if cold else WARM,
        "calls": latency.pop("count"),
        **{f"{name}_ms": value for name, value in latency.items()},
        "std_ms": float(np.std(measured.calls)) * 1e3,
        "images_per_s": measured.rate,
    }


def _speedups(measured: Measured, good: dict[Pair, Measured], before: pd.DataFrame) -> dict:
    row, device = {}, measured.facts.get("device")
    equal = Pair(EAGER.engine, measured.pair.precision)
    for name, other in {"speedup_over_eager_fp32": EAGER, "speedup_equal_precision": equal}.items():
        mixed = name == "speedup_over_eager_fp32"
        if eager := good.get(other):
            like = eager.facts.get("device") == device and (mixed or measured.ran_as_asked and eager.ran_as_asked)
            row |= _interval(name, measured.rates / eager.rates) if like else {}
        else:
            size = before["device_batch_size"] == measured.device_batch_size
            same = before[size & (before["engine"] == other.engine) & (before["precision"] == other.precision)]
            like = (same["device"] == device).all() and (mixed or measured.ran_as_asked)
            if len(same) and same["status"].iloc[0] == OK and like:
                row[name] = measured.rate / same["images_per_s"].iloc[0]
    return row


def _of_roof(measured: Measured, flops_per_image: int) -> dict:
    row = {"tflops": measured.rate * flops_per_image / 1e12}
    if not measured.facts.get("precision_ran"):
        return row | {"mfu_convention": "n/a: which precision ran is not known"}
    if not measured.ran_as_asked:
        return row | {"mfu_convention": "n/a: most did not run natively in the precision that was asked for"}
    shares = _interval("of_roof", measured.rates * flops_per_image / measured.roof)
    if "of_roof" not in shares:
        return row | {"mfu_convention": "n/a: no roof was measured in this precision here"}
    roof = np.nanmedian(measured.roof)
    row |= {"roof_tflops": roof / 1e12, "mfu": measured.rate * flops_per_image / roof, "mfu_convention": MFU_CONVENTION}
    return row | shares


def _interval(name: str, values: np.ndarray) -> dict[str, float]:
    """The median of the rounds in which both were measured, its interval, and the number of these rounds."""
    values = values[np.isfinite(values)]
    found = zip((name, f"{name}_low", f"{name}_high"), median_interval(values), strict=True) if len(values) else ()
    return dict(found) | {f"{name}_pairs": len(values)}
