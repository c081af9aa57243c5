"""The rows of tests/faults and tests/attacks: long forms, and the table that `make torture` prints.

docs/guarantees.md gives each module its row: test_smtp_at_any_stage.py is row F6. A test whose name
begins with `test_control_` is a negative control: it shows that the row's other tests could fail.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import pytest

LONG = bool(os.environ.get("TORTURE"))

NumberT = TypeVar("NumberT", int, float)
Tried = Callable[[str, str], None]

_GUARANTEES = Path(__file__).parents[2] / "docs" / "guarantees.md"
_ROW = re.compile(r"(?m)^\| ([FS])(\d+) \|(.+)$")
_MODULE = re.compile(r"tests/((?:faults|attacks)/test_(\w+)\.py)")
_PROPERTY = "tried"


def form(short: NumberT, long: NumberT) -> NumberT:
    """How many, or how long: `short` in `make check`, `long` in `make torture`.

    A requirement on time is the long form, which has a quiet machine. `make check` may meet a busy
    one: there it allows so much more that only what is wrong takes longer.
    """
    return long if LONG else short


@dataclass(frozen=True, slots=True, order=True)
class Row:
    """A line of the list of faults and attacks, by its number."""

    name: str
    number: int
    title: str

    def __str__(self) -> str:
        """As in the list."""
        return f"{self.name}{self.number}"


@cache
def rows() -> dict[str, Row]:
    """The row of each test module, by its path in `tests`, as docs/guarantees.md links them."""
    return {
        path: Row(letter, int(number), stem.replace("_", " "))
        for letter, number, cells in _ROW.findall(_GUARANTEES.read_text())
        for path, stem in _MODULE.findall(cells)
    }


def row_of(path: str) -> Row | None:
    """The row that a test module is about."""
    match = _MODULE.search(path)
    return rows().get(match[1]) if match else None


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Tried:
    """Tells the table what was tried, and what was seen, as in `tried("200 kills", "0 lost")`."""

    def tell(what: str, seen: str) -> None:
        record_property(_PROPERTY, f"{what}: {seen}")
        print(f"{what}: {seen}")

    return tell


def table(reports: Iterable[pytest.TestReport]) -> list[str]:
    """The lines of the table: what was tried for each row, and whether it held."""
    lines = []
    reports_of: dict[Row, list[pytest.TestReport]] = {}
    for report in reports:
        if row := row_of(report.nodeid.partition("::")[0]):
            reports_of.setdefault(row, []).append(report)
    for row, tests in sorted(reports_of.items()):
        proofs = [test for test in tests if not _is_control(test)]
        controls = [test for test in tests if _is_control(test)]
        lines.append(f"{row!s:4} {row.title:45} {_verdict(proofs, 'held')}")
        lines += [f"       {line}" for test in proofs for line in _told(test)]
        lines.append(f"     {'control':45} {_verdict(controls, 'failed as it should')}")
        lines += [f"       {line}" for test in controls for line in _told(test)]
    return lines


def _is_control(report: pytest.TestReport) -> bool:
    return "::test_control_" in report.nodeid


def _verdict(tests: list[pytest.TestReport], word: str) -> str:
    passed = sum(test.outcome == "passed" for test in tests)
    skipped = sum(test.outcome == "skipped" for test in tests)
    parts = [f"{word} in {passed} of {len(tests) - skipped}"]
    return ", ".join(parts + ([f"{skipped} not run here"] if skipped else []))


def _told(report: pytest.TestReport) -> list[str]:
    told = [str(value) for name, value in report.user_properties if name == _PROPERTY]
    if report.outcome == "skipped":
        told.append(f"not run here: {report.longrepr[2]}")  # type: ignore[index]
    elif report.outcome == "failed":
        told.append(f"FAILED: {report.nodeid}")
    return told
