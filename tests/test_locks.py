"""The lock files: each package is pinned with a hash, and no older than its security fixes."""

import itertools
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support.service import ROOT

# The releases that fixed these vulnerabilities.
FLOORS = {
    "aiosmtplib": "5.1.2",  # commands smuggled into an address
    "h11": "0.16",  # requests smuggled into chunks
    "multipart": "1.3.1",  # exponential time for a parameter of a header
    "pydantic-settings": "2.14.2",  # symbolic links among the secrets
    "starlette": "1.3.1",
}
LOCKS = ["requirements.txt", "requirements-test.txt", "requirements-check.txt"]
INSTALLERS = ["scripts/install.sh", "Dockerfile", ".ci/run", "benchmarks/peers.py"]

LOCK = (ROOT / "requirements.txt").read_text()
_PIN = re.compile(r"([a-z0-9-]+)(?:\[[a-z0-9,-]+\])?==(\S+)(?: ; [^\\]+)?")
_HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def complaints(lock: str) -> set[str]:
    """Return the faults of a lock file: packages without a pin, without a hash, or too old."""
    found, versions = set(), {}
    for entry in lock.replace("\\\n", " ").splitlines():
        requirement, *hashes = re.split(r"\s+(?=--)", entry.strip())
        pin = _PIN.fullmatch(requirement.strip())
        if pin is None:
            found.add(f"no pinned requirement: {requirement}")
            continue
        versions[pin[1]] = Version(pin[2])
        if not hashes or not all(map(_HASH.fullmatch, hashes)):
            found.add(f"without a hash: {pin[1]}")
    for name, floor in FLOORS.items():
        if name not in versions or versions[name] < Version(floor):
            found.add(f"below its floor: {name}")
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_file_has_only_versions_and_hashes_and_no_url(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert complaints(text) == set()
    assert "://" not in text


def test_each_lock_file_contains_the_smaller_lock_files() -> None:
    """Therefore all targets of make can share a .venv."""
    run, test, check = (
        set(re.findall(r"(?m)^\S+==.*", (ROOT / lock).read_text())) for lock in LOCKS
    )

    assert run < test < check


@pytest.mark.parametrize("installer", INSTALLERS)
def test_a_lock_file_is_installed_without_a_resolver(installer: str) -> None:
    """A lock file names all packages, so there is nothing to resolve.

    Old versions of pip resolve anyway, and refuse a lock file with hashes as soon as any of its
    packages has a newer release.
    """
    text = (ROOT / installer).read_text()

    assert "--require-hashes" in text
    assert "--no-deps" in text


def test_pyproject_states_the_same_minimum_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [
        project["project"]["dependencies"],
        *project["project"]["optional-dependencies"].values(),
        project["dependency-groups"]["service"],
    ]
    stated = {
        requirement.name: [Version(clause.version) for clause in requirement.specifier]
        for requirement in map(Requirement, itertools.chain(*groups))
    }
    for name, floor in FLOORS.items():
        (at_least,) = stated[name]
        assert at_least >= Version(floor)


@pytest.mark.parametrize(
    ("pattern", "instead", "complaint"),
    [
        (r"(?m)^h11==\S+", "h11==0.14.0", "below its floor: h11"),
        (r"(?m)^starlette==(.+\\\n)+.+\n", "", "below its floor: starlette"),
        (r"(?m)^anyio==(\S+) (\\\n.+)+", r"anyio==\1", "without a hash: anyio"),
        (r"sha256:", "md5:", "without a hash: anyio"),
        (r"(?m)^anyio==", "anyio>=", "no pinned requirement: anyio>=4.16.0"),
        (r"^", "--pre\n", "no pinned requirement: "),
        (r"^", "anyio @ git+ssh://x/y\n", "no pinned requirement: anyio @ git+ssh://x/y"),
    ],
)
def test_control_a_lock_file_with_a_fault_is_found(
    pattern: str, instead: str, complaint: str
) -> None:
    doctored = re.sub(pattern, instead, LOCK)
    assert doctored != LOCK
    assert any(found.startswith(complaint) for found in complaints(doctored))
