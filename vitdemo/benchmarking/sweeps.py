"""``benchmark``: times models x engines x precisions x batch sizes on random pixels, interleaved, one row for each."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from vitdemo.benchmarking.bench import Failed
from vitdemo.benchmarking.files import Sweep, open_sweep
from vitdemo.benchmarking.pairs import EAGER, Pair, choose_pairs
from vitdemo.benchmarking.processes import ReplicaBench, Worker
from vitdemo.benchmarking.rows import Measured, rows_of
from vitdemo.dataset.dataset import Dataset, open_data
from vitdemo.engines.artifacts import Recipe, artifacts_root, recipe_for
from vitdemo.engines.contract import CompiledEngine, resolve_device
from vitdemo.engines.eager import EagerEngine
from vitdemo.engines.roof import ROOF_BATCH, SQUARE, linear_shapes
from vitdemo.errors import VitdemoError, at_least_1
from vitdemo.inference.cluster import check_ray
from vitdemo.machine import cores, free_memory_bytes, now, source_commit
from vitdemo.models.classes import match_classes
from vitdemo.models.model import Model, load_model
from vitdemo.paths import MODELS, SHAPES20, data_path, user_path
from vitdemo.stats import spread

# One model's sweep: one process per pair of engine and precision. The processes run interleaved, in rounds.


ROUNDS, TURN_S = 9, 0.75
WARM_UP = 0.25  # the largest fraction of the timed seconds
PATIENCE_S = 10.0  # a single call up to this long may be slow by chance, so another one is made
PROCESS_BYTES = 1 << 29  # memory of a worker without a model, not counting memory that it shares


@dataclass
class Candidate:
    """A pair that is measured, with its bench.

    bench: None while it has not started or after it ended. facts: the facts about its engine. ended: the reason why it
    is no longer measured, or "".
    """

    pair: Pair
    recipe: Recipe
    bench: Worker | ReplicaBench | None = None
    facts: dict = field(default_factory=dict)
    has_run: bool = False
    ended: str = ""

    def end(self, why: str = "") -> None:
        """End the bench; ``why`` is the status of the candidate's further rows."""
        self.ended = self.ended or why
        if self.bench:
            self.bench.end()
        self.bench = None


class SweepRun:
    """The sweep of one model, by its settings."""

    def __init__(self, model: Model, sweep: Sweep, data: Dataset | None, calibration: Dataset | Path | str | None):
        self._model, self._sweep, self._data, self._settings = model, sweep, data, sweep.settings
        self._sizes, self._replicas = self._settings["device_batch_sizes"], self._settings["replicas"]
        sizes = {min(size, ROOF_BATCH) for size in self._sizes}
        self._shapes = sorted({*SQUARE, *(shape for size in sizes for shape in linear_shapes(model, size))})
        self._budget_s = self._settings["row_budget_s"]
        self._device = resolve_device(self._settings["device"], EagerEngine)
        self._of_engines = {"calibration": calibration, "device": self._settings["device"]}
        self._turn_s = min(TURN_S, self._budget_s / ROUNDS / (1 + WARM_UP))
        self._reference: dict = {}  # the predictions and logits of eager fp32, for comparison with the others'

    def do(self, pairs: list[Pair]) -> None:
        """Measure all pairs at all batch sizes."""
        recipes: dict[Pair, Recipe] = {}
        for pair in pairs:
            try:
                recipes[pair] = recipe_for(self._model, *pair, **self._of_engines)
            except VitdemoError as error:
                if pair == EAGER:
                    raise
                self._add([Measured(pair, size, {}, status=f"skipped: {error}") for size in self._sizes], "")
        for recipe in recipes.values():  # before the processes start, because a build takes memory
            if issubclass(recipe.cls, CompiledEngine) and not (artifacts_root() / recipe.folder_name).exists():
                with suppress(VitdemoError):  # the pair's row will give the reason
                    recipe.engine(cores()).close()
        weights = sum(tensor.nbytes for tensor in self._model.module.state_dict().values())
        each = PROCESS_BYTES + 3 * weights  # the file, the runtime's own copy, and memory to make that
        room = max(int(free_memory_bytes() // each) - 1, 1)  # one less, for the roof's process
        order = sorted(recipes, key=lambda pair: pair.engine != EAGER.engine)  # the reference first
        together = order if self._replicas else order[:room]
        self._measure_group({pair: recipes[pair] for pair in together}, "together")
        for pair in order[len(together) :]:
            self._measure_group({pair: recipes[pair]}, "alone")

    def _measure_group(self, recipes: dict[Pair, Recipe], turns: str) -> None:
        candidates: list[Candidate] = []
        try:
            with ExitStack() as ending:
                roof = Worker()
                ending.callback(roof.end)
                roof.ask("roof", self._shapes, self._device)
                for pair, recipe in recipes.items():
                    candidates.append(Candidate(pair, recipe, None if self._replicas else Worker()))
                    ending.callback(candidates[-1].end)
                for size in self._sizes:
                    with tqdm(desc=f"{self._model.info.tag} batch {size}", total=len(candidates) * ROUNDS) as bar:
                        found = self._measure(candidates, roof, size, bar)
                    self._inspect(candidates)
                    self._add(found, turns)
        except Failed as failure:
            raise VitdemoError(f"benchmark: {failure}") from None

    def _measure(self, candidates: list[Candidate], roof: Worker, size: int, bar: tqdm) -> list[Measured]:
        """Measure one batch size: the calls of each candidate, and the roof in each round."""
        taking = [(candidate, self._begin(candidate, size, 1 / len(candidates))) for candidate in candidates]
        with suppress(Failed):
            for precision in sorted({each.pair.precision for each in candidates if self._has_roof(each)}):
                roof.ask("explore", precision)
        self._take_turns(taking, roof, bar)
        for candidate, measured in taking:
            if not candidate.ended:
                with suppress(Failed):
                    measured.peak_memory_bytes = candidate.bench.ask("peak_memory_bytes")
                    measured.joules_per_image = candidate.bench.ask("joules_per_image")
        return [measured for _, measured in taking]

    def _has_roof(self, candidate: Candidate) -> bool:
        """Whether the candidate computes on the device on which the roof is measured."""
        return candidate.facts.get("device") == self._device

    def _take_turns(self, taking: list[tuple[Candidate, Measured]], roof: Worker, bar: tqdm) -> None:
        """Run ROUNDS rounds of turns. The roof in a precision gets at least one turn, and at most the time of a row."""
        spent: Counter[str] = Counter()
        for number in range(ROUNDS):
            if all(candidate.ended for candidate, _ in taking):
                return
            for candidate, measured in taking[:: -1 if number % 2 else 1]:
                measured.rounds.append([])
                if not measured.status and sum(measured.calls) < self._budget_s:
                    with self._failing(candidate, measured):
                        measured.rounds[-1] = candidate.bench.ask("turn", self._turn_s)
                bar.update()
            rates = {}
            for candidate, measured in taking:
                precision = candidate.pair.precision
                if precision not in rates and spent[precision] < self._budget_s and self._has_roof(candidate):
                    begin = now()
                    with suppress(Failed):
                        rates[precision] = roof.ask("flops_per_s", precision, self._turn_s / 3)
                    spent[precision] += now() - begin
                measured.roof.append(rates.get(precision) or np.nan)

    def _begin(self, candidate: Candidate, size: int, share: float) -> Measured:
        """Load the engine if needed, make the first two calls, and warm up."""
        measured = Measured(candidate.pair, size, candidate.facts, self._replicas or 1, status=candidate.ended)
        if candidate.ended:
            return measured
        with self._failing(candidate, measured):
            if not candidate.facts:
                self._load(candidate, share)
            first = candidate.bench.ask("first_call", size)
            second = candidate.bench.ask("step") if first < max(5 * self._budget_s, PATIENCE_S) else first
            measured.first_run_s = None if candidate.has_run else (candidate.facts["load_s"] or 0.0) + first
            measured.second_run_s, candidate.has_run = second, True
            usual = min(second, candidate.bench.ask("step")) if self._budget_s < second < PATIENCE_S else second
            if usual > self._budget_s:
                taken = f"{usual:.3g} s" if usual < 100 else f"{usual:.0f} s"
                measured.status = f"skipped: {taken} a batch"
                candidate.end(f"skipped: batch {measured.batch} took {taken}")
            else:
                left_s = WARM_UP * ROUNDS * self._turn_s - second
                measured.warm_up_s = second + (candidate.bench.ask("warm_up", left_s) if left_s > second else 0)
        return measured

    def _load(self, candidate: Candidate, share: float) -> None:
        """Load the engine into the candidate's bench. Raises Failed."""
        recipe = candidate.recipe
        try:
            if self._replicas:
                candidate.bench = ReplicaBench(recipe.engine(cores()), self._data, self._replicas, share)
            elif not issubclass(recipe.cls, CompiledEngine):
                candidate.bench.ask("engine", recipe, cores())
            else:
                try:
                    candidate.bench.ask("engine", recipe.ticket(), cores())
                except Failed:  # not built yet or unusable: build it in this process, which reports errors
                    recipe.engine(cores()).close()
                    candidate.bench.ask("engine", recipe.ticket(), cores())
        except VitdemoError as error:
            raise Failed(str(error)) from None
        parameters = sum(parameter.numel() for parameter in self._model.module.parameters())
        candidate.facts.update(candidate.bench.ask("facts"), parameters=parameters)

    @contextmanager
    def _failing(self, candidate: Candidate, measured: Measured) -> Iterator[None]:
        """Turn Failed inside the block into the row's status, and measure the candidate no further."""
        try:
            yield
        except Failed as failure:
            measured.status = f"failed: {failure}"
            candidate.end(f"skipped: batch {measured.batch} failed")
            tqdm.write(f"{candidate.pair} batch {measured.device_batch_size} {measured.status}", file=sys.stderr)

    def _inspect(self, candidates: list[Candidate]) -> None:
        """Check the results of each candidate, after the first batch size, so that its first timed call was cold."""
        for candidate in candidates:
            if candidate.facts and "precision_ran" not in candidate.facts and not candidate.ended:
                try:
                    self._check(candidate)
                except Failed as failure:
                    candidate.facts.setdefault("precision_ran", {})
                    candidate.facts["unchecked"] = str(failure)

    def _check(self, candidate: Candidate) -> None:
        """Read ``precision_ran``; measure top-1 and agreement on images, and the logits' error on random pixels."""
        facts = candidate.facts
        facts["precision_ran"] = candidate.bench.ask("precision_ran")
        logits, answers = candidate.bench.ask("logits"), None
        if self._data:
            found = candidate.bench.ask("answers", self._data.address, self._settings["images"])
            answers = found.pop("answers")
            facts.update(found)
        if candidate.pair == EAGER:
            self._reference = {"logits": logits, "answers": answers}
        if not self._reference:  # eager fp32 was too slow, or failed
            return
        if answers is not None:
            read = np.maximum(answers, self._reference["answers"]) >= 0  # without images that neither could read
            if read.any():
                facts["agreement"] = float(np.equal(answers, self._reference["answers"])[read].mean())
        reference = self._reference["logits"].double()
        if reference.shape == logits.shape:  # a pair that runs alone may have begun with another batch size
            facts["relative_l2"] = float((logits.double() - reference).norm() / reference.norm())

    def _add(self, found: list[Measured], turns: str) -> None:
        self._sweep.add(rows_of(found, self._model.info, self._sweep.rows, turns))


DEVICE_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def benchmark(
    models: Sequence[Path | str] | Path | str,
    *,
    engines: Sequence[str] | str | None = None,
    device_batch_sizes: Sequence[int] = DEVICE_BATCH_SIZES,
    weights: Path | str = "pretrained",
    ema: bool = False,
    device: str = "auto",
    replicas: int | None = None,
    row_budget_s: float = 20.0,
    data: Dataset | Path | str | None = None,
    class_map: Path | str | None = None,
    images: int = 1000,
    calibration: Dataset | Path | str | None = None,
    out: Path | str,
) -> pd.DataFrame:
    """Measure every model in every engine and batch size.

    Each pair of engine and precision runs in its own process. The processes are measured interleaved, in ROUNDS rounds;
    a turn is TURN_S seconds of calls, and at least one call. A pair whose calls have taken ``row_budget_s`` does not
    run in the remaining rounds. If a single call takes longer than that, its row and those of larger batches are
    skipped, with the reason. Every engine stays loaded while the others are measured. Engines that do not fit into
    memory together are measured afterwards, one at a time, and their rows have ``turns`` = alone. A failure becomes a
    row with its reason.

    The rows that were measured before a sweep is stopped stay in its file; ``merge`` joins it with a sweep of the
    missing batch sizes.

    Args:
        models: names, files or folders, as in ``load_model``.
        engines: such as "openvino:int8" or "openvino" (in its native precisions here), or several of these with commas
            or in a list; None is every engine. Eager is always measured too, in fp32 and in each of these precisions
            that it has natively.
        device_batch_sizes: the batch sizes, each at least 1.
        weights, ema: as in ``load_model``.
        device: "cpu", "cuda", or "auto", as in ``convert``.
        replicas: the number of processes that share each batch (``device_batch_size`` each), by Ray; None is no
            replicas.
        row_budget_s: the seconds that the calls of one row may take.
        data: images for the accuracy; None is the bundled images for vit_shapes20, and no accuracy for other models.
        class_map: the output of each class, where the names do not match; see ``match_classes``.
        images: the number of images, evenly spread over ``data``.
        calibration: images for int8, as in ``convert``.
        out: the folder for ``perf_<model>_<setting>_<time>.csv``, one file per model, and records of the machine.

    Returns:
        One row per model, engine, precision and batch size, which is also in ``out``:

    - ``model``, ``weights``: the full tag; pretrained, random, or the file. ``engine``, ``precision``: as requested.
    - ``parameters``: the number of the model's parameters. ``flops_per_image``: 2 x the multiply-accumulates of one
      image. ``input_bytes``: the size of one image's pixels.
    - ``precision_ran``: the share of multiply-accumulates in each precision, read back from the runtime.
    - ``device``: cpu or cuda. ``threads``: CPU threads per call (of one replica). ``streams``: simultaneous calls,
      always 1 here, because single calls are timed; ``evaluate`` may use more. ``replicas``: the number of replicas
      that share each batch. ``device_batch_size``: images per batch of one replica. ``batch``: device_batch_size x
      replicas.
    - ``status``: ok; or skipped or failed, with the reason. ``turns``: together (interleaved with the others), or alone
      (after them).
    - ``build_s``: the seconds to make the artifact, now or earlier. ``load_s``: the seconds to make the engine ready:
      reading the artifact, casting eager's weights, or starting the replicas.
    - ``first_run_s``: load_s plus the first call; "warm" where this process had run before. ``second_run_s``: the
      second call. ``compile_s``: first_run_s - second_run_s. ``warm_up_s``: the seconds of the calls before the timed
      ones.
    - ``calls``: the number of timed calls; where calls are short, the first one of each turn is not timed. ``p50_ms``,
      ``p90_ms``, ``p99_ms``, ``mean_ms``, ``std_ms``: the latency of a call: percentiles, mean, standard deviation.
    - ``images_per_s``: all images of the timed calls over all their seconds.
    - ``speedup_over_eager_fp32``: the rate over eager fp32's, the median of the rounds; mixed precision unless
      ``precision`` is fp32. ``…_low``, ``…_high``: the 95 % interval of the median, where there are at least six
      rounds. ``…_pairs``: the number of rounds.
    - ``speedup_equal_precision``, with the same three: the rate over eager's in the same precision, where both ran
      natively in it, on the same device.
    - ``tflops``: images_per_s x flops_per_image / 10^12. ``roof_tflops``: the roof, which is the throughput of plain
      matrix products in this precision in the same rounds (median). ``of_roof``, ``of_roof_low``, ``of_roof_high``: the
      rate over the roof, the median of the rounds and its interval; empty where another precision, or an emulated one,
      ran. ``mfu``: the rate of all calls over roof_tflops. ``mfu_convention``: how operations are counted, and what the
      peak is.
    - ``peak_memory_bytes``: the largest resident size of the pair's process so far, since the engine was ready.
    - ``joules_per_image``: the energy of the GPU's whole board, over two more seconds of calls; empty on a CPU, and
      where NVML, the driver's library, does not report it.
    - ``accuracy``: top-1 and agreement for people, or why they are missing. ``top1``: a fraction. ``images``: the
      number of images for top1 and agreement. ``calibrated_on_scored``: how many of them were used to find the ranges
      of int8.
    - ``agreement``: the share of images with eager fp32's top-1 class. ``relative_l2``: the relative L2 error of the
      logits against eager fp32's, on random pixels.
    - ``artifact``: the hash of everything on which the engine depends. ``measured``: the time, UTC. ``machine``.
      ``commit``: the commit of vitdemo's source.

    Raises:
        VitdemoError: for bad input, before anything is measured.
    """
    names = [str(models)] if isinstance(models, (Path, str)) else list(map(str, models))
    pairs, sizes = choose_pairs(engines, device), list(device_batch_sizes)
    for size in sizes:
        at_least_1(device_batch_sizes=size)
    if not sizes:
        raise VitdemoError("device_batch_sizes: there are none; give some, such as 1,8")
    at_least_1(replicas=replicas, images=images)
    if not row_budget_s > 0:
        raise VitdemoError(f"row_budget_s {row_budget_s!r}: must be more than 0 seconds")
    if replicas:
        check_ray(None)
    # before the first measurement, to report mistyped names
    loaded = [load_model(name, weights, ema=ema) for name in names]
    scored = [scored_data(model, data, class_map, images) for model in loaded]
    tables, out = [], user_path(out)
    for name, model, own in zip(names, loaded, scored, strict=True):
        settings = dict(model=name, tag=model.info.tag, weights=str(weights), ema=ema, pairs=list(map(str, pairs)))
        settings |= dict(device_batch_sizes=sorted(set(sizes)), replicas=replicas, row_budget_s=row_budget_s)
        settings |= dict(data=own and str(own.path), images=images, weights_sha256=model.info.weights_sha256)
        settings |= dict(calibration=calibration and str(calibration), device=device, commit=source_commit())
        with open_sweep(out, settings) as sweep:
            SweepRun(model, sweep, own, calibration).do(pairs)
        tables.append(sweep.rows)
    return pd.concat(tables, ignore_index=True)


def scored_data(
    model: Model, data: Dataset | Path | str | None, class_map: Path | str | None = None, images: int = 1000
) -> Dataset | None:
    """The images on which ``model`` is scored; None where there are none, or with random weights."""
    if model.info.weights == "random":
        if data:
            raise VitdemoError(f"data {data}: random weights are right only by chance; leave it out, or give weights")
        return None
    found = data or (data_path(SHAPES20) if model.info.tag in MODELS else None)
    if isinstance(found, (str, Path)):
        found = open_data(found)
    if not found:
        return None
    found = match_classes(model.info, found, class_map)
    # Evenly spread, because with one folder per class the first images would all be of the first classes.
    return found.take(spread(len(found), images)) if images < len(found) else found
