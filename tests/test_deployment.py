"""The unit for systemd, the workflow of CI, and the hooks of pre-commit."""

import re
from typing import Any

import yaml

from app.settings import Settings
from tests.support.service import ROOT

UNIT = (ROOT / "docs" / "afterward.service").read_text()


def values(name: str) -> list[str]:
    """Return the values of a directive of the unit, in order."""
    return re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)


def test_the_unit_sets_only_settings_that_exist_and_starts_with_them() -> None:
    environment = dict(value.split("=", 1) for value in values("Environment"))
    settings: dict[str, Any] = {name.lower(): value for name, value in environment.items()}

    assert settings.keys() <= Settings.model_fields.keys()
    assert Settings(_env_file=None, api_keys="key", **settings).environment == "production"


def test_the_data_of_the_unit_is_where_it_may_write() -> None:
    assert values("ProtectSystem") == ["strict"]
    assert values("StateDirectory") == ["afterward"]
    for name in ("QUEUE_URL", "UPLOAD_URL", "LOG_FILE"):
        [value] = [value for value in values("Environment") if value.startswith(name)]
        assert "/var/lib/afterward/" in value


def test_systemd_waits_longer_for_a_stop_than_the_grace_period() -> None:
    [seconds] = values("TimeoutStopSec")
    assert float(seconds) > Settings.model_fields["shutdown_grace_seconds"].default


def test_the_workflow_runs_everything_and_pins_its_actions() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    workflow: dict[Any, Any] = yaml.safe_load(text)
    [job] = workflow["jobs"].values()

    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    assert workflow["permissions"] == {"contents": "read"}
    actions = re.findall(r"uses: (\S+)", text)
    assert actions
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in actions)


def test_the_hooks_call_programs_of_the_virtual_environment() -> None:
    configuration = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    [repository] = configuration["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["entry"].startswith(".venv/bin/ruff ")
