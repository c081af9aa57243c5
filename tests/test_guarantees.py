"""Every fault and every attack has tests, a negative control, and a line in the documentation."""

import ast
from pathlib import Path

import pytest

from tests.support.service import ROOT
from tests.support.torture import row_of

ROWS = [f"F{number}" for number in range(1, 25)] + [f"S{number}" for number in range(1, 18)]
MODULES = {
    str(row): path
    for folder in ("faults", "attacks")
    for path in sorted((ROOT / "tests" / folder).glob("test_*.py"))
    if (row := row_of(path.as_posix()))
}


def names_of_tests(path: Path) -> list[str]:
    """The names of a module's tests."""
    return [
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    ]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_proved_and_its_proof_can_fail(row: str) -> None:
    """It has tests, and negative controls: the same against something weaker."""
    names = names_of_tests(MODULES[row])
    controls = [name for name in names if name.startswith("test_control_")]

    assert controls
    assert len(names) > len(controls)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_in_the_documentation(row: str) -> None:
    """With the module that proves it."""
    path = MODULES[row].relative_to(ROOT)
    lines = (ROOT / "docs" / "guarantees.md").read_text().splitlines()

    assert any(line.startswith(f"| {row} |") and f"({Path('..') / path})" in line for line in lines)
