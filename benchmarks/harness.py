"""Measure contestants in turn, and report ratios of medians with their spread.

Machines differ, and are noisy, so an absolute time means nothing on another machine. A ratio of
figures that were measured within the same seconds does.
"""

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeVar

T = TypeVar("T")  # the type of a contestant's figure


class Failed(Exception):
    """The figures of a measure are invalid, for example because a request was not answered 202."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median, minimum and maximum of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the spread of these values."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Target:
    """A number to reach: at least (≥) or at most (≤)."""

    kind: Literal["≥", "≤"]
    number: float

    def is_met_by(self, reached: float) -> bool:
        """Return whether a figure, rounded to two digits as printed, meets the target."""
        reached = round(reached, 2)
        return reached >= self.number if self.kind == "≥" else reached <= self.number

    def __str__(self) -> str:
        """Return the target as the table shows it."""
        return f"{self.kind} {self.number:g}"


@dataclass(frozen=True, slots=True)
class Result:
    """A line of the table."""

    measure: str  # "P1b"
    what: str  # a short description of the comparison
    reached: Spread
    unit: str = ""  # empty for a ratio
    target: Target | None = None  # None for additional information
    ours: Spread | None = None  # the two figures of the ratio
    theirs: Spread | None = None
    figures_unit: str = ""  # "requests/s"


@dataclass(frozen=True, slots=True)
class Series:
    """A curve of a chart."""

    chart: str  # the chart's title; series with the same title share a chart
    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    x_label: str
    y_label: str


def in_turn(rounds: int, contestants: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Run each contestant once per round, in the order A B, B A, A B, and so on.

    The order is reversed after each round, so that a drift of the machine affects all contestants
    alike. Return the figures of each contestant, by its name.
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
    """Return the spread of ours ÷ theirs over the rounds."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that `percent` percent of the values do not exceed."""
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
    """Return a line with the ratio of ours to theirs. `unit` is the unit of both figures."""
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
    """Show the current step, if standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r{doing:<70}\r", end="", file=sys.stderr, flush=True)
