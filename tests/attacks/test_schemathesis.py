"""Schemathesis sends a real server valid and invalid requests, made from the OpenAPI document.

It checks each response: the document must name its status, headers and body. Valid requests must be
accepted, and invalid requests, requests without a key, and requests for another client's data
refused. A new upload must exist, and a deleted one must be gone. The configuration is in
schemathesis.toml, and switches no check off.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.faulty_service import KEYS
from tests.support.service import ROOT, Service, environment
from tests.support.torture import LONG, Tried, form

CONFIGURATION = Path(__file__).with_name("schemathesis.toml")
SETTINGS: dict[str, Any] = {
    "api_keys": ", ".join(f"{name}: {key}" for name, key in KEYS.items()),
    "max_upload_bytes": 200_000,
    # No SMTP server listens, so mails wait, and Schemathesis can cancel and retry them.
    "catcher": False,
    "smtp_port": 9,
    "retry_base_seconds": 3600,
}


@pytest.mark.parametrize("queue", ["SQLite", "PostgreSQL"] if LONG else ["SQLite"])
def test_every_response_is_as_documented(
    queue: str, tmp_path: Path, request: pytest.FixtureRequest, tried: Tried
) -> None:
    settings = dict(SETTINGS)
    if queue == "PostgreSQL":
        settings["queue_url"] = request.getfixturevalue("database_url")
    cases = 0
    with Service(tmp_path, **settings) as service:
        while cases < form(300, 10_000):
            report = ask(service, examples=form(2, 250), always_the_same=not LONG)
            assert report["failures"] == report["errors"] == []
            assert {phase["status"] for phase in report["phases"].values()} == {"success"}
            assert report["operations"]["tested"] == report["operations"]["total"]
            # Schemathesis warns of incomplete tests: a wrong key, or a part of the document that
            # it cannot use. In a short run, it may use too few existing ids for some path.
            warnings = {name for name, about in report["warnings"].items() if about}
            assert warnings <= {"missing_test_data"}
            cases += report["test_cases"]["generated"]
        assert "request failed" not in service.log
    tried(f"{cases:,} cases on {queue}", "0 failures")


FAULTS = {
    ("ServerError", "GET /readyz"),
    ("UnsupportedMethodResponse", "PUT /livez"),
    ("UndefinedStatusCode", "GET /metrics"),
    ("IgnoredAuth", "GET /inbox"),
    ("UndefinedContentType", "GET /inbox"),
    ("JsonSchemaError", "GET /events"),
    ("MissingHeaders", "GET /tasks"),
    ("JsonSchemaError", "GET /uploads"),
    ("AcceptedNegativeData", "POST /process/"),
    ("RejectedPositiveData", "POST /test-task/"),
    # These are found by sequences of requests.
    ("ObjectLevelAuthorizationViolation", "Stateful tests"),
    ("UseAfterFree", "Stateful tests"),
}
TASKS = {"/send-email/", "/tasks/{task_id}"}
UPLOADS = {"/upload", "/uploads/{upload_id}"}


def test_control_the_faults_of_a_faulty_service_are_found(tmp_path: Path, tried: Tried) -> None:
    command = (sys.executable, "-m", "tests.attacks.faulty_service")
    single = {operation.split()[1] for _, operation in FAULTS if "/" in operation}
    found = set()
    with Service(tmp_path, command=command, **SETTINGS) as service:
        # The sequences of requests are random, so a round may miss the last two faults.
        rounds = [single, *(paths for _ in range(10) for paths in (TASKS, UPLOADS))]
        for number, paths in enumerate(rounds):
            report = ask(service, examples=8, always_the_same=number == 0, paths=paths)
            for failure in report["failures"]:
                found |= {(failure["type"], operation) for operation in failure["operations"]}
            if found >= FAULTS:
                break
    tried(f"{len(FAULTS)} faults put into the service", f"{len(FAULTS & found)} found")
    assert found >= FAULTS


def ask(
    service: Service, *, examples: int, always_the_same: bool, paths: Iterable[str] = ()
) -> dict[str, Any]:
    """Run Schemathesis with so many examples for each operation of `paths`; return its report."""
    clients = [
        {"name": name, "fixedHeaders": [{"name": "Authorization", "value": f"Bearer {key}"}]}
        for name, key in KEYS.items()
    ]
    (service.directory / "clients.json").write_text(json.dumps({"auth": clients}))
    command = [sys.executable, "-m", "schemathesis.cli", "--no-color"]
    command += ["--config-file", str(CONFIGURATION), "run", f"{service.url}/openapi.json"]
    command += ["--checks", "all", "--max-examples", str(examples)]
    command += ["--report", "json", "--report-json-path", "report.json"]
    command += [option for path in sorted(paths) for option in ("--include-path", path)]
    if always_the_same:
        command += ["--generation-deterministic"]
    run = subprocess.run(
        command,
        cwd=service.directory,
        env=environment() | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        check=False,  # it fails if it finds a fault
    )
    print(run.stdout, run.stderr)
    report: dict[str, Any] = json.loads((service.directory / "report.json").read_text())
    assert report["complete"]
    return report
