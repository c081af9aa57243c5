"""Long forms of the tests in tests/faults and tests/attacks, and the table of `make torture`.

docs/guarantees.md links each module to a row: test_smtp_errors_at_every_stage.py, for example, is
row F6. A test with a name that begins with `test_control_` is a negative control: it runs something
weaker, and shows that the row's other tests could fail.
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
    """Return `short` in `make check`, and `long` in `make torture`: a count or a duration.

    For a limit on time, `long` is the real requirement, because `make torture` runs on a quiet
    machine. `make check` may run on a busy machine, so there the limit is far wider: only a defect
    exceeds it.
    """
    return long if LONG else short


@dataclass(frozen=True, slots=True, order=True)
class Row:
    """A row of the tables of faults and attacks in docs/guarantees.md."""

    name: str
    number: int
    title: str

    def __str__(self) -> str:
        """Return the row's label, for example F6."""
        return f"{self.name}{self.number}"


@cache
def rows() -> dict[str, Row]:
    """Return the row of each test module that docs/guarantees.md links, by its path in `tests`."""
    return {
        path: Row(letter, int(number), stem.replace("_", " "))
        for letter, number, cells in _ROW.findall(_GUARANTEES.read_text())
        for path, stem in _MODULE.findall(cells)
    }


def row_of(path: str) -> Row | None:
    """Return the row of a test module, or None."""
    match = _MODULE.search(path)
    return rows().get(match[1]) if match else None


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Tried:
    """A function that adds a line to the table, for example `tried("200 kills", "0 lost")`."""

    def tell(what: str, seen: str) -> None:
        record_property(_PROPERTY, f"{what}: {seen}")
        print(f"{what}: {seen}")

    return tell


def table(reports: Iterable[pytest.TestReport]) -> list[str]:
    """Return the lines of the table: for each row its result, and what its tests tried."""
    lines = []
    reports_of: dict[Row, list[pytest.TestReport]] = {}
    for report in reports:
        if row := row_of(report.nodeid.partition("::")[0]):
            reports_of.setdefault(row, []).append(report)
    for row, tests in sorted(reports_of.items()):
        proofs = [test for test in tests if not _is_control(test)]
        controls = [test for test in tests if _is_control(test)]
        lines.append(f"{row!s:4} {row.title:45} {_verdict(proofs, 'held')}")
        lines += [f"       {line}" for test in proofs for line in _notes(test)]
        lines.append(f"     {'control':45} {_verdict(controls, 'failed as it should')}")
        lines += [f"       {line}" for test in controls for line in _notes(test)]
    return lines


def _is_control(report: pytest.TestReport) -> bool:
    return "::test_control_" in report.nodeid


def _verdict(tests: list[pytest.TestReport], word: str) -> str:
    passed = sum(test.outcome == "passed" for test in tests)
    skipped = sum(test.outcome == "skipped" for test in tests)
    parts = [f"{word} in {passed} of {len(tests) - skipped}"]
    return ", ".join(parts + ([f"{skipped} not run here"] if skipped else []))


def _notes(report: pytest.TestReport) -> list[str]:
    notes = [str(value) for name, value in report.user_properties if name == _PROPERTY]
    if report.outcome == "skipped":
        notes.append(f"not run here: {report.longrepr[2]}")  # type: ignore[index]
    elif report.outcome == "failed":
        notes.append(f"FAILED: {report.nodeid}")
    return notes
