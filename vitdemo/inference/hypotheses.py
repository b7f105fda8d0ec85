"""The usual mistakes that cost accuracy: each is put right in turn, and the same images are counted again."""

from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.stats import binomtest
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from tqdm.auto import tqdm

from vitdemo.conversion.engines.contract import Engine, EngineFailure
from vitdemo.conversion.engines.eager import EagerEngine
from vitdemo.conversion.models import Model
from vitdemo.dataset.imagenet import ImageNetVal, Sample
from vitdemo.dataset.images import Preprocessing, prefetched_batches
from vitdemo.errors import reason_of
from vitdemo.inference.relabelling import Numbering, other_orders
from vitdemo.measure.clock import cores, now

NORMALISATIONS = {
    "with ImageNet's mean/std": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "with mean/std 0.5": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "with CLIP's mean/std": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}
OTHER_CROP = {"center": ("squash", 1.0), "squash": ("center", 0.9)}  # crop_pct of Hugging Face's and of timm's ViT
FLAT = "labels of a flat folder"
EXTRACT = "get the labels anew with vitdemo extract, from the original archives"


@dataclass(frozen=True)
class Hypothesis:
    """One mistake put right; ``name`` says what was changed.

    correct, before: bool[images], which images are right with the mistake put right, and which without; None where
    it was not tested, and ``not_tested`` says why. cure: what to do if this is it. took_s: the seconds that its answers
    took, 0 for those that were only counted anew.
    """

    name: str
    cure: str
    correct: np.ndarray | None = None
    before: np.ndarray | None = None
    took_s: float = 0.0
    not_tested: str = ""

    @property
    def gained(self) -> int:
        """Images that were wrong before and are right now."""
        return int((self.correct & ~self.before).sum())

    @property
    def lost(self) -> int:
        """Images that were right before and are wrong now."""
        return int((self.before & ~self.correct).sum())

    @property
    def p(self) -> float:
        """McNemar's exact test on these images, one-sided: only a better accuracy explains a loss."""
        changed = self.gained + self.lost
        return float(binomtest(self.gained, changed, alternative="greater").pvalue) if changed else 1.0


class Spread:
    """``images`` samples of ``data`` (all if it has fewer), evenly spread over it."""

    def __init__(self, data: ImageNetVal, images: int):
        count = min(images, len(data))
        self._data = data
        self._indices = [i * len(data) // count for i in range(count)]
        self.files = [data.files[i] for i in self._indices]
        self.labels = [data.labels[i] for i in self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, k: int) -> Sample:
        return self._data[self._indices[k]]


@dataclass
class Run:
    """An engine and the crops it is given, which is ``crop`` in all but mean and std; those lie in the engine.

    answers: int[images], the index of the largest logit, -1 for an unreadable image. took_s: with the decoding, where
    no run before it had decoded the same crops.
    """

    name: str
    cure: str
    engine: Engine
    crop: Preprocessing
    swap_channels: bool = False
    answers: list[int] = field(default_factory=list)
    took_s: float = 0.0


def planned_runs(engine: Engine, model: Model) -> list[Run]:
    """The engine as it is, the eager fp32 reference of ``model``, then that reference with each other preprocessing."""
    usual = model.info.preprocessing

    def reference(preprocessing: Preprocessing) -> Engine:
        changed = Model(model.module, replace(model.info, preprocessing=preprocessing))
        return EagerEngine(changed, "fp32", device=engine.device, threads=engine.threads)

    eager = reference(usual)
    mode, crop_pct = OTHER_CROP[usual.crop_mode]
    cure = "give the model a Preprocessing with {}"
    swap_cure = "the weights expect blue first: swap the channels of the patch embedding's weights"
    return [
        Run("as it is", "", engine, usual),
        Run("on the reference engine", "the conversion loses it: vitdemo verify says where", eager, usual),
        *(
            Run(name, cure.format(f"mean={mean}, std={std}"), reference(replace(usual, mean=mean, std=std)), usual)
            for name, (mean, std) in NORMALISATIONS.items()
            if (usual.mean, usual.std) != (mean, std)
        ),
        Run("with red and blue swapped", swap_cure, eager, usual, swap_channels=True),
        Run(
            f"with crop mode {mode}",
            cure.format(f"crop_mode={mode!r}, crop_pct={crop_pct}"),
            eager,
            replace(usual, crop_mode=mode, crop_pct=crop_pct),
        ),
    ]


def answer(runs: list[Run], sample: Spread, device_batch_size: int, progress: bool) -> int:
    """Fill in the runs' answers; the number of unreadable images. Crops that runs share are decoded once."""
    unreadable = 0
    with tqdm(total=len(sample) * len(runs), unit="image", disable=not progress, desc="diagnose") as bar:
        for crop in dict.fromkeys(run.crop for run in runs):
            sharing, start, unreadable = [run for run in runs if run.crop == crop], now(), 0
            batches = prefetched_batches(sample, range(len(sample)), crop, device_batch_size, workers=cores())
            with closing(batches):
                for batch in batches:
                    readable = np.array([not error for error in batch.errors])
                    unreadable += int((~readable).sum())
                    for run in sharing:
                        run.answers += np.where(readable, _answers(run, batch.pixels), -1).tolist()
                        run.took_s, start = run.took_s + now() - start, now()
                        bar.update(len(readable))
    return unreadable


def _answers(run: Run, pixels: torch.Tensor) -> np.ndarray:
    try:
        return run.engine(pixels.flip(1) if run.swap_channels else pixels).argmax(1).numpy()
    except Exception as error:  # each runtime has its own
        raise EngineFailure(f"the {run.engine.name} engine failed in a diagnosis: {reason_of(error)}") from error


def preprocessing_hypotheses(runs: list[Run], labels: np.ndarray) -> list[Hypothesis]:
    """What each of ``planned_runs`` says: another preprocessing against the reference, that against the engine."""
    own, reference, *others = ((run, np.array(run.answers) == labels) for run in runs)
    pairs = [*((run, reference[1]) for run in others), (reference, own[1])]
    return [Hypothesis(run.name, run.cure, correct, before, run.took_s) for (run, correct), before in pairs]


def order_hypotheses(
    answers: np.ndarray, labels: np.ndarray, data: ImageNetVal, numbering: Numbering
) -> list[Hypothesis]:
    """The outputs, or the labels, stand in another order than that of the wnids; told by counting anew."""
    hypotheses = []
    for name, ranks in other_orders(data, numbering).items():
        outputs = (f"outputs read in {name}", "put the rows of the model's last layer into the order of the wnids")
        wrong_labels = (f"labels read in {name}", EXTRACT)
        if ranks is None or (ranks == np.arange(len(ranks))).all():
            reason = numbering.missing if ranks is None else "it is the order of the wnids"
            hypotheses += [Hypothesis(*both, not_tested=reason) for both in (outputs, wrong_labels)]
            continue
        before = answers == labels
        hypotheses.append(Hypothesis(*outputs, answers == ranks[labels], before))
        hypotheses.append(Hypothesis(*wrong_labels, answers == np.argsort(ranks)[labels], before))
    return hypotheses


def devkit_hypothesis(answers: np.ndarray, sample: Spread, data: ImageNetVal, numbering: Numbering) -> Hypothesis:
    """The labels are not those that the devkit has for these files, for whatever reason."""
    name = FLAT if is_flat(data) else "labels read from the devkit"
    if numbering.truth is None:
        return Hypothesis(name, EXTRACT, not_tested=numbering.missing)
    truth = [numbering.truth.get(file) for file in sample.files]
    if None in truth:
        return Hypothesis(name, EXTRACT, not_tested="the devkit here has no label for these files")
    if truth == sample.labels:
        return Hypothesis(name, EXTRACT, not_tested="the labels are the devkit's")
    return Hypothesis(name, EXTRACT, answers == np.array(truth), answers == np.array(sample.labels))


def is_flat(data: ImageNetVal) -> bool:
    """Whether all images carry one label, as those of a folder without classes do, though there are more classes."""
    return len(set(data.labels)) == 1 < min(len(data), len(data.classes))
