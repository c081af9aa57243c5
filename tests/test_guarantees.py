"""Each fault and each attack has tests, a negative control, and a row in docs/guarantees.md."""

import ast
from pathlib import Path

import pytest

from tests.support.service import ROOT
from tests.support.torture import row_of, rows

ROWS = [f"F{number}" for number in range(1, 26)] + [f"S{number}" for number in range(1, 18)]
ROWS += ["F27", "F28", "F29", "F30", "F31", "S18"]
MODULES: dict[str, list[Path]] = {}
for path in sorted((ROOT / "tests").glob("*/test_*.py")):
    if row := row_of(path.as_posix()):
        MODULES.setdefault(str(row), []).append(path)


def names_of_tests(path: Path) -> list[str]:
    """Return the names of a module's tests."""
    return [
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    ]


@pytest.mark.parametrize("row", ROWS)
def test_each_row_has_tests_and_negative_controls(row: str) -> None:
    """A negative control runs the same test against something weaker, and must fail there."""
    names = [name for path in MODULES[row] for name in names_of_tests(path)]
    controls = [name for name in names if name.startswith("test_control_")]

    assert controls
    assert len(names) > len(controls)


def test_the_documentation_links_every_module_of_faults_and_attacks() -> None:
    """No row links the Schemathesis module, which tests the whole API and no single attack."""
    modules = {
        path.relative_to(ROOT / "tests").as_posix()
        for folder in ("faults", "attacks")
        for path in (ROOT / "tests" / folder).glob("test_*.py")
    }

    assert set(rows()) == modules - {"attacks/test_schemathesis.py"}
