"""The tutorial works to the letter: its files and edits, applied to a copy, pass its own test."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.service import PATIENCE, ROOT

TUTORIAL = (ROOT / "docs" / "tutorial" / "2_a_task_of_your_own.md").read_text()
ITS_NEIGHBOURS = ("tests/test_map.py", "tests/tasks/test_registry.py")
_STEP = re.compile(r"^<!-- (new|edit): (\S+) -->\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_RUN = re.compile(r"^<!-- run -->\n```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the project in which the tutorial was followed."""
    for name in ("afterward", "app", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for action, path, text in _STEP.findall(TUTORIAL):
        if action == "new":
            assert not (tmp_path / path).exists(), path
            (tmp_path / path).write_text(text)
        else:
            edit(tmp_path / path, text)
    return tmp_path


def edit(path: Path, diff: str) -> None:
    """Apply a diff without line numbers, whose first lines must occur once in the file.

    Runs of spaces within a line may differ, because tables in docstrings are aligned.
    """
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in "- ")
    after = "".join(line[1:] for line in lines if line[0] in "+ ")
    text = path.read_text()
    pattern = re.sub(r"(?<=\S)(?:\\ ){2,}", " {2,}", f"\n{re.escape(before)}")
    assert len(re.findall(pattern, text)) == 1, f"{path} has not exactly one place for:\n{before}"
    path.write_text(re.sub(pattern, lambda _: f"\n{after}", text))


@pytest.mark.thorough
def test_the_task_of_the_tutorial_passes_its_test_and_those_of_the_maps(copy: Path) -> None:
    [command] = _RUN.findall(TUTORIAL)
    program, *arguments = command.split()
    assert program == ".venv/bin/python"
    done = subprocess.run(
        [sys.executable, *arguments, *ITS_NEIGHBOURS, "-q", "-p", "no:cacheprovider"],
        cwd=copy,
        check=False,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert not done.returncode, done.stdout


@pytest.mark.thorough
def test_the_files_of_the_tutorial_are_as_this_project_formats_them(copy: Path) -> None:
    paths = [path for action, path, _ in _STEP.findall(TUTORIAL) if path.endswith(".py")]
    for command in (["check"], ["format", "--check"]):
        subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", *paths], cwd=copy, check=True
        )
