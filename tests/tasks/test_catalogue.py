"""The catalogue names every kind of durable work, and nothing else."""

import importlib
import inspect
import pkgutil

from app import tasks
from app.tasks import CATALOGUE
from app.tasks.tools import Context


def durable_functions() -> set[str]:
    """The public functions below app/tasks that take a Context first."""
    found = set()
    for module in pkgutil.iter_modules(tasks.__path__, "app.tasks."):
        for name, function in inspect.getmembers(
            importlib.import_module(module.name), inspect.iscoroutinefunction
        ):
            first, *_ = [*inspect.signature(function).parameters.values(), None]
            if first is not None and first.annotation is Context:
                found.add(name)
    return found


def test_every_durable_function_is_in_the_catalogue() -> None:
    assert set(CATALOGUE) == durable_functions()


def test_the_names_are_what_is_stored_and_stay() -> None:
    """A task that was queued yesterday is found by its name today: add names, never change one."""
    assert set(CATALOGUE) >= {"send_email", "save_upload", "make_thumbnail", "save_data"}
