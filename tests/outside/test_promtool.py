"""promtool, which comes with Prometheus, accepts the alert rules, their cases, and the metrics.

It also evaluates the expressions of the dashboard.
"""

import copy
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support.service import ROOT, Service

RULES = ROOT / "docs" / "operations" / "alerts.yml"
DASHBOARD = json.loads((ROOT / "docs" / "operations" / "dashboard.json").read_text())
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


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The metrics of a service that has sent a mail, and failed to send another."""
    with Service(tmp_path_factory.mktemp("service")) as service:
        for recipient, status in (("ada", "succeeded"), ("refuse+550", "failed")):
            queued = service.post(f"/send-notification/{recipient}@example.com").json()
            service.wait_for(queued["id"], status)
        return service.get("/metrics").text


def test_prometheus_reads_the_metrics_of_the_service(promtool: str, metrics: str) -> None:
    run(promtool, "check", "metrics", text=metrics)


# The dashboard


def test_every_panel_of_the_dashboard_shows_numbers_after_a_run(
    promtool: str, metrics: str, tmp_path: Path
) -> None:
    show(promtool, DASHBOARD, metrics, tmp_path)


@pytest.mark.parametrize(
    ("panel", "name", "value"),
    [
        (6, "expr", 'afterward_backlog{job="$job",status="waiting"}'),
        (6, "expr", 'afterward_backlog{job="$job"'),
        (6, "legendFormat", "{{state}}"),
        (2, "expr", "0 / sum(0 * afterward_workers)"),
    ],
    ids=["no data", "syntax", "unknown label", "no number"],
)
def test_a_panel_without_numbers_is_found(
    promtool: str, metrics: str, tmp_path: Path, panel: int, name: str, value: str
) -> None:
    """The negative control."""
    dashboard = copy.deepcopy(DASHBOARD)
    dashboard["panels"][panel]["targets"][0][name] = value
    with pytest.raises(AssertionError, match=f"panel:{panel + 1}:A"):
        show(promtool, dashboard, metrics, tmp_path)


def show(promtool: str, dashboard: Any, metrics: str, directory: Path) -> None:
    """Evaluate the expression of each panel. It must give a number with the labels of its legend.

    Each expression becomes a recording rule, because promtool reads no dashboards. The counters
    rise from 0 to the real values six minutes after the start.
    """
    rules, cases = [], []
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            name = f"panel:{panel['id']}:{target['refId']}"
            expression = target["expr"].replace("$__rate_interval", "5m")
            rules.append({"record": name, "expr": expression.replace("$job", "afterward")})
            labels = re.findall(r"{{(\w+)}}", target["legendFormat"])
            found = name + "{" + ",".join(f'{label}!=""' for label in labels) + "}"
            numbers = f"count({found} == {found}) > bool 0"  # not a number is not equal to itself
            samples = [{"labels": "{}", "value": 1}]
            cases.append({"expr": numbers, "eval_time": "8m", "exp_samples": samples})
    test = {"interval": "1m", "input_series": [*series(metrics)], "promql_expr_test": cases}
    files = {
        "panels.yml": {"groups": [{"name": "panels", "rules": rules}]},
        "cases.yml": {"rule_files": ["panels.yml"], "tests": [test]},
    }
    for file, content in files.items():
        (directory / file).write_text(yaml.safe_dump(content))
    run(promtool, "test", "rules", directory / "cases.yml")


def series(metrics: str) -> Iterator[dict[str, str]]:
    """Return the metrics as series of promtool. Prometheus adds the labels job and instance."""
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            labels = sample.labels | {"job": "afterward", "instance": "a"}
            text = ",".join(f"{name}={json.dumps(value)}" for name, value in labels.items())
            yield {
                "series": f"{sample.name}{{{text}}}",
                "values": f"0x5 {sample.value:f}x4",
            }
