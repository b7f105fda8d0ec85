"""Whether the engines on CUDA can be accepted, in minutes: ``python -m tests.gpu [--out DIR]``, or ``make gpu``.

Each step prints PASS or FAIL with its numbers, has a time limit of its own, and may be left out. What is right comes
before what is quick, so that the first three minutes already say something. ``--dry`` runs every step on the CPU, with
``LateDevice`` in the place of a GPU and vit_shapes20; ``--fault STEP`` plants a fault that this step has to find.
Needs torch, timm, pandas and this checkout, and none of simplejpeg, Ray, OpenVINO or papermill.
"""

import argparse
import copy
import gc
import json
import math
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import pandas as pd
import timm
import torch
from torch.nn.attention import sdpa_kernel

from tests.engines.late_device import LateDevice
from tests.test_races import SIZE, answers_right
from vitdemo import Engine, Model, convert, evaluate, load_model, machine_record, open_data
from vitdemo.engines.eager import EagerEngine
from vitdemo.engines.pipeline import ATTENTION, SLOTS, WAITS, Cuda, Pipeline, gpu_joules, gpu_record
from vitdemo.engines.roof import _gpu_seconds, linear_shapes, machine_roof
from vitdemo.machine import cores, seconds_of
from vitdemo.paths import SHAPES20, data_path
from vitdemo.precisions import TORCH_TYPES
from vitdemo.verification.tolerances import TOLERANCES

PRECISIONS = ("fp32", "fp16", "bf16")
BATCHES = (1, 8, 32, 64, 128, 256)
SLEEP = 2_000_000  # clock cycles, a millisecond or so, before what a shaken device queues
COMPILED = (("reduce-overhead", 32), ("max-autotune", 256), ("max-autotune", 1))  # modes of torch.compile, batch sizes
COMPILED += (("reduce-overhead", 8), ("reduce-overhead", 64))
MOST_BYTES = 16 << 20  # of torch.compile's caches
TOTAL_S = 480  # for all steps together
# Images/s in fp16 at a batch of 256 on an A100 of 40 GB, from AITemplate's examples/04_vit at c8aad37.
PUBLISHED = {"vit_base_patch16_224": 5273, "vit_large_patch16_384": 479}


@dataclass
class Setting:
    """What a run was asked for, and what its steps share. cache: torch.compile's of an earlier run, if any. deadline:
    when the time of the step that runs now is over."""

    dry: bool
    fault: str
    cache: Path | None = None
    step: str = ""
    deadline: float = 0.0
    roofs: dict[str, float] = field(default_factory=dict)
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

    def roof(self, precision: str) -> float:
        """FLOP/s of plain products, measured once in this run."""
        if precision not in self.roofs:
            shapes = linear_shapes(self.shapes20, 8)
            found = machine_roof(precision, shapes, device=self.where, reached=0 if self.dry else math.inf)
            self.roofs[precision] = found.flops_per_s
        return self.roofs[precision]

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


class TimeIsUp(BaseException):
    """A step took longer than its limit. No ``except Exception`` on the way, of torch.compile above all, takes it for
    a failure of its own."""


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
    found = {precision: at.roof(precision) / 1e12 for precision in (("fp32",) if at.dry else PRECISIONS)}
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
        assert found[f"{precision} agreement"] >= 0.995, found
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
    assert found and (at.dry or len(found) == 2 * len(ATTENTION)), f"not every backend ran: {sorted(found)}"
    return found


def graphs(at: Setting) -> dict:
    """A replay gives what the same calls give without a graph, bit for bit, and nothing of what ran before."""
    # A copy, as .to() would move the model that the other steps share.
    module = copy.deepcopy(EagerEngine(at.shapes20, "fp32", device="cpu", threads=2)._module).to(at.where)
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
        assert not all(answers_right(at.device(seed, name), counts) for seed in range(50)), (
            f"nothing goes wrong without the wait {name!r}"
        )
    return {"seeds": len(seeds), "waits": len(WAITS)}


def no_sync(at: Setting) -> dict:
    """``submit`` queues and returns; the host waits for nothing in it."""
    device = LateDevice(0) if at.dry else Cuda()
    pipeline = Pipeline(device, lambda x: x.float().mean((2, 3)), SIZE, sizes=(4, 2, 1))
    x = torch.zeros(4, *SIZE, dtype=torch.uint8)
    x, longest = x if at.dry else x.pin_memory(), 0.0
    for number in range(21):
        ran = device.ran if at.dry else 0
        if not at.dry:
            with torch.cuda.stream(device._streams["in"]):
                torch.cuda._sleep(20 * SLEEP)  # some 20 ms, so that waiting for the device shows
            torch.cuda.set_sync_debug_mode("error")
        try:
            start = time.perf_counter()
            future = pipeline.submit(x)
            if at.faulty:
                device.finish()
                time.sleep(0.01)
            if number:  # the first one starts the thread and creates the events
                longest = max(longest, time.perf_counter() - start)
        finally:
            if not at.dry:
                torch.cuda.set_sync_debug_mode("default")
        assert not at.dry or device.ran == ran, "submit waited for the device"
        future.result()
    pipeline.close()
    assert at.dry or longest < 5e-3, f"submit took {1e3 * longest:.2f} ms"
    return {"longest submit, ms": round(1e3 * longest, 3)}


def overlap(at: Setting) -> dict:
    """The next batch is copied while one is computed: by the intervals of events, not by a rate."""
    size, count = (SIZE, 4) if at.dry else ((3, 224, 224), 256)
    module = (lambda x: x.float().mean((2, 3))) if at.dry else _heavy
    pipeline = Pipeline(LateDevice(1) if at.dry else Cuda(), module, size, sizes=(count,))
    if at.faulty:
        submit = pipeline.submit
        pipeline.submit = lambda x: _done(submit(x))
    spans = at.tables["overlap"] = pipeline.spans(torch.zeros(20, count, *size, dtype=torch.uint8))
    pipeline.close()
    alone, ahead = (copies_beside(own) for _, own in spans.groupby("in_flight"))
    assert ahead >= 3, f"{ahead} of 20 copies ran while a batch was computed"
    assert not alone, f"{alone} copies ran while the batch before them was computed, which had been waited for"
    return {"copies beside a graph": ahead, "of": 20}


def copies_beside(spans: pd.DataFrame) -> int:
    """How many copies to the device ran while something was computed."""
    copies, computed = (spans[spans["stream"] == name] for name in ("in", "compute"))
    return sum(
        int(((computed["begin_ms"] < copy.end_ms) & (copy.begin_ms < computed["end_ms"])).any())
        for copy in copies.itertuples()
    )


def _done(future: Future) -> Future:
    future.result()
    return future


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

    gc.collect()
    before = taken()
    pipeline = Pipeline(device, lambda x: x.float().mean((2, 3)), SIZE, sizes=(4, 2, 1))
    after_capture, kept = taken(), []
    for _ in range(200):
        submitted(pipeline, [torch.zeros(3, *SIZE, dtype=torch.uint8)])
        if at.faulty:
            kept.append(device.empty((1, 1024), torch.float32))
    pipeline.close()
    assert taken() == after_capture, f"{taken() - after_capture} more than after the capture"
    numbers = {"after the capture": after_capture, "after 200 batches": taken()}
    del pipeline
    assert at.dry or taken() <= before + 4096, f"{taken() - before} bytes stay"  # the seed of the generator may
    return numbers


def speed(at: Setting) -> dict:
    """Images/s of the graph alone on pixels that lie there, and from the host's memory to logits there; and of timm's
    own module, eager and under torch.compile. The latter comes last, as it takes longest: a time-out loses only that.
    """
    base, large = ("vit_shapes20", "vit_shapes20") if at.dry else PUBLISHED
    rows, left = [], _plan(base, large, at.dry)
    load = cache(lambda name: at.shapes20 if at.dry else load_model(name, "random"))
    try:
        with suppress(TimeIsUp):
            while left:
                name, engine, precision, batches = left[0]
                if engine == "timm":
                    rows += [_of_timm(at, load(name), precision, batch, "eager") for batch in batches]
                else:
                    _of_engine(at, load(name), engine, precision, batches, rows)
                left.pop(0)
        _of_compiled(at, load(base), rows)
    finally:
        table = at.tables["speed"] = pd.DataFrame(rows)
    own, good = table[~table["engine"].str.startswith("timm")], table[table["status"] == "ok"]
    wrong = own[~((own["status"] == "ok") & (own["relative_l2"] <= own["most_l2"]) & (own["resident_ms"] > 0))]
    assert len(own) and wrong.empty, wrong.to_string()
    at.tables["targets"] = targets = _targets(at, good, base, large)
    cut = ", ".join(f"{name} {engine} {precision}" for name, engine, precision, _ in left)
    reached = {f"{each.target} {each.goal:g}": f"{each.value:.3g} ({each.met})" for each in targets.itertuples()}
    return {"cut short by the time limit": cut or "nothing"} | reached


def _plan(base: str, large: str, dry: bool) -> list[tuple[str, str, str, tuple[int, ...]]]:
    """Model, engine, precision and batch sizes, by what is wanted most."""
    if dry:
        return [(base, "timm", "fp32", (1, 4)), (base, "eager", "fp32", (1, 4))]
    few = (1, 32, 128)
    return [
        (base, "eager", "fp16", BATCHES),
        (base, "timm", "fp16", (1, 8, 32, 64, 256)),
        (large, "eager", "fp16", few),
        (base, "inductor", "fp16", BATCHES),
        (large, "inductor", "fp16", few),
        (base, "eager", "bf16", BATCHES),
        (base, "eager", "fp32", (1, 64)),
    ]


def _of_engine(at: Setting, model: Model, name: str, precision: str, batches: tuple[int, ...], rows: list) -> None:
    """A row per batch size, with the error of the logits beside those of the CPU in fp32."""
    known = {"model": model.info.tag, "engine": name, "precision": precision}
    try:
        engine = at.engine(model, name, precision)
        x = model.info.random_pixels(2)
        expected = EagerEngine(model, "fp32", device="cpu", threads=cores())(x)
        # As at ``verify``, whose tolerance may follow the noise of random weights up to twice.
        known["most_l2"] = 2 * TOLERANCES[precision].logits_l2
        for batch in batches:  # each is a graph of its own
            logits = engine(x.repeat(batch, 1, 1, 1)[:batch]) * (1.05 if at.faulty else 1)
            known["relative_l2"] = relative_l2(logits, expected.repeat(batch, 1)[:batch])
            rows.append(known | {"batch": batch, "status": "ok"} | _rates(at, engine, batch))
        engine.close()
    except Exception as error:
        rows.append(known | {"status": f"{type(error).__name__}: {error}"[:200]})


def _rates(at: Setting, engine: Engine, batch: int) -> dict:
    sets = engine.info.random_pixels(4, batch, pinned=not at.dry)
    pipeline, device = engine.pipeline, engine.pipeline._device
    graph = pipeline._graphs[min(size for size in pipeline._sizes if size >= batch)]
    submitted(engine, sets)  # no zeros are to lie where the graph reads

    def call() -> None:
        device.replay(graph)
        if at.dry:
            device.finish()

    seconds = _seconds_each(at, call, None if at.dry else device._streams["compute"])
    calls = 4 if at.dry else max(10, int(0.5 / seconds))
    start = time.perf_counter()
    submitted(engine, [sets[k % len(sets)] for k in range(calls)])
    copied = batch * calls / (time.perf_counter() - start)
    before = gpu_joules() if batch == BATCHES[-1] else None  # NVML counts on in steps of up to a tenth of a second
    found = _resident(at, engine.info.flops_per_image, engine.precision, batch, seconds) | {"images_per_s": copied}
    if before is not None:
        calls = int(2 / seconds) + 1
        for _ in range(calls):
            call()
        device.finish()
        found["joules_per_image"] = (gpu_joules() - before) / (calls * batch)
    return found


def _resident(at: Setting, flops_per_image: int, precision: str, batch: int, seconds: float) -> dict:
    rate = batch * flops_per_image / seconds
    found = {"resident_images_per_s": batch / seconds, "resident_ms": 1e3 * seconds}
    return found | {"tflops": rate / 1e12, "mfu": rate / at.roof(precision)}


def _seconds_each(at: Setting, call: Callable, stream: torch.cuda.Stream | None = None) -> float:
    """Of one of many calls in a row, by the GPU's events in ``stream`` (dry: by the host's clock); the median of ten
    such rows, after a warm-up. No result is kept, as torch.compile's graphs would not be replayed over it."""

    def of_row(calls: int) -> float:
        def row() -> None:
            for _ in range(calls):
                call()

        return (seconds_of if at.dry else _gpu_seconds)(row) / calls

    with torch.cuda.stream(stream) if stream else nullcontext():
        of_row(1 if at.dry else 5)
        calls = max(1, int(0.05 / of_row(1)))
        return statistics.median(of_row(calls) for _ in range(3 if at.dry else 10))


def _of_timm(at: Setting, model: Model, precision: str, batch: int, how: str) -> dict:
    """A row of timm's module as anybody runs it, on pixels that are normalised and lie there: it is spared what an
    engine does to them. It is called in this thread, the one that imported Inductor, as CUDA graphs of torch.compile
    ask for. how: "eager", or a mode of torch.compile, which in a dry run is torch's backend that compiles nothing."""
    dtype = TORCH_TYPES[precision]
    module = copy.deepcopy(model.module).to(at.where, dtype)
    x = torch.randn(batch, *model.info.preprocessing.input_size, device=at.where, dtype=dtype)
    if how != "eager":
        torch.compiler.reset()  # each batch size is compiled for itself
        options = {"backend": "eager"} if at.dry else {"mode": how}
        module = torch.compile(module, fullgraph=True, dynamic=False, **options)
    with torch.no_grad():
        seconds = _seconds_each(at, lambda: module(x))
    known = {"model": model.info.tag, "engine": f"timm {how}", "precision": precision, "batch": batch, "status": "ok"}
    return known | _resident(at, model.info.flops_per_image, precision, batch, seconds)


def _of_compiled(at: Setting, model: Model, rows: list[dict]) -> None:
    """Rows of timm's module under torch.compile, as far as the time goes. Its caches are kept for the next run."""
    if at.cache and at.cache.exists():
        torch.compiler.load_cache_artifacts(at.cache.read_bytes())
    precision, compiled = _compared(at)
    for mode, batch in compiled:
        try:
            if time.perf_counter() > at.deadline:
                raise TimeIsUp("no time was left")
            rows.append(_of_timm(at, model, precision, batch, mode))
        except (Exception, TimeIsUp) as error:
            known = {"model": model.info.tag, "engine": f"timm {mode}", "precision": precision, "batch": batch}
            rows.append(known | {"status": f"not measured: {type(error).__name__}: {error}"[:200]})
    signal.setitimer(signal.ITIMER_REAL, 0)  # the rest takes moments
    if at.cache and (saved := torch.compiler.save_cache_artifacts()) and len(saved[0]) <= MOST_BYTES:
        at.cache.write_bytes(saved[0])


def _compared(at: Setting) -> tuple[str, tuple[tuple[str, int], ...]]:
    """The precision in which engines and timm are compared, and modes of torch.compile with their batch sizes."""
    return ("fp32", (("reduce-overhead", 4), ("max-autotune", 1))) if at.dry else ("fp16", COMPILED)


def _targets(at: Setting, good: pd.DataFrame, base: str, large: str) -> pd.DataFrame:
    """The goals for an H100 or H200 and what was reached, NaN where it was not measured."""
    precision, compiled = _compared(at)
    own = good[~good["engine"].str.startswith("timm")]

    def best(rows: pd.DataFrame, what: str = "resident_images_per_s", **of: object) -> float:
        for name, value in of.items():
            rows = rows[rows[name] == value]
        return rows[what].max()

    of_base, of_large, most = own[own["model"] == base], own[own["model"] == large], own["batch"].max()
    found = [("ms at batch 1, at most", of_base.loc[of_base["batch"] == 1, "resident_ms"].min(), 0.8)]
    for how, batch, goal in [("eager", 1, 5.0), *((mode, batch, 1.0) for mode, batch in compiled)]:
        theirs = best(good, engine=f"timm {how}", precision=precision, batch=batch)
        ours = best(of_base, precision=precision, batch=batch)
        found.append((f"times timm {how} at batch {batch}, at least", ours / theirs, goal))
    for name, rows, goal in ((base, of_base, 12_500), (large, of_large, 1_148)):
        found.append((f"{name}: of the roof, at least", best(rows, "mfu", precision=precision), 0.55))
        found.append((f"{name}: images/s, at least", best(rows), goal))
        published = PUBLISHED.get(name, math.nan)
        found.append((f"{name}: times the published A100's, at least", best(rows) / published, 1.0))
    with_copies = of_base[of_base["batch"] == most].nlargest(1, "resident_images_per_s")
    share = (with_copies["images_per_s"] / with_copies["resident_images_per_s"]).max()
    found.append((f"of the resident rate with copies at batch {most:.0f}, at least", share, 0.97))
    table = pd.DataFrame(found, columns=["target", "value", "goal"])
    below = table["target"].str.endswith("at most")
    met = (table["value"] <= table["goal"]).where(below, table["value"] >= table["goal"])
    return table.assign(met=met.map({True: "met", False: "missed"}).where(table["value"].notna(), "not measured"))


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
    "speed": (speed, 360),
}


def run(steps: list[str], at: Setting, out: Path | None) -> bool:
    """Run the steps; whether all of them passed."""
    results, done, begun = {}, True, time.perf_counter()

    def late(*_) -> None:
        raise TimeIsUp("it took longer than its limit")

    signal.signal(signal.SIGALRM, late)
    for name in steps:
        work, limit = STEPS[name]
        at.step, start = name, time.perf_counter()
        limit = 10 * limit if at.dry else max(1.0, min(limit, begun + TOTAL_S - start))
        at.deadline = start + limit - 1
        signal.setitimer(signal.ITIMER_REAL, limit, 5)  # and again, as an exception in a callback is lost
        try:
            numbers, passed = work(at), True
        except (Exception, TimeIsUp) as error:  # the next step may still say something
            numbers, passed = {"why": f"{type(error).__name__}: {error}"}, False
        signal.setitimer(signal.ITIMER_REAL, 0)
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
    parser.add_argument("--cache", type=Path, help="a file of torch.compile's caches: read if it is there, and written")
    arguments = parser.parse_args()
    unknown = set(arguments.steps.split(",")) - set(STEPS)
    if unknown or not arguments.dry and not torch.cuda.is_available():
        sys.exit(f"no such step: {', '.join(unknown)}" if unknown else "torch sees no GPU here; --dry needs none")
    steps = [name for name in STEPS if name in arguments.steps.split(",")]
    out = arguments.out
    if not arguments.dry and out is None:
        out = data_path("results") / re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
    sys.exit(not run(steps, Setting(arguments.dry, arguments.fault, arguments.cache), out))


if __name__ == "__main__":
    main()
