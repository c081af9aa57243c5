"""`pip install .` installs the library only, with its types and its SQL files."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.service import ROOT

STARTS = """
import asyncio
import afterward
from afterward.fastapi import DurableRoute

async def greet(context, name):
    print("hello", name)

async def start():
    async with afterward.Afterward("sqlite:///queue.db", tasks=[greet]).running() as queue:
        durable_tasks = queue.collect()
        task = durable_tasks.add_task(greet, "Ada")
        await queue.commit(durable_tasks.collected())
        while (await queue.engine.get(task.id)).status != "succeeded":
            await asyncio.sleep(0.01)

asyncio.run(start())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds of this project, without a network and outside of its directory."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "afterward", source / "afterward", ignore=shutil.ignore_patterns("__pycache__")
    )
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    build += ["--no-build-isolation", "--wheel-dir", str(directory), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


@pytest.mark.thorough
def test_the_wheel_holds_every_file_of_the_library(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info/" not in name}
    tree = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "afterward").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }

    assert {"afterward/engines/sqlite/schema.sql", "afterward/py.typed"} <= tree
    assert packed == tree


@pytest.mark.thorough
def test_the_installed_library_runs_a_task_in_any_directory(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as file:
        file.extractall(installed)

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=elsewhere,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(installed)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert str(installed) in run("-c", "import afterward; print(afterward.__file__)")
    assert run("-c", STARTS) == "hello Ada\n"
