"""The architecture: which package may import which, and the docstrings that list the modules."""

import ast
import re
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from app.main import create_app
from app.settings import Settings
from app.tasks import registry
from tests.support.service import ROOT

# The layers, lowest first. Packages of the same layer do not import each other.
LAYERS = [
    {"listening", "queue_url"},
    {"mail", "uploads", "shutdown"},
    {"settings"},
    {"tasks", "observability"},
    {"api"},
    {"board"},
    {"hardening"},
    {"main", "server", "terminal"},
    {"__main__"},
]
SOURCES = sorted((ROOT / "app").rglob("*.py"))
LIBRARY = sorted((ROOT / "afterward").rglob("*.py"))


def layer(package: str) -> int:
    """Return the number of a package's layer; 0 is the lowest."""
    return next(height for height, packages in enumerate(LAYERS) if package in packages)


def imports(path: Path) -> set[str]:
    """Return the packages and modules directly below app that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("app.")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_its_own_package_and_lower_layers(path: Path) -> None:
    package = path.relative_to(ROOT / "app").parts[0].removesuffix(".py")
    if package != "__init__":
        for imported in imports(path) - {package}:
            assert layer(imported) < layer(package), f"{package} imports {imported}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_imports_nothing_of_the_service(path: Path) -> None:
    assert imports(path) == set()


def test_service_and_examples_use_public_names_of_the_library_only() -> None:
    """The public modules are those that the library's docstring names as such."""
    public = {"afterward", "afterward.fastapi"}
    docstring = ast.get_docstring(ast.parse((ROOT / "afterward" / "__init__.py").read_text())) or ""
    last_paragraph = docstring.rpartition("\n\n")[2]
    public |= {f"afterward.{name}" for name in re.findall(r"`(\w+)`", last_paragraph)}
    used = [
        (path, node.module, alias.name)
        for path in [*SOURCES, *sorted((ROOT / "examples").glob("*.py"))]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "afterward"
        for alias in node.names
    ]

    assert used
    for path, module, name in used:
        assert module in public, f"{path} imports {module}"
        assert not name.startswith("_"), f"{path} imports {module}.{name}"


@pytest.mark.parametrize("path", SOURCES + LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.thorough
def test_every_file_has_a_docstring(path: Path) -> None:
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
        "app/board",
        "app/hardening",
        "app/mail",
        "app/observability",
        "app/tasks",
        "app/terminal",
        "app/uploads",
    ],
)
def test_the_docstring_of_a_package_names_its_modules(package: str) -> None:
    folder = ROOT / package
    words = set(re.findall(r"\w+", (folder / "__init__.py").read_text()))

    missing = {path.stem for path in folder.glob("*.py")} - {"__init__"} - words
    assert not missing, f"the docstring of {package}/__init__.py must list its modules"


@pytest.mark.parametrize(
    ("package", "the_list"),
    [("app/api/routes", "app/main.py"), ("app/board", "app/board/__init__.py")],
)
def test_the_app_has_the_routes_of_every_module(package: str, the_list: str) -> None:
    modules = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for path in (ROOT / package).glob("*.py")
        if "APIRouter(" in path.read_text()
    }

    assert modules, package
    assert modules <= _modules_of_routes(), f"add the module to ROUTERS in {the_list}"


@pytest.mark.parametrize("path", sorted((ROOT / "app/board").glob("*.py")), ids=lambda p: p.stem)
@pytest.mark.thorough
def test_a_page_reads_a_task_by_shown_task(path: Path) -> None:
    """Otherwise a page could forget HIDE_ARGUMENTS."""
    others = r"hide_arguments|\bfind_task\b|\bExistingTask\b|\b(queue|engine)\.get\("
    if path.stem != "shown_task":
        assert not re.search(others, path.read_text()), "read the task by app.board.shown_task"


def _modules_of_routes() -> set[str]:
    """Return the names of the modules that define the app's routes."""
    routes = create_app(Settings(_env_file=None)).routes
    return {route.endpoint.__module__ for route in routes if isinstance(route, APIRoute)}


def test_the_registry_has_every_durable_task() -> None:
    """A durable task is a public coroutine in app/tasks with a Context as its first parameter."""
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

    named = set(registry(Settings(_env_file=None)))
    assert named == found, "name the task in `registry`, in app/tasks/__init__.py"


def test_every_route_with_durable_tasks_commits_them_before_its_response() -> None:
    """Its router has the route class ServiceRoute, which makes the commit."""
    app = create_app(Settings(_env_file=None))
    document = app.openapi()

    assert {"/send-notification/{email}", "/upload", "/tasks/{task_id}"} <= set(document["paths"])
    for path in SOURCES:
        text = path.read_text()
        if "DurableTasks" in text and "APIRouter(" in text:
            assert "route_class=ServiceRoute" in text, path
