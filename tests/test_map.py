"""The map holds: floors import only what is below, and everything is named where it should be."""

import ast
import re
from pathlib import Path

import pytest

from app.main import create_app
from app.settings import Settings
from app.tasks import registry
from tests.support.service import ROOT

# The floors, lowest first. Those on one floor do not know each other.
FLOORS = [
    {"listening"},
    {"mail", "uploads", "shutdown"},
    {"settings"},
    {"tasks", "observability"},
    {"api"},
    {"hardening"},
    {"main", "server"},
    {"__main__"},
]
SOURCES = sorted((ROOT / "app").rglob("*.py"))
LIBRARY = sorted((ROOT / "afterward").rglob("*.py"))


def floor(package: str) -> int:
    """How high a package stands."""
    return next(height for height, packages in enumerate(FLOORS) if package in packages)


def imports(path: Path) -> set[str]:
    """The packages and modules directly below app that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("app.")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    """A file imports its own package, and packages on lower floors."""
    package = path.relative_to(ROOT / "app").parts[0].removesuffix(".py")
    if package != "__init__":
        for imported in imports(path) - {package}:
            assert floor(imported) < floor(package), f"{package} imports {imported}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_imports_nothing_of_the_service(path: Path) -> None:
    assert imports(path) == set()


@pytest.mark.parametrize("path", SOURCES + LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is_for(path: Path) -> None:
    """In the first line of its docstring."""
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize(
    "package",
    [
        "afterward",
        "afterward/engines/postgres",
        "afterward/engines/sqlite",
        "afterward/fastapi",
        "app/api",
        "app/api/routes",
        "app/hardening",
        "app/mail",
        "app/observability",
        "app/tasks",
        "app/uploads",
    ],
)
def test_the_map_of_a_package_names_its_modules(package: str) -> None:
    """Its docstring is its map."""
    folder = ROOT / package
    words = set(re.findall(r"\w+", (folder / "__init__.py").read_text()))

    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} <= words


def test_the_catalogue_names_every_durable_task() -> None:
    """Every public coroutine in app/tasks whose first parameter is a Context."""
    found = {
        node.name
        for path in (ROOT / "app" / "tasks").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.AsyncFunctionDef)
        and node.args.args
        and isinstance(node.args.args[0].annotation, ast.Name)
        and node.args.args[0].annotation.id == "Context"
        and not node.name.startswith("_")
    }

    assert set(registry(Settings(_env_file=None))) == found


def test_every_route_keeps_its_promises() -> None:
    """Those that may promise something have the route class that commits it."""
    app = create_app(Settings(_env_file=None))
    document = app.openapi()

    assert {"/send-notification/{email}", "/upload", "/tasks/{task_id}"} <= set(document["paths"])
    for path in SOURCES:
        text = path.read_text()
        if "DurableTasks" in text and "APIRouter(" in text:
            assert "route_class=ServiceRoute" in text, path
