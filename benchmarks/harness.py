"""Contestants take turns, and what they reach is told as ratios: medians, and how far they spread.

Machines are noisy, and each is another: no absolute time means anything elsewhere. What stands
here is how things that were measured within the same seconds compare.
"""

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeVar

T = TypeVar("T")  # what a contestant measures


class Failed(Exception):
    """A measure saw what must not be, such as an answer that is no 202: its figures are void."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several rounds, the least and the most."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """The spread of some values."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Target:
    """The number to reach: at least, or at most."""

    kind: Literal["≥", "≤"]
    number: float

    def is_met_by(self, reached: float) -> bool:
        """Whether it is reached, as printed: to two digits."""
        reached = round(reached, 2)
        return reached >= self.number if self.kind == "≥" else reached <= self.number

    def __str__(self) -> str:
        """As it stands in the table."""
        return f"{self.kind} {self.number:g}"


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table."""

    measure: str  # "P1b"
    what: str  # what was compared, in a few words
    reached: Spread
    unit: str = ""  # none for a ratio
    target: Target | None = None  # none for what is only told beside it
    ours: Spread | None = None  # the figures behind a ratio
    theirs: Spread | None = None
    figures_unit: str = ""  # "requests/s"


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    chart: str  # the chart's title; series of one title share it
    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    x_label: str
    y_label: str


def in_turn(rounds: int, contestants: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Let each contestant measure itself once in each round: A B, B A, A B, and so on.

    The order turns round after each, so that what drifts spoils nobody more than the others.
    """
    figures: dict[str, list[T]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(1, rounds + 1):
        for name in names:
            progress(f"round {number} of {rounds}: {name}")
            figures[name].append(contestants[name]())
        names.reverse()
    progress("")
    return figures


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times theirs ours are, round by round."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def percentile(values: Sequence[float], percent: float) -> float:
    """What so many percent of the values do not exceed."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def compared(
    measure: str,
    what: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    unit: str,
    target: Target | None = None,
) -> Result:
    """The line that tells how many times theirs ours are; `unit` is that of both."""
    return Result(
        measure,
        what,
        ratio(ours, theirs),
        target=target,
        ours=Spread.of(ours),
        theirs=Spread.of(theirs),
        figures_unit=unit,
    )


def progress(doing: str) -> None:
    """Show what is being measured, where somebody looks on."""
    if sys.stderr.isatty():
        print(f"\r{doing:<70}\r", end="", file=sys.stderr, flush=True)
