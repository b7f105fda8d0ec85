"""The exercises' checks: what each answer is held against, and the one line by which a run stops at a wrong one."""

from collections.abc import Iterable
from inspect import getfullargspec
from traceback import format_exception_only

import numpy as np
import pandas as pd
import torch

from vitdemo.course.attention import attention_maps, mask_patches, most_looked_at, rollout
from vitdemo.course.bug_hunt import Hunt
from vitdemo.dataset.dataset import Dataset
from vitdemo.dataset.decoding import crop_picture
from vitdemo.dataset.devkit import Devkit
from vitdemo.engines.contract import Engine
from vitdemo.errors import VitdemoError
from vitdemo.evaluation.evaluation import Evaluation, evaluate
from vitdemo.models.model import Model
from vitdemo.verification.verification import verify

STOPPED = "The cells below did not run: change your answer, then Run Selected Cell and All Below"


class ExerciseError(VitdemoError):
    """An exercise that is not right yet. A notebook shows the line alone, and runs none of the cells below."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [str(self)]


def check(notebook: str, number: int, **given: object) -> None:
    """Say that the answers to an exercise are right, or stop the run in one line: what is not done, or a hint.

    Args:
        notebook: its name, such as "00_tour".
        number: which of its exercises, from 1.
        given: the answers, and what they are held against, by the names that the function in EXERCISES gives them.

    Raises:
        ExerciseError: for answers that are None or wrong.
    """
    expect, name = EXERCISES[notebook][number - 1], f"exercise {number} of {len(EXERCISES[notebook])}"
    try:
        for answer in getfullargspec(expect).args:
            if given[answer] is None:
                raise ExerciseError(f"not done yet: `{answer}` is None")
        shows = expect(**given)
    except ExerciseError as error:
        wrong = str(error)
    except Exception as error:  # whatever an answer of another kind, or a function that is one, raises
        wrong = f"hint: with your answer comes {format_exception_only(error)[-1].strip()}"
    else:
        _right.add((notebook, number))
        print(f"✓ {name}: right. {shows}")
        return
    raise ExerciseError(f"✗ {name}: {wrong}. {STOPPED}.")


_right: set[tuple[str, int]] = set()  # what was answered rightly in this kernel


def finish(notebook: str) -> None:
    """Say at a notebook's end how many of its exercises were answered rightly.

    Args:
        notebook: its name, such as "00_tour".
    """
    right, of = sum(name == notebook for name, _ in _right), len(EXERCISES[notebook])
    print(f"{'✓' if right == of else '✗'} {notebook}: {right} of {of} exercises right")


def compare_guess(guess: object, measured: object) -> None:
    """Print what was measured next to what a reader has guessed, where there is a guess.

    Args:
        guess: the reader's, or None.
        measured: to be compared with it.
    """
    print(f"measured: {measured}; {'no guess yet' if guess is None else f'your guess: {guess}'}")


def _need(right: bool, hint: str) -> None:
    if not right:
        raise ExerciseError(f"hint: {hint}")


def _is(answer: object, number: int) -> bool:
    return np.ndim(answer) == 0 and answer == number  # a column of comparisons is not their count


# One function for each exercise: its answers come first, what they are held against is given by name. It gives a
# sentence on what a right answer shows.


def _batch_sizes(singly: Evaluation, same: int, *, batched: Evaluation, images: Dataset) -> str:
    _need(list(singly.rows["file"]) == images.files[:64], "limit=64 takes the first 64 images")
    _need(singly.metrics["device_batch_size"] == 1, "device_batch_size=1 makes batches of one image")
    equal = int((singly.rows["predicted_1"] == batched.rows["predicted_1"]).sum())
    _need(_is(same, equal), "== compares two columns predicted_1 row by row; count where it holds")
    read = batched.rows["predicted_1"].notna().sum()
    _need(equal >= read - 1, "the batch size must not change answers (but for a near tie)")
    one, eight = (f"{run.metrics['images_per_s']:.1f} images/s" for run in (singly, batched))
    return f"{equal} of {len(batched.rows)} answers are the same; {one} in batches of 1, {eight} in batches of 8"


def _index_of_id(index_of_id: dict[int, int], *, devkit: Devkit) -> str:
    _need(hasattr(index_of_id, "get"), "a dict from ID to index, {1: …, 2: …, 3: …}")
    index = {synset.id: k for k, synset in enumerate(devkit.synsets)}
    off = [id for id in (1, 2, 3) if index_of_id.get(id) != index[id]]
    _need(not off, f"wrong for the IDs {off}; an index counts the wnids in alphabetical order, from 0")
    return "An ID says nothing of the index; only the wnid ties them together"


def _still_right(still_right: int, *, devkit: Devkit) -> str:
    equal = sum(id - 1 == label for id, label in zip(devkit.ground_truth, devkit.labels, strict=True))
    _need(_is(still_right, equal), "count the images whose ID - 1 is their index")
    return f"{equal} of {len(devkit.labels)} labels ({equal / len(devkit.labels):.1%}) would be right, by luck"


def _own_engine(infer: object, *, base: type[Engine], model: Model, images: Dataset, count: int) -> str:
    engine, in_order = type("MyEngine", (base,), {"_infer": infer})(model, "fp32"), []
    order = {"memory_format": torch.channels_last}
    engine.module.register_forward_pre_hook(lambda _, x: in_order.append(x[0].is_contiguous(**order)))
    report = verify(engine, model, images, images=count, progress=False)
    found = "".join(report.failures[:1])
    _need(report.ok, f"scale the pixels to 0 … 1, normalise with self.mean and self.std, return the logits; {found}")
    _need(all(in_order), "bring x into channels-last order with .contiguous(…) before the model")
    return f"`verify` takes your engine for the model:\n{report}"


def _best_batch(rates: dict[int, float], tuned: Evaluation, *, right: pd.DataFrame) -> str:
    _need(hasattr(rates, "get") and {1, 4, 16} <= set(rates), "the keys are the batch sizes 1, 4 and 16")
    _need(all(isinstance(each, int | float) for each in rates.values()), 'a rate is a number: (…)["images_per_s"]')
    best = max(rates, key=rates.get)
    _need(tuned.metrics["device_batch_size"] == best, f"by your `rates`, {best} is the best size")
    _need(list(tuned.rows["file"]) == list(right["file"]), "**few takes the images of section 6")
    changed = int((tuned.rows["predicted_1"] != right["predicted_1"]).sum())
    _need(changed <= max(1, 0.01 * len(right)), "another batch size rounds differently, but keeps the answers")
    said = ", ".join(f"{rate:.1f} in batches of {size}" for size, rate in rates.items())
    return f"images/s: {said}; {changed} of {len(right)} answers changed, top-1 {tuned.metrics['top1']:.1%}"


def _steps(steps: int, last: int, *, three: Evaluation) -> str:
    counted, images = three.metrics["replicas"]["step_ms"]["count"], len(three.rows)
    _need(_is(steps, counted), "a step is device_batch_size x 3 images, and what is left over is a step too")
    left = images - (counted - 1) * 3 * three.metrics["device_batch_size"]
    _need(_is(last, left), "what the steps before it have not done is left for the last one")
    return f"The run counted {counted} steps too, the last one of {left} images"


def _latency(predicted_ms: object, *, bandwidth: float) -> str:
    row = dict(engine="onnx", precision="fp32", batch=4, flops_per_image=5e9, roof_tflops=2, parameters=1)
    many = {"parameters": 0.02 * bandwidth}  # so many that reading them takes longer than computing

    def near(expected: float, **changes: object) -> bool:
        return abs(predicted_ms(pd.Series(row | changes)) - expected) < 0.01

    _need(near(10), "4 x 5e9 operations at 2e12 per second take 10 ms")
    _need(near(10.8, engine="eager"), "eager's 80 operations add 80 x 10 µs = 0.8 ms")
    for precision, size in {"fp32": 4, "bf16": 2, "int8": 1}.items():
        hint = f"a weight has {size} bytes in {precision}; the longer of the two times counts"
        _need(near(20 * size, precision=precision, **many), hint)
    _need(near(80.8, engine="eager", **many), "eager's 0.8 ms are added to the longer time")
    return "It predicts the made-up rows; the next cells hold it against a real one"


def _hunt(suspects: dict[str, str], *, game: Hunt) -> str:
    _need(not (hint := game.hint(suspects)), hint)
    return f"All {len(game.bugs)} bugs found; you asked {len(game.asked)} checks"


def _hidden(stays: dict[str, float], *, model: Model, engine: Engine, images: Dataset, few: Iterable[int]) -> str:
    _need(hasattr(stays, "get"), 'a dict of two shares, {"most": …, "least": …}')
    preprocessing = model.info.preprocessing
    crops = torch.stack([crop_picture(images.files[i], images[i].image, preprocessing) for i in few])
    answers = engine(crops).argmax(dim=1)
    flows = torch.cat([rollout(model, attention_maps(model, crop[None])) for crop in crops])
    for which, turn in (("most", 1), ("least", -1)):
        grey = [mask_patches(model, x, most_looked_at(flow)[::turn][:60]) for x, flow in zip(crops, flows, strict=True)]
        share = (engine(torch.stack(grey)).argmax(dim=1) == answers).float().mean().item()
        hint = f"{which}: hide the first 60 of most_looked_at(…)[::{turn}]; a share is a count / len(few)"
        _need(abs(stays.get(which, -1) - share) < 1.5 / len(crops), hint)
    most, least = (f"{stays[which]:.0%}" for which in ("most", "least"))
    return f"The answer stays for {most} of the images with what is looked at most hidden, for {least} with the least"


def _order(right_map: str, equal: int, *, engine: Engine, data: Dataset) -> str:
    _need(right_map != "numbers", "with numbers, class 1 would be output 1; but the first output is 0")
    _need(right_map in ("sorted", "natural"), "sorted or natural")
    runs = {how: evaluate(engine, data, class_map=how, progress=False) for how in ("sorted", "natural")}
    correct = {how: run.metrics["correct"] for how, run in runs.items()}
    _need(correct[right_map] == max(correct.values()), "evaluate with both; the right order has the higher top-1")
    rows = runs["sorted"].rows
    alike = rows.loc[rows["label"] == runs["natural"].rows["label"], "class_id"].nunique()
    _need(_is(equal, alike), "count classes, not images, for which .data.labels of both runs are equal")
    return "top-1 " + ", ".join(f"{run.metrics['top1']:.1%} with {how}" for how, run in runs.items())


EXERCISES = {  # notebook -> its exercises in order
    "00_tour": (_batch_sizes,),
    "01_dataset": (_index_of_id, _still_right),
    "02_convert": (_own_engine,),
    "03_single_device": (_best_batch,),
    "04_data_parallel": (_steps,),
    "05_benchmark": (_latency,),
    "06_explore": (_hunt, _hidden),
    "07_your_own": (_order,),
}
