"""Whether the engines on CUDA can be accepted, in minutes: ``python -m tests.gpu [--out DIR]``, or ``make gpu``.

Each step prints PASS or FAIL with its numbers, has a time limit of its own, and may be left out. What is right comes
before what is quick, so that the first three minutes already say something. ``--dry`` runs every step on the CPU, with
``LateDevice`` in the place of a GPU and vit_shapes20; ``--fault STEP`` plants a fault that this step has to find.
Needs torch, timm, pandas and this checkout, and none of simplejpeg, Ray, OpenVINO or papermill.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd
import timm
import torch
from torch.nn.attention import sdpa_kernel

from tests.engines.late_device import LateDevice
from tests.test_races import SIZE, answers_right
from vitdemo import Engine, Model, convert, evaluate, load_model, machine_record, open_data
from vitdemo.engines.eager import EagerEngine
from vitdemo.engines.pipeline import ATTENTION, SLOTS, WAITS, Cuda, Pipeline, gpu_record
from vitdemo.engines.roof import linear_shapes, machine_roof
from vitdemo.paths import SHAPES20, data_path
from vitdemo.verification.tolerances import TOLERANCES

PRECISIONS = ("fp32", "fp16", "bf16")
BATCHES = (1, 8, 32, 64, 128, 256)
SLEEP = 2_000_000  # clock cycles, a millisecond or so, before what a shaken device queues
# Images/s in fp16 at a batch of 256 on an A100 of 40 GB, from AITemplate's examples/04_vit at c8aad37.
PUBLISHED = {"vit_base_patch16_224": 5273, "vit_large_patch16_384": 479}


@dataclass
class Setting:
    """What a run was asked for, and what its steps share."""

    dry: bool
    fault: str
    step: str = ""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def faulty(self) -> bool:
        """Whether the step that runs now is to fail."""
        return self.fault == self.step

    @property
    def where(self) -> str:
        return "cpu" if self.dry else "cuda"

    def device(self, seed: int = 0, without: str | None = None):
        return LateDevice(seed, without) if self.dry else Shaken(seed, without)

    @cached_property
    def shapes20(self) -> Model:
        return load_model("vit_shapes20")

    def engine(self, model: Model, name: str, precision: str) -> Engine:
        if not self.dry:
            return convert(model, name, precision, device="cuda")
        engine = EagerEngine(model, precision, device="cpu", threads=2)
        engine.captured(engine._module, LateDevice(0), sizes=(8, 4, 2, 1))
        return engine


class Shaken(Cuda):
    """A GPU whose streams dawdle before what they do, differently each time, and that may leave one wait out."""

    def __init__(self, seed: int, without: str | None):
        super().__init__()
        self._draw, self._without = torch.Generator().manual_seed(seed), without

    def _dawdle(self, stream: str) -> None:
        with torch.cuda.stream(self._streams[stream]):
            torch.cuda._sleep(int(torch.randint(SLEEP, (), generator=self._draw)))

    def copy(self, stream, target, source):
        self._dawdle(stream)
        super().copy(stream, target, source)

    def replay(self, graph):
        self._dawdle("compute")
        super().replay(graph)

    def wait(self, name, what, stream=None):
        if name != self._without:
            super().wait(name, what, stream)


class Timed(Cuda):
    """A GPU that keeps when each copy and each graph began and ended."""

    def __init__(self):
        super().__init__()
        self.origin, self.spans = self._now("compute"), []

    def _now(self, stream: str) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._streams[stream])
        return event

    def _kept(self, stream: str, what: Callable, *arguments: object) -> None:
        begin = self._now(stream)
        what(*arguments)
        self.spans.append((stream, begin, self._now(stream)))

    def copy(self, stream, target, source):
        self._kept(stream, super().copy, stream, target, source)

    def replay(self, graph):
        self._kept("compute", super().replay, graph)

    def table(self) -> pd.DataFrame:
        """Milliseconds from the origin: stream, begin, end."""
        self.finish()
        rows = [(s, *(self.origin.elapsed_time(each) for each in span)) for s, *span in self.spans]
        return pd.DataFrame(rows, columns=["stream", "begin_ms", "end_ms"])


def relative_l2(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def submitted(engine_or_pipeline, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """The logits of each batch, SLOTS of them on their way at a time."""
    flying, found = [], []
    for x in batches:
        flying.append(engine_or_pipeline.submit(x))
        if len(flying) == SLOTS:
            found.append(flying.pop(0).result())
    return found + [each.result() for each in flying]


# The steps. Each returns the numbers it prints, and raises AssertionError where they are not as they must be.


def facts(at: Setting) -> dict:
    known = {"torch": torch.__version__, "timm": timm.__version__, "where": at.where}
    if not at.dry:
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,clocks.sm,power.draw,memory.free",
            "--format=csv,noheader",
        ]
        known |= gpu_record() | {"nvidia-smi": subprocess.run(query, capture_output=True, text=True).stdout.strip()}
    sum_ = (torch.ones(2, device=at.where) + (0 if at.faulty else 1)).sum().item()
    assert sum_ == 4, f"1 + 1 is {sum_ / 2} on {at.where}"
    return known


def roofs(at: Setting) -> dict:
    shapes = linear_shapes(at.shapes20, 8)
    found = {}
    for precision in ("fp32",) if at.dry else PRECISIONS:
        found[precision] = machine_roof(precision, shapes, device=at.where).flops_per_s / 1e12
    if at.faulty:
        found["fp32"] = float("nan")
    assert all(tflops > 0 for tflops in found.values()), found
    assert at.dry or min(found["fp16"], found["bf16"]) > 3 * found["fp32"], f"16 bits are hardly quicker: {found}"
    return {f"{precision} TFLOP/s": round(tflops, 2) for precision, tflops in found.items()}


def oracle(at: Setting) -> dict:
    """Logits beside fp32's on the CPU, on images and on noise; every precision, at every batch size."""
    model, data = at.shapes20, open_data(data_path(SHAPES20))
    x, limit = model.info.random_pixels(12), 16 if at.dry else 1000
    expected = EagerEngine(model, "fp32", device="cpu", threads=2)(x)
    reference = evaluate(convert(model, device="cpu"), data, limit=limit, progress=False).rows["predicted_1"]
    found = {}
    for precision in ("fp32", "bf16") if at.dry else PRECISIONS:
        engine = at.engine(model, "eager", precision)
        logits = torch.cat([engine(part) for part in (x[:1], x[1:4], x[4:])])
        error = relative_l2(logits * (1.05 if at.faulty else 1), expected)
        most = 1e-5 if precision == "fp32" else TOLERANCES[precision].logits_l2
        rows = evaluate(engine, data, limit=limit, progress=False).rows
        found[f"{precision} L2"], found[f"{precision} agreement"] = error, (rows["predicted_1"] == reference).mean()
        assert error <= most, f"{precision}: relative L2 {error:.1e}, more than {most:.0e}"
        assert found[f"{precision} agreement"] >= 0.98, found
        engine.close()
    return found


def attention(at: Setting) -> dict:
    """Each backend that the pipeline may take, beside float64, at a ViT's lengths."""
    found, precision = {}, torch.float32 if at.dry else torch.float16
    for heads, tokens in ((12, 197), (16, 577)):
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 1 if at.dry else 32, heads, tokens, 64, device=at.where).to(precision)
        exact = torch.softmax(q.double() @ k.double().mT / 8, -1) @ v.double()
        for backend in ATTENTION:
            try:
                with sdpa_kernel(backend):
                    result = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            except RuntimeError:
                continue  # not on this device
            error = relative_l2(result.double() * (1.1 if at.faulty else 1), exact)
            found[f"{backend.name} {tokens}"] = error
            assert error < 5e-3, f"{backend.name} at {tokens} tokens: relative L2 {error:.1e}"
    assert found
    return found


def graphs(at: Setting) -> dict:
    """A replay gives what the same calls give without a graph, bit for bit, and nothing of what ran before."""
    module = EagerEngine(at.shapes20, "fp32", device="cpu", threads=2)._module.to(at.where)
    size, sizes = at.shapes20.info.preprocessing.input_size, (4, 2, 1)
    device = LateDevice(0) if at.dry else Cuda()
    pipeline = Pipeline(device, module, size, sizes=sizes)
    if at.faulty:
        device.replay = lambda graph: None  # what lies there from before is taken for the answer
    sets, counts = list(at.shapes20.info.random_pixels(3, 4)), (4, 1, 3, 2)
    first = [submitted(pipeline, [x[:count]])[0] for x in (*sets, sets[0]) for count in counts]
    for k, count in enumerate(counts):
        with torch.no_grad(), sdpa_kernel(ATTENTION, set_priority=True):
            full = min(each for each in sizes if each >= count)  # other batch sizes have other kernels
            plain = module(sets[0][:full].to(at.where)).cpu()[:count]
        assert torch.equal(first[k], plain), f"batch {count}: the graph's logits are not the module's"
        assert torch.equal(first[k], first[3 * len(counts) + k]), f"batch {count}: other logits the second time"
    black, white = (torch.full((4, *size), level, dtype=torch.uint8) for level in (0, 255))
    leaks = [submitted(pipeline, [each, sets[0][:3]])[1] for each in (black, white)]
    assert torch.equal(*leaks), "what filled a batch up shows in its logits"
    pipeline.close()
    return {"batches": len(first)}


def races(at: Setting) -> dict:
    """Right with all waits while streams dawdle; wrong without any one of them, or the check would prove nothing."""
    seeds = range(20 if at.dry else 4)
    counts = (4, 3, 1, 4, 2, 4, 9, 4) * (1 if at.dry else 6)
    unguarded = WAITS[1] if at.faulty else None
    for seed in seeds:
        assert answers_right(at.device(seed, unguarded), counts), f"seed {seed}: a batch got another one's logits"
    for name in WAITS:
        wrong = [seed for seed in range(50) if not answers_right(at.device(seed, name), counts)]
        assert wrong, f"nothing goes wrong without the wait {name!r}"
    return {"seeds": len(seeds), "waits": len(WAITS)}


def no_sync(at: Setting) -> dict:
    """``submit`` queues and returns; the host waits for nothing in it."""
    device = LateDevice(0) if at.dry else Cuda()
    pipeline = Pipeline(device, lambda x: x.float().mean((2, 3)), SIZE, sizes=(4, 2, 1))
    x = torch.zeros(4, *SIZE, dtype=torch.uint8)
    x, longest = x if at.dry else x.pin_memory(), 0.0
    for _ in range(20):
        ran = device.ran if at.dry else 0
        if not at.dry:
            torch.cuda.set_sync_debug_mode("error")
        start = time.perf_counter()
        future = pipeline.submit(x)
        if at.faulty:
            device.finish()
            time.sleep(0.01)
        longest = max(longest, time.perf_counter() - start)
        if not at.dry:
            torch.cuda.set_sync_debug_mode("default")
        assert not at.dry or device.ran == ran, "submit waited for the device"
        future.result()
    pipeline.close()
    assert at.dry or longest < 1e-3, f"submit took {1e3 * longest:.2f} ms"
    return {"longest submit, ms": round(1e3 * longest, 3)}


def overlap(at: Setting) -> dict:
    """The next batch is copied while one is computed: by the intervals of events, not by a rate."""
    size, count = (SIZE, 4) if at.dry else ((3, 224, 224), 256)
    device = LateDevice(1) if at.dry else Timed()
    module = (lambda x: x.float().mean((2, 3))) if at.dry else _heavy
    pipeline = Pipeline(device, module, size, sizes=(count,))
    x = torch.zeros(count, *size, dtype=torch.uint8)
    batches = [x if at.dry else x.pin_memory()] * 20
    if at.faulty:
        for batch in batches:
            pipeline.submit(batch).result()
    else:
        submitted(pipeline, batches)
    if at.dry:
        ahead = device.ahead
    else:
        table = device.table()
        at.tables["overlap"] = table
        copies, computed = (table[table["stream"] == name] for name in ("in", "compute"))
        ahead = sum(
            ((computed["begin_ms"] < copy.end_ms) & (copy.begin_ms < computed["end_ms"])).any()
            for copy in copies.itertuples()
        )
    pipeline.close()
    assert ahead >= 3, f"{ahead} of 20 copies ran while a batch was computed"
    return {"copies beside a graph": int(ahead), "of": 20}


def _heavy(x: torch.Tensor) -> torch.Tensor:
    y = x.float().flatten(1)[:, :4096].to(torch.bfloat16)
    weights = torch.eye(4096, dtype=torch.bfloat16, device=x.device)
    for _ in range(200):
        y = y @ weights
    return y[:, :16].float()


def memory(at: Setting) -> dict:
    """What is taken is taken when the engine is made; 200 batches take nothing more, and ``close`` leaves nothing."""
    device = LateDevice(0) if at.dry else Cuda()

    def taken() -> int:
        return device.taken if at.dry else torch.cuda.memory_allocated()

    pipeline = Pipeline(device, lambda x: x.float().mean((2, 3)), SIZE, sizes=(4, 2, 1))
    after_capture, kept = taken(), []
    for _ in range(200):
        submitted(pipeline, [torch.zeros(3, *SIZE, dtype=torch.uint8)])
        if at.faulty:
            kept.append(device.empty((1, 1024), torch.float32))
    pipeline.close()
    assert taken() == after_capture, f"{taken() - after_capture} more than after the capture"
    return {"after the capture": after_capture, "after 200 batches": taken()}


def speed(at: Setting) -> dict:
    """Images/s: of the graph alone on pixels that lie there, and from the host's memory to logits there."""
    rows, summary = [], {}
    names = ["vit_shapes20"] if at.dry else list(PUBLISHED)
    for name in names:
        model = at.shapes20 if at.dry else load_model(name, "random")
        for engine_name, precision in [("eager", "fp32")] if at.dry else _pairs():
            try:
                engine = at.engine(model, engine_name, precision)
            except Exception as error:
                rows.append({"model": name, "engine": engine_name, "precision": precision, "status": str(error)[:200]})
                continue
            for batch in (1, 4) if at.dry else BATCHES:
                row = {"model": name, "engine": engine_name, "precision": precision, "batch": batch}
                rows.append(row | _rates(at, engine, batch) | {"status": "ok"})
            engine.close()
    table = at.tables["speed"] = pd.DataFrame(rows)
    good = table[table["status"] == "ok"]
    if at.faulty:
        good = good.assign(resident_images_per_s=float("nan"))
    assert len(good) and (good["resident_images_per_s"] > 0).all(), table.to_string()
    for name, rows_of in good.groupby("model"):
        best = rows_of.loc[rows_of["resident_images_per_s"].idxmax()]
        summary[name] = (
            f"{best['resident_images_per_s']:.0f} images/s at {best['batch']}, published {PUBLISHED.get(name)}"
        )
    if not at.dry:
        _hold_against_targets(good, summary)
    return summary


def _pairs() -> list[tuple[str, str]]:
    return [("eager", "bf16"), ("eager", "fp16"), ("inductor", "bf16"), ("inductor", "fp16"), ("eager", "fp32")]


def _rates(at: Setting, engine: Engine, batch: int) -> dict:
    sets = list(engine.info.random_pixels(4, batch))
    sets = sets if at.dry else [x.pin_memory() for x in sets]
    calls = 4 if at.dry else max(20, 2048 // batch)
    submitted(engine, sets)
    start = time.perf_counter()
    submitted(engine, [sets[k % len(sets)] for k in range(calls)])
    copied = batch * calls / (time.perf_counter() - start)
    graph, device = (
        engine.pipeline._graphs[min(s for s in engine.pipeline._sizes if s >= batch)],
        engine.pipeline._device,
    )
    device.finish()
    start = time.perf_counter()
    for _ in range(calls):
        device.replay(graph)
    device.finish()
    seconds = (time.perf_counter() - start) / calls
    found = {"resident_images_per_s": batch / seconds, "resident_ms": 1e3 * seconds, "images_per_s": copied}
    return found | {"tflops": batch / seconds * engine.info.flops_per_image / 1e12}


def _hold_against_targets(good: pd.DataFrame, summary: dict) -> None:
    """What was aimed at, met or missed; a speed that is missed is no fault of what is right."""
    base = good[good["model"] == "vit_base_patch16_224"]
    at_1, at_256 = (base[base["batch"] == batch] for batch in (1, 256))
    ratio = (at_256["images_per_s"] / at_256["resident_images_per_s"]).max()
    for what, value, met in (
        ("ms at batch 1, below 0.8", at_1["resident_ms"].min(), at_1["resident_ms"].min() < 0.8),
        (
            "images/s at 256, 12,500",
            at_256["resident_images_per_s"].max(),
            at_256["resident_images_per_s"].max() > 12500,
        ),
        ("of the resident rate with copies, 0.97", ratio, ratio >= 0.97),
    ):
        summary[what] = f"{value:.3g} ({'met' if met else 'missed'})"


STEPS: dict[str, tuple[Callable[[Setting], dict], int]] = {  # and its limit in seconds
    "facts": (facts, 30),
    "oracle": (oracle, 60),
    "attention": (attention, 30),
    "graphs": (graphs, 30),
    "races": (races, 60),
    "no_sync": (no_sync, 20),
    "overlap": (overlap, 30),
    "memory": (memory, 30),
    "roofs": (roofs, 60),
    "speed": (speed, 240),
}


def run(steps: list[str], at: Setting, out: Path | None) -> bool:
    """Run the steps; whether all of them passed."""
    results, done = {}, True

    def late(*_) -> None:
        raise TimeoutError("it took longer than its limit")

    signal.signal(signal.SIGALRM, late)
    for name in steps:
        work, limit = STEPS[name]
        at.step, start = name, time.perf_counter()
        signal.alarm(10 * limit if at.dry else limit)
        try:
            numbers, passed = work(at), True
        except Exception as error:  # the next step may still say something
            numbers, passed = {"why": f"{type(error).__name__}: {error}"}, False
        signal.alarm(0)
        seconds = time.perf_counter() - start
        shown = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items()
        )
        print(f"{'PASS' if passed else 'FAIL'} {name} ({seconds:.1f} s): {shown}", flush=True)
        results[name] = {"passed": passed, "seconds": seconds, **numbers}
        done &= passed
        if out:
            out.mkdir(parents=True, exist_ok=True)
            record = {"machine": machine_record(), "dry": at.dry, "steps": results}
            (out / "gpu.json").write_text(json.dumps(record, indent=2, default=str), encoding="utf-8")
            for table, frame in at.tables.items():
                frame.to_csv(out / f"gpu_{table}.csv", index=False)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="on the CPU, with a device that only seems to be a GPU")
    parser.add_argument("--steps", default=",".join(STEPS), help="which, by commas")
    parser.add_argument("--fault", default="", choices=["", *STEPS], help="the step that has to find a planted fault")
    parser.add_argument("--out", type=Path, help="a folder for gpu.json and the tables; data/results/<GPU> by default")
    arguments = parser.parse_args()
    unknown = set(arguments.steps.split(",")) - set(STEPS)
    if unknown or not arguments.dry and not torch.cuda.is_available():
        sys.exit(f"no such step: {', '.join(unknown)}" if unknown else "torch sees no GPU here; --dry needs none")
    steps = [name for name in STEPS if name in arguments.steps.split(",")]
    out = arguments.out
    if not arguments.dry and out is None:
        out = data_path("results") / re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
    sys.exit(not run(steps, Setting(arguments.dry, arguments.fault), out))


if __name__ == "__main__":
    main()
