"""promtool, which comes with Prometheus, accepts the alert rules, their cases, and the metrics."""

import subprocess
from pathlib import Path

import pytest

from tests.support.service import ROOT, Service

RULES = ROOT / "docs" / "operations" / "alerts.yml"
CASES = Path(__file__).with_name("alerts_test.yml")


def run(promtool: str, *arguments: str | Path, text: str = "") -> str:
    """Run promtool, and return its output. It must find no fault."""
    ended = subprocess.run(
        [promtool, *arguments], check=False, input=text, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_rules_are_valid(promtool: str) -> None:
    run(promtool, "check", "rules", "--lint-fatal", RULES)


def test_each_alert_fires_when_it_should_and_only_then(promtool: str, tmp_path: Path) -> None:
    (tmp_path / RULES.name).write_text(RULES.read_text())
    (tmp_path / CASES.name).write_text(CASES.read_text())
    run(promtool, "test", "rules", tmp_path / CASES.name)


def test_a_changed_rule_fails_its_case(promtool: str, tmp_path: Path) -> None:
    """The negative control: without it, promtool might test nothing."""
    (tmp_path / RULES.name).write_text(RULES.read_text().replace("> 300", "> 3000"))
    (tmp_path / CASES.name).write_text(CASES.read_text())
    with pytest.raises(AssertionError, match="AfterwardTasksLate"):
        run(promtool, "test", "rules", tmp_path / CASES.name)


def test_prometheus_reads_the_metrics_of_the_service(promtool: str, tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        service.wait_for(service.post("/send-notification/ada@example.com").json()["id"])
        metrics = service.get("/metrics").text
    run(promtool, "check", "metrics", text=metrics)
