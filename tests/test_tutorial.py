"""The tutorial works to the letter: its files and edits, applied to a copy, pass the tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from app.settings import Settings
from app.tasks import registry
from tests.support.service import PATIENCE, ROOT

PAGE = "docs/tutorial/2_a_task_of_your_own.md"
TUTORIAL = (ROOT / PAGE).read_text()
# The tests of `make check` that a new task with a route concerns, besides those of its own.
CONCERNED = (
    "tests/test_map.py",
    "tests/tasks/test_registry.py",
    "tests/api/test_contract.py",
    "tests/api/test_idempotency.py",
    "tests/api/test_methods.py",
    "tests/api/test_openapi.py",
    "tests/api/test_promises.py",
)
_STEP = re.compile(r"^<!-- (new|edit): (\S+) -->\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_RUN = re.compile(r"^<!-- run -->\n```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
STEPS = _STEP.findall(TUTORIAL)

# The steps cannot be applied to a tree in which a reader has followed them, perhaps with a task of
# their own: some lines that the steps show are changed, and others are there already.
SERVICE = {
    *("send_email", "save_upload", "make_thumbnail", "remove_upload", "save_data"),
    *("retry_tasks", "cancel_tasks"),
}
OWN = sorted(set(registry(Settings(_env_file=None))) - SERVICE)

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        bool(OWN),
        reason=f"the tutorial was followed here, because app/tasks has {', '.join(OWN)}. If this "
        "task belongs to the service, add it to SERVICE in this test",
    ),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which the tutorial was followed."""
    copy = tmp_path_factory.mktemp("tutorial")
    for name in ("afterward", "app", "tests", "docs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    for action, path, text in STEPS:
        if action == "new":
            assert not (copy / path).exists(), f"{PAGE} writes {path}, which exists: name another"
            (copy / path).write_text(text)
        else:
            edit(copy, path, text)
    return copy


def edit(copy: Path, path: str, diff: str) -> None:
    """Apply a diff without line numbers, whose first lines must occur once in the file.

    Runs of spaces within a line may differ, because tables in docstrings are aligned.
    """
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in "- ")
    after = "".join(line[1:] for line in lines if line[0] in "+ ")
    text = (copy / path).read_text()
    pattern = re.sub(r"(?<=\S)(?:\\ ){2,}", " {2,}", f"\n{re.escape(before)}")
    assert len(re.findall(pattern, text)) == 1, (
        f"{PAGE} shows these lines, and {path} does not have them exactly once:\n{before}"
        "Change the tutorial with them."
    )
    (copy / path).write_text(re.sub(pattern, lambda _: f"\n{after}", text))


def run(copy: Path, *command: str) -> None:
    """Run a command of Python in the copy. It must succeed, else show its output."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=copy,
        check=False,
        capture_output=True,
        text=True,
        timeout=8 * PATIENCE,
    )
    assert not done.returncode, f"after the steps of {PAGE}:\n{done.stdout}{done.stderr}"


def test_the_task_of_the_tutorial_passes_its_tests_and_those_that_it_concerns(copy: Path) -> None:
    [command] = _RUN.findall(TUTORIAL)
    program, *arguments = command.split()
    assert program == ".venv/bin/python"
    run(copy, *arguments, *CONCERNED, "-q", "-p", "no:cacheprovider")


def test_the_files_of_the_tutorial_pass_the_linter_and_the_type_checker(copy: Path) -> None:
    paths = sorted({path for _, path, _ in STEPS if path.endswith(".py")})
    run(copy, "-m", "ruff", "check", "--no-cache", *paths)
    run(copy, "-m", "ruff", "format", "--check", "--no-cache", *paths)
    run(copy, "-m", "mypy", f"--cache-dir={os.devnull}", *paths)


def test_control_a_step_for_a_changed_line_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text("three\n")
    with pytest.raises(AssertionError, match="Change the tutorial with them") as raised:
        edit(tmp_path, "tools.py", " one\n+two\n")
    assert f"{PAGE} shows these lines, and tools.py does not have" in str(raised.value)
