"""benchmark: models x engines x precisions x batch sizes on random pixels, by turns, one row for each."""

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

# One model's sweep: one process per pair of engine and precision, all taking turns, in rounds.


ROUNDS, TURN_S = 9, 0.75
WARM_UP = 0.25  # of the timed seconds, at most
PATIENCE_S = 10.0  # a single call up to this long may be the machine's hiccup, and another one is made
PROCESS_BYTES = 1 << 29  # of a worker before it has a model, beside what it shares


@dataclass
class Candidate:
    """A pair and its bench, None while there is none. facts: of its engine. ended: why it takes no further part, ""
    while it does."""

    pair: Pair
    recipe: Recipe
    bench: Worker | ReplicaBench | None = None
    facts: dict = field(default_factory=dict)
    has_run: bool = False
    ended: str = ""

    def end(self, why: str = "") -> None:
        """Give back what it holds; ``why`` goes into the rows to come."""
        self.ended = self.ended or why
        if self.bench:
            self.bench.end()
        self.bench = None


class SweepRun:
    """One model's sweep, as its settings say."""

    def __init__(self, model: Model, sweep: Sweep, data: Dataset | None):
        self._model, self._sweep, self._data, self._settings = model, sweep, data, sweep.settings
        self._sizes, self._replicas = self._settings["device_batch_sizes"], self._settings["replicas"]
        sizes = {min(size, ROOF_BATCH) for size in self._sizes}
        self._shapes = sorted({*SQUARE, *(shape for size in sizes for shape in linear_shapes(model, size))})
        self._budget_s = self._settings["row_budget_s"]
        self._device = resolve_device(self._settings["device"], EagerEngine)
        self._of_engines = {name: self._settings[name] for name in ("calibration", "device")}
        self._turn_s = min(TURN_S, self._budget_s / ROUNDS / (1 + WARM_UP))
        self._reference: dict = {}  # eager fp32's answers and logits, which the others' are held against

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
        for recipe in recipes.values():  # before the others are there: a build takes memory
            if issubclass(recipe.cls, CompiledEngine) and not (artifacts_root() / recipe.folder_name).exists():
                with suppress(VitdemoError):  # its row will say why
                    recipe.engine(cores()).close()
        weights = sum(tensor.nbytes for tensor in self._model.module.state_dict().values())
        each = PROCESS_BYTES + 3 * weights  # the file's, the runtime's own layout, and room to make it
        room = max(int(free_memory_bytes() // each) - 1, 1)  # without the roof's
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
        """One batch size: what each candidate's calls took, and the roof in each round."""
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
        """Whether it computes where the roof is measured."""
        return candidate.facts.get("device") == self._device

    def _take_turns(self, taking: list[tuple[Candidate, Measured]], roof: Worker, bar: tqdm) -> None:
        """ROUNDS of turns. The roof in a precision takes as much time as a row may, at most, and one turn at least."""
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
        """Load the engine if it is not yet, make the first two calls, and warm up."""
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
        """Get the engine ready at the candidate's bench. Raises Failed."""
        recipe = candidate.recipe
        try:
            if self._replicas:
                data = self._data or open_data(data_path(SHAPES20))
                candidate.bench = ReplicaBench(recipe.engine(cores()), data, self._replicas, share)
            elif not issubclass(recipe.cls, CompiledEngine):
                candidate.bench.ask("engine", recipe, cores())
            else:
                try:
                    candidate.bench.ask("engine", recipe.ticket(), cores())
                except Failed:  # it is not built yet, or cannot be used: here it is, and says so
                    recipe.engine(cores()).close()
                    candidate.bench.ask("engine", recipe.ticket(), cores())
        except VitdemoError as error:
            raise Failed(str(error)) from None
        parameters = sum(parameter.numel() for parameter in self._model.module.parameters())
        candidate.facts.update(candidate.bench.ask("facts"), parameters=parameters)

    @contextmanager
    def _failing(self, candidate: Candidate, measured: Measured) -> Iterator[None]:
        """What Failed is raised for becomes the row's status, and the candidate takes no further part."""
        try:
            yield
        except Failed as failure:
            measured.status = f"failed: {failure}"
            candidate.end(f"skipped: batch {measured.batch} failed")
            tqdm.write(f"{candidate.pair} batch {measured.device_batch_size} {measured.status}", file=sys.stderr)

    def _inspect(self, candidates: list[Candidate]) -> None:
        """Whether the answers are right, after the first batch size, as the first call of a candidate is to be cold."""
        for candidate in candidates:
            if candidate.facts and "precision_ran" not in candidate.facts and not candidate.ended:
                try:
                    self._check(candidate)
                except Failed as failure:
                    candidate.facts.setdefault("precision_ran", {})
                    candidate.facts["unchecked"] = str(failure)

    def _check(self, candidate: Candidate) -> None:
        """precision_ran; on real images top-1 and agreement; on random pixels the logits beside eager fp32's."""
        facts = candidate.facts
        facts["precision_ran"] = candidate.bench.ask("precision_ran")
        logits, answers = candidate.bench.ask("logits"), None
        if self._data:
            found = candidate.bench.ask("answers", self._data.address, self._settings["images"])
            answers = found.pop("answers")
            facts.update(found)
        if candidate.pair == EAGER:
            self._reference = {"logits": logits, "answers": answers}
        if not self._reference:  # it was too slow, or failed
            return
        if answers is not None:
            read = np.maximum(answers, self._reference["answers"]) >= 0  # both fail to read the same files
            if read.any():
                facts["agreement"] = float(np.equal(answers, self._reference["answers"])[read].mean())
        reference = self._reference["logits"].double()
        if reference.shape == logits.shape:  # of a pair alone the first batch size may be another
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
    device: str = "auto",
    replicas: int | None = None,
    row_budget_s: float = 20.0,
    data: Dataset | Path | str | None = None,
    class_map: Path | str | None = None,
    images: int = 1000,
    calibration: Path | str | None = None,
    out: Path | str,
) -> pd.DataFrame:
    """Measure every model in every engine and batch size.

    Each pair of engine and precision lives in a process of its own. All take turns, in ROUNDS rounds: a turn is
    TURN_S seconds of calls, one at least. A pair whose calls have taken ``row_budget_s`` sits out the rest of the
    rounds; where one call takes longer, the row and those of larger batches are skipped, and say so. Every engine stays
    loaded while the others take their turns; those that do not all fit into memory are measured afterwards, one at a
    time, and their rows say ``turns`` = alone. What fails is a row that says why.

    What was measured before a sweep is stopped stays in its file; ``merge`` joins it with a sweep of the batch sizes
    that are missing.

    Args:
        models: names, files or folders, as in ``load_model``.
        engines: such as "openvino:int8" or "openvino" (its precisions that are native here), or a list of these with
            commas; None is every engine. Eager in fp32, and in each of these precisions that it has natively, is always
            measured beside them.
        device_batch_sizes: images at once, each from 1 up.
        weights: "pretrained", "random" or a file, as in ``load_model``.
        device: "cpu", "cuda", or "auto" (CUDA where there is one), as in ``convert``.
        replicas: how many processes share each batch (``device_batch_size`` each), by Ray; None is no replicas.
        row_budget_s: seconds that the calls of one row may take.
        data: images for the accuracy; None is the bundled ones for vit_shapes20, and no accuracy for others.
        class_map: which output is which class, where names do not say it; see ``match_classes``.
        images: how many of ``data``, evenly spread over it.
        calibration: images for int8, as in ``convert``.
        out: the folder of ``perf_<model>_<setting>_<time>.csv``, one file per model, its machine's record beside it.

    Returns:
        One row per model, engine, precision and batch size, which is also in ``out``:

    - ``model``, ``weights``: the full tag; pretrained, random, or the file. ``engine``, ``precision``: as asked for.
    - ``parameters``: numbers that the model has learnt. ``flops_per_image``: 2 x the multiply-accumulates of one image.
      ``input_bytes``: of one image's pixels.
    - ``precision_ran``: the share of multiply-accumulates in each precision, read back from the runtime.
    - ``device``: cpu or cuda. ``threads``: CPU threads of a call (of one replica's). ``streams``: calls side by side,
      1 here, as single calls are timed, where ``evaluate`` may take more. ``replicas``: how many share each batch.
      ``device_batch_size``: images that a replica gets at once. ``batch``: device_batch_size x replicas.
    - ``status``: ok; skipped or failed, and why. ``turns``: together (by turns with the others), or alone (after them).
    - ``build_s``: making the artifact, when it was made. ``load_s``: making it ready: reading the artifact, casting
      eager's weights, or starting the replicas.
    - ``first_run_s``: load_s and the first call; "warm" where this process had run before. ``second_run_s``: the call
      after. ``compile_s``: first_run_s - second_run_s. ``warm_up_s``: of the calls before the timed ones.
    - ``calls``: timed calls; the first one after waking is not, where calls are short. ``p50_ms``, ``p90_ms``,
      ``p99_ms``, ``mean_ms``, ``std_ms``: latency of a call: percentiles, mean, standard deviation.
    - ``images_per_s``: all images of the timed calls over all their seconds.
    - ``speedup_over_eager_fp32``: the rate over eager fp32's, the median of the rounds; mixed precision unless
      ``precision`` is fp32. ``…_low``, ``…_high``: the interval that holds the true median with 95 %, of six rounds or
      more. ``…_pairs``: rounds that it is the median of.
    - ``speedup_equal_precision``, with the same three: the rate over eager's in the same precision, where both ran
      natively in it, on one device.
    - ``tflops``: images_per_s x flops_per_image / 10^12. ``roof_tflops``: what plain matrix products in this precision
      reached in the same rounds, their median. ``of_roof``, ``of_roof_low``, ``of_roof_high``: the rate over the
      roof's, the median of the rounds; none where another precision, or an emulated one, ran. ``mfu``: the rate of all
      calls over roof_tflops. ``mfu_convention``: how operations are counted, and what the peak is.
    - ``peak_memory_bytes``: the largest resident size of the pair's process, so far, since the engine was ready.
    - ``joules_per_image``: what the whole board of the GPU uses, over two more seconds of calls; none on a CPU, and
      where NVML, the driver's library, does not tell.
    - ``accuracy``: top-1 and agreement for people, or why there is none. ``top1``: a fraction. ``images``: that top1
      and agreement are of. ``calibrated_on_scored``: how many of these int8's ranges were found on.
    - ``agreement``: the share of images with eager fp32's answer. ``relative_l2``: the distance of the logits from
      eager fp32's, over their size, on random pixels.
    - ``artifact``: hash of everything that shaped the engine. ``measured``: when, UTC. ``machine``. ``commit``: of
      vitdemo's source.

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
    loaded = [load_model(name, weights) for name in names]  # before anything is measured: a mistyped name says so now
    scored = [scored_data(model, data, class_map, images) for model in loaded]
    tables, out = [], user_path(out)
    for name, model, own in zip(names, loaded, scored, strict=True):
        settings = dict(model=name, tag=model.info.tag, weights=str(weights), pairs=list(map(str, pairs)))
        settings |= dict(device_batch_sizes=sorted(set(sizes)), replicas=replicas, row_budget_s=row_budget_s)
        settings |= dict(data=own and str(own.path), images=images, weights_sha256=model.info.weights_sha256)
        settings |= dict(calibration=calibration and str(calibration), device=device, commit=source_commit())
        with open_sweep(out, settings) as sweep:
            SweepRun(model, sweep, own).do(pairs)
        tables.append(sweep.rows)
    return pd.concat(tables, ignore_index=True)


def scored_data(
    model: Model, data: Dataset | Path | str | None, class_map: Path | str | None = None, images: int = 1000
) -> Dataset | None:
    """The images that ``model`` is scored on; None where nothing could be said with them."""
    if model.info.weights == "random":
        if data:
            raise VitdemoError(f"data {data}: random weights are right by chance alone; leave it out, or give weights")
        return None
    bundled = data_path(SHAPES20) if model.info.tag in MODELS else None
    found = data or bundled
    if isinstance(found, (str, Path)):
        found = open_data(found)
    if not found:
        return None
    found = match_classes(model.info, found, class_map)
    # Evenly spread: in a folder per class the first ones would be of the first classes.
    return found.take(spread(len(found), images)) if images < len(found) else found
