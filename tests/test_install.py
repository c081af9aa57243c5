"""`scripts/install.sh` installs a lock file into .venv, and repairs an interrupted installation."""

import fcntl
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.service import PATIENCE, ROOT

LOCK = "requirements.txt"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with an empty lock file."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / LOCK).write_text("")
    return tmp_path


def install(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Install the checkout's lock file, or run another command, without a network."""
    return subprocess.run(
        command or ["scripts/install.sh", LOCK],
        cwd=checkout,
        env={"PATH": os.environ["PATH"], "PIP_NO_INDEX": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def interpreter(directory: Path, script: str) -> str:
    """Make a program that pretends to be Python, and return its path."""
    path = directory / "python-of-the-test"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


# Refusals


def refusal(checkout: Path, python: str) -> str:
    """Install with this interpreter, which must be refused, and return the line that says why."""
    refused = install(checkout, PYTHON=python)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert not (checkout / ".venv").exists()
    (line,) = refused.stderr.splitlines()
    return line


def test_a_missing_python_is_named(checkout: Path) -> None:
    line = refusal(checkout, "python-of-nowhere")

    assert "Python 3.11 or newer is needed, and there is no python-of-nowhere here" in line
    assert "make PYTHON=" in line


def test_a_python_that_is_too_old_is_named_with_its_version(checkout: Path) -> None:
    old = interpreter(checkout, '[ "$1" = -V ] && echo Python 3.9.6 && exit; exit 1')
    line = refusal(checkout, old)

    assert f"Python 3.11 or newer is needed, and {old} is Python 3.9.6" in line
    assert "make PYTHON=" in line


def test_a_python_without_venv_is_refused_with_the_name_of_debian_s_package(checkout: Path) -> None:
    # Debian's python3 lacks ensurepip until python3-venv is installed.
    incomplete = interpreter(
        checkout, f'case "$2" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac'
    )
    version = "{}.{}".format(*sys.version_info)

    assert f"apt install python{version}-venv" in refusal(checkout, incomplete)


# Installations, and their repair


@pytest.mark.thorough
def test_an_interrupted_installation_is_repaired_and_a_new_lock_file_is_installed(
    checkout: Path,
) -> None:
    assert install(checkout).stdout.splitlines()[-1] == "Installed."
    assert install(checkout).stdout == ""  # there is nothing to do

    lock_a_package(checkout)
    installed = install(checkout).stdout
    assert "Making .venv" not in installed
    assert "Successfully installed example-1.0" in installed
    assert is_importable(checkout)

    # As after a SIGKILL of pip: some files of a package are missing.
    (checkout / ".venv" / "unfinished").touch()
    next((checkout / ".venv").rglob("example.py")).unlink()
    assert "Making .venv" in install(checkout).stdout
    assert is_importable(checkout)
    assert install(checkout).stdout == ""

    # As after an upgrade of the system that took the interpreter away.
    (checkout / ".venv" / "bin" / "python").unlink()
    assert "Making .venv" in install(checkout).stdout
    assert is_importable(checkout)


def start(checkout: Path, lock: str) -> subprocess.Popen[str]:
    """Begin to install a lock file."""
    return subprocess.Popen(
        ["scripts/install.sh", lock],
        cwd=checkout,
        env={"PATH": os.environ["PATH"], "PIP_NO_INDEX": "1", "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.thorough
def test_two_installations_at_once_follow_each_other(checkout: Path) -> None:
    """`make run` and `make test` in two terminals of a new checkout."""
    of_tests = "requirements-test.txt"
    lock_a_package(checkout)
    (checkout / of_tests).write_text((checkout / LOCK).read_text())
    directory = os.open(checkout, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    both = [start(checkout, lock) for lock in (LOCK, of_tests)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "Waiting for another installation into .venv ...\n"
    os.close(directory)
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in both]

    assert [process.returncode for process in both] == [0, 0]
    assert sum("Making .venv" in output for output in outputs) == 1
    assert all(output.endswith("Installed.\n") for output in outputs)
    assert is_importable(checkout)
    assert install(checkout).stdout == ""
    assert install(checkout, "scripts/install.sh", of_tests).stdout == ""


@pytest.mark.thorough
def test_a_lock_file_that_has_changed_since_its_installation_is_installed_again(
    checkout: Path,
) -> None:
    """Commit A `make test`, commit B `make run`, which downgrades, and back to A `make test`."""
    of_tests = "requirements-test.txt"
    (checkout / of_tests).write_text("# commit A\n")
    install(checkout, "scripts/install.sh", of_tests)
    assert install(checkout).stdout  # the packages of both are of commit A
    assert install(checkout, "scripts/install.sh", of_tests).stdout == ""

    (checkout / of_tests).write_text("# commit B\n")
    (checkout / LOCK).write_text("# commit B\n")
    assert install(checkout).stdout

    (checkout / of_tests).write_text("# commit A\n")
    assert install(checkout, "scripts/install.sh", of_tests).stdout.endswith("Installed.\n")

    (checkout / of_tests).unlink()
    (checkout / LOCK).write_text("# commit C\n")
    assert install(checkout).returncode == 0
    assert not (checkout / ".venv" / of_tests).exists()


@pytest.mark.thorough
def test_a_failed_installation_is_tried_again_by_the_next_run(checkout: Path) -> None:
    (checkout / LOCK).write_text(f"example==1.0 --hash=sha256:{'0' * 64}\n")

    for _ in range(2):
        failed = install(checkout)
        assert failed.returncode != 0
        assert "example==1.0" in failed.stderr


def lock_a_package(checkout: Path) -> None:
    """Write a wheel, and a lock file that names it."""
    wheel = checkout / "example-1.0-py3-none-any.whl"
    about = "example-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("example.py", "")
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", f"example.py,,\n{about}/RECORD,,\n")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (checkout / LOCK).write_text(f"./{wheel.name} --hash=sha256:{digest}\n")


def is_importable(checkout: Path) -> bool:
    """Return whether the Python of .venv can import the locked package."""
    command = [".venv/bin/python", "-c", "import example"]
    return subprocess.run(command, cwd=checkout, check=False).returncode == 0
