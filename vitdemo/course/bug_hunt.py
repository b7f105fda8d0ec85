"""The bug hunt: runs with one planted bug each, under names that say nothing, and which check must find which bug."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
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


def _first_batch(run: BuggyRun) -> str:
    share = paid_once(run.step_s)
    return f"{share:.0%} of the time was paid once, by the first batch" if share > MOSTLY else ""


def _whole_loop(run: BuggyRun) -> str:
    share = unaccounted_s(run.wall_s, run.step_s) / run.wall_s
    return f"{share:.0%} of the loop's time is not in the times of its batches" if share > MOSTLY else ""


CHECKS: dict[str, Callable[[BuggyRun], str]] = {  # the library's function -> what it finds in a run, "" for nothing
    "set_faults": lambda run: set_faults(run.files, run.data.files[:IMAGES]),
    "calibrated_on_scored": _calibration,
    "paid_once": _first_batch,
    "unaccounted_s": _whole_loop,
    "diagnose": lambda run: diagnose(run.engine, run.model, run.data, images=DIAGNOSED, progress=False).named or "",
}


@dataclass(frozen=True)
class Hunt:
    """Runs by name, NO_BUG's first. bugs: which bug each of the others has: the solution."""

    runs: dict[str, BuggyRun]
    bugs: dict[str, str]

    @property
    def reports(self) -> pd.DataFrame:
        """What each script prints, one row per run."""
        printed = pd.DataFrame({name: run.report for name, run in self.runs.items()}).T
        return printed.astype({"images": int, "correct": int})

    def findings(self, *checks: str, runs: Iterable[str] | None = None) -> pd.DataFrame:
        """What the library's checks say of the runs: one row per run, one column per check, "" where nothing.

        Args:
            checks: names of CHECKS.
            runs: names of runs; None is all.

        Raises:
            VitdemoError: for a check or a run that is not there.
        """
        names = list(self.runs if runs is None else runs)
        for given, known in ((checks, CHECKS), (names, self.runs)):
            for name in given:
                if name not in known:
                    raise VitdemoError(f"bug hunt: there is no {name!r}; there are {', '.join(known)}")
        found = {name: {check: CHECKS[check](self.runs[name]) for check in checks} for name in names}
        return pd.DataFrame.from_dict(found, orient="index", columns=list(checks))

    def hint(self, suspects: dict[str, str | None]) -> str:
        """Of which run to think again, and which check to ask; "" where each run has its own bug.

        Args:
            suspects: name of a run -> name of a bug, or None.
        """
        for name in suspects:
            if name not in self.bugs:
                return f"{name!r} is no run of this hunt"
            if suspects[name] is not None and suspects[name] not in BUGS:
                return f"{name}: {suspects[name]!r} is none of the {len(BUGS)}; take a name from BUGS"
        wrong = [name for name, bug in self.bugs.items() if suspects.get(name) != bug]
        if not wrong:
            return ""
        right = len(self.bugs) - len(wrong)
        return f"{right} of {len(self.bugs)} are right; {wrong[0]}: see what {SEEN_BY[self.bugs[wrong[0]]]} says of it"


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
