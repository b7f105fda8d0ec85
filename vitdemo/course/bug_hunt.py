"""The bug hunt: runs with one planted bug each, under names that say nothing, and which check must find which bug."""

from collections.abc import Callable
from dataclasses import dataclass, field
from string import ascii_uppercase

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from vitdemo.course.buggy_scripts import BUGS, IMAGES, NEEDS_ENGINE, SEEN_BY, BuggyRun, buggy_run
from vitdemo.dataset.dataset import Dataset
from vitdemo.errors import VitdemoError
from vitdemo.evaluation.diagnosis import diagnose
from vitdemo.evaluation.evaluation import calibrated_on_scored
from vitdemo.evaluation.metrics import set_faults
from vitdemo.models.model import Model
from vitdemo.stats import paid_once, unaccounted_s

NO_BUG = "no bug"
DIAGNOSED = 60  # images; the mean and std of other weights cost a fifth of them, which is more than luck
MOSTLY = 0.5  # of the time: far more than a slow moment of the machine


def _calibration(run: BuggyRun) -> str:
    seen = calibrated_on_scored(run.engine, run.data, IMAGES)
    return f"{seen} of the {IMAGES} scored images were seen in calibration" if seen else ""


def _mostly(share: float, what: str) -> str:
    return f"{share:.0%} of {what}" if share > MOSTLY else ""


CHECKS: dict[str, Callable[[BuggyRun], str]] = {  # the library's function -> what it finds in a run, "" for nothing
    "set_faults": lambda run: set_faults(run.files, run.data.files[:IMAGES]),
    "calibrated_on_scored": _calibration,
    "paid_once": lambda run: _mostly(paid_once(run.step_s), "the time was paid once, by the first batch"),
    "unaccounted_s": lambda run: _mostly(
        unaccounted_s(run.wall_s, run.step_s) / run.wall_s, "the loop's time is not in the times of its batches"
    ),
    "diagnose": lambda run: diagnose(run.engine, run.model, run.data, images=DIAGNOSED, progress=False).named or "",
}


@dataclass(frozen=True)
class Hunt:
    """Runs by name, NO_BUG's first. bugs: which bug each of the others has: the solution. asked: what the checks that
    were asked have said, by check and run; "" where a check found nothing."""

    runs: dict[str, BuggyRun]
    bugs: dict[str, str]
    asked: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def reports(self) -> pd.DataFrame:
        """The numbers that each script prints, one row per run."""
        printed = pd.DataFrame({name: run.report for name, run in self.runs.items()}).T
        return printed.astype({"images": int, "correct": int})

    def score(self, suspects: dict[str, str | None]) -> str:
        """How many runs are given their bug; or a name that there is not.

        Args:
            suspects: name of a run -> name of a bug, or None.
        """
        for name, bug in suspects.items():
            if bug is not None and name not in self.bugs:
                return f"{name!r} is no run of this hunt"
            if bug is not None and bug not in BUGS:
                return f"{name}: {bug!r} is none of the {len(BUGS)}; take a name from BUGS"
        right = sum(suspects.get(name) == bug for name, bug in self.bugs.items())
        return f"{right} of {len(self.bugs)} are right"

    def ask(self, check: str, run: str) -> str:
        """The answer of one check of the library to one run, in a line.

        Args:
            check: a name of CHECKS.
            run: a name of ``runs``.

        Raises:
            VitdemoError: for a check or a run that is not there.
        """
        for name, known in ((check, CHECKS), (run, self.runs)):
            if name not in known:
                raise VitdemoError(f"bug hunt: there is no {name!r}; there are {', '.join(known)}")
        return f"{run}, {check}: {self._says(check, run) or 'nothing found'}"

    def _says(self, check: str, run: str) -> str:
        if (check, run) not in self.asked:
            self.asked[check, run] = CHECKS[check](self.runs[run])
        return self.asked[check, run]

    def transcript(self) -> pd.DataFrame:
        """Of each run the first of CHECKS that finds something, and what it says; "" where none does."""
        rows = {}
        for run in self.runs:
            check = next((check for check in CHECKS if self._says(check, run)), "")
            rows[run] = {"check": check, "says": check and self._says(check, run)}
        return pd.DataFrame.from_dict(rows, orient="index")

    def hint(self, suspects: dict[str, str | None]) -> str:
        """Of which run to think again, and which check to ask; "" where each run has its own bug.

        Args:
            suspects: name of a run -> name of a bug, or None.
        """
        wrong = next((name for name, bug in self.bugs.items() if suspects.get(name) != bug), None)
        return f"{self.score(suspects)}; {wrong}: ask {SEEN_BY[self.bugs[wrong]]}" if wrong else ""


def hunt(model: Model, data: Dataset, seed: int = 0) -> Hunt:
    """One ``buggy_run`` without a bug and one with each of BUGS.

    Args:
        model: as in ``buggy_run``.
        data: as in ``buggy_run``.
        seed: shuffles the order of the bugs.

    Raises:
        VitdemoError: as ``buggy_run`` does; but a bug whose engine is not installed is left out, and said.
    """
    made = {None: buggy_run(model, data)}
    for bug in tqdm(BUGS, desc="hunt", unit="run"):
        try:
            made[bug] = buggy_run(model, data, bug)
        except VitdemoError as error:
            if bug not in NEEDS_ENGINE:
                raise
            tqdm.write(f"left out, {bug}: {error}")
    order = np.random.default_rng(seed).permutation([bug for bug in BUGS if bug in made]).tolist()
    bugs = {f"run {letter}": bug for letter, bug in zip(ascii_uppercase, order, strict=False)}
    return Hunt({name: made[bugs.get(name)] for name in (NO_BUG, *bugs)}, bugs)
