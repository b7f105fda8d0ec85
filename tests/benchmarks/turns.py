"""Variants that take turns in rounds, in one process: their rates and ratios, as lines for people and as a table."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from vitdemo.inference.predictions import write_json
from vitdemo.machine import machine_record, now
from vitdemo.paths import replacing

ROUNDS = 9
Variant = Callable[[], float | int | None]  # its own rate, or how many answers were right, or nothing


@dataclass
class Turns:
    """What became of a variant: its rates, one per round, and how many of how many answers were right, if any."""

    rates: list[float] = field(default_factory=list)
    correct: int | None = None
    images: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


@dataclass
class Part:
    """A part of the table: variants by name, and lines (what, one ratio per round, the least median it is held to)."""

    title: str
    variants: dict[str, Turns]
    lines: list[tuple[str, list[float], float | None]]
    unit: str = "images/s"

    @property
    def missed(self) -> list[str]:
        return [what for what, values, target in self.lines if target and statistics.median(values) < target]

    def __str__(self) -> str:
        shown = [f"{self.title}: median of the rounds (smallest to largest)"]
        for name, turns in self.variants.items():
            accuracy = "" if turns.correct is None else f", top-1 {turns.correct}/{turns.images}"
            low, high = min(turns.rates), max(turns.rates)
            shown.append(f"  {name:40} {turns.median:10,.1f} {self.unit} ({low:,.1f} to {high:,.1f}){accuracy}")
        for what, values, target in self.lines:
            verdict = f", target {target}: {'missed' if what in self.missed else 'met'}" if target else ""
            shown.append(f"  {what}: {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}){verdict}")
        return "\n".join(shown)

    def rows(self) -> list[dict]:
        """One per variant (a rate) and one per line (a ratio)."""
        rows = [
            dict(what=name, unit=self.unit, values=turns.rates, correct=turns.correct, images=turns.images or None)
            for name, turns in self.variants.items()
        ]
        rows += [dict(what=what, unit="ratio", values=values, target=target) for what, values, target in self.lines]
        for row in rows:
            values = row.pop("values")
            row |= dict(median=statistics.median(values), low=min(values), high=max(values), rounds=len(values))
        return [{"part": self.title, **row} for row in rows]


def take_turns(
    variants: dict[str, Variant],
    size: float,
    rounds: int = ROUNDS,
    *,
    scored: bool = False,
    before: Callable[[], object] = lambda: None,
) -> dict[str, Turns]:
    """Every variant once a round, in one order and in the other; the round before them warms up and is not kept.

    size: what a variant goes through, of which its rate is so many per second. scored: whether a whole number that it
    answers is how many were right. before: called before each, off the clock.
    """
    found = {name: Turns() for name in variants}
    for number in tqdm(range(rounds + 1), desc="rounds"):
        for name, run in list(variants.items())[:: -1 if number % 2 else 1]:
            before()
            start = now()
            answer = run()
            rate = answer if isinstance(answer, float) else size / (now() - start)
            if number:
                found[name].rates.append(rate)
            if scored and isinstance(answer, int):
                found[name].correct, found[name].images = answer, size
    return found


def ratio(found: dict[str, Turns], name: str, other: str) -> list[float]:
    """Round by round."""
    return [ours / theirs for ours, theirs in zip(found[name].rates, found[other].rates, strict=True)]


def write_results(table: pd.DataFrame, out: Path) -> None:
    """The table, and the machine's record beside it."""
    with replacing(out) as file:
        table.to_csv(file, index=False)
    write_json(out.with_suffix(".machine.json"), machine_record())
