"""Every fault and every attack has tests, a negative control, and a line in the documentation."""

import ast
from pathlib import Path

import pytest

from tests.support.service import ROOT
from tests.support.torture import row_of, rows

ROWS = [f"F{number}" for number in range(1, 26)] + [f"S{number}" for number in range(1, 18)]
ROWS += ["F27", "F28", "F29", "S18"]
MODULES: dict[str, list[Path]] = {}
for path in sorted((ROOT / "tests").glob("*/test_*.py")):
    if row := row_of(path.as_posix()):
        MODULES.setdefault(str(row), []).append(path)


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
    names = [name for path in MODULES[row] for name in names_of_tests(path)]
    controls = [name for name in names if name.startswith("test_control_")]

    assert controls
    assert len(names) > len(controls)


def test_the_documentation_names_every_module_and_no_other() -> None:
    """But the one of Schemathesis, which asks for everything and is about no single attack."""
    modules = {
        path.relative_to(ROOT / "tests").as_posix()
        for folder in ("faults", "attacks")
        for path in (ROOT / "tests" / folder).glob("test_*.py")
    }

    assert set(rows()) == modules - {"attacks/test_schemathesis.py"}
