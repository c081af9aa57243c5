"""docs/operations: the dashboard and the alert rules use metrics and labels that really exist."""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from math import inf
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from afterward.events import EventType
from app.main import create_app
from app.settings import Settings
from tests.support.service import ROOT, settings_in, wait_for

OPERATIONS = ROOT / "docs" / "operations"
GUIDE = (OPERATIONS / "README.md").read_text()
DASHBOARD = json.loads((OPERATIONS / "dashboard.json").read_text())
ALERTS = yaml.safe_load((OPERATIONS / "alerts.yml").read_text())["groups"][0]["rules"]

# Prometheus adds these to every series, and the metric `up` to every target.
OF_PROMETHEUS = {"job", "instance"}
FUNCTIONS = {
    *("sum", "rate", "increase", "histogram_quantile", "absent", "vector"),
    *("by", "without", "and", "or"),
}

Metrics = dict[str, dict[str, set[str]]]  # the values of each label of each metric


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    """The metrics of a service that has run a task."""
    settings = settings_in(tmp_path_factory.mktemp("service"))
    with TestClient(create_app(settings)) as client:
        wait_for(client, client.post("/send-notification/ada@example.com").json()["id"])
        text = client.get("/metrics").text
    found: Metrics = {"up": {}}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """Return the place and the text of each expression."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield f"panel {panel['title']}", target["expr"]
    for rule in ALERTS:
        yield f"alert {rule['alert']}", rule["expr"]


@pytest.mark.parametrize(("place", "expression"), [*expressions()])
def test_an_expression_names_only_metrics_and_labels_that_exist(
    metrics: Metrics, place: str, expression: str
) -> None:
    assert faults(expression, metrics) == [], place


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("rate(afterward_tasks[5m])", "no metric afterward_tasks"),
        ('afterward_backlog{state="queued"} > 1', "afterward_backlog has no label state"),
        ('afterward_backlog{status="queue"} > 1', "afterward_backlog has no status queue"),
        (
            'afterward_tasks_total{outcome=~"failed|died"}',
            "afterward_tasks_total has no outcome died",
        ),
        ("sum by (status) (afterward_workers)", "no metric has a label status"),
    ],
)
def test_a_wrong_expression_is_found(metrics: Metrics, expression: str, fault: str) -> None:
    """The negative control."""
    assert faults(expression, metrics) == [fault]


def faults(expression: str, metrics: Metrics) -> list[str]:
    """Return the names in an expression that do not exist."""
    found, used = [], set[str]()
    # 1. afterward_backlog{status="queued"}, without numbers, texts and the names of functions
    plain = re.sub(r"\[[^\]]*\]|\b(by|without) \([^)]*\)", "", expression)
    for name, selector in re.findall(r"([a-z_]\w*)(\{[^}]*\})?", re.sub(r"\b\d\S*", "", plain)):
        if name in FUNCTIONS and not selector:
            continue
        if name not in metrics:
            found.append(f"no metric {name}")
            continue
        used |= metrics[name].keys()
        found += wrong_labels(name, selector, metrics[name])
    # 2. by (kind), without (status)
    for listed in re.findall(r"\b(?:by|without) \(([^)]*)\)", expression):
        for label in re.split(r",\s*", listed):
            if label not in used | OF_PROMETHEUS:
                found.append(f"no metric has a label {label}")
    return found


def wrong_labels(name: str, selector: str, labels: dict[str, set[str]]) -> Iterator[str]:
    """Return what is wrong with the labels of a metric in an expression."""
    for label, values in re.findall(r'(\w+)=~?"([^"]*)"', selector):
        if label not in labels.keys() | OF_PROMETHEUS:
            yield f"{name} has no label {label}"
        elif label not in OF_PROMETHEUS:
            for value in set(values.split("|")) - labels[label]:
                yield f"{name} has no {label} {value}"


def test_every_outcome_of_every_kind_is_counted_from_the_start(metrics: Metrics) -> None:
    """Without the zeros, Prometheus would not see the first failures as an increase."""
    outcomes = metrics["afterward_tasks_total"]["outcome"]
    assert outcomes == {event_type.value for event_type in EventType} - {"progressed"}
    assert {"send_email", "save_upload"} <= metrics["afterward_tasks_total"]["kind"]


def test_the_histogram_measures_attempts_up_to_their_timeout(metrics: Metrics) -> None:
    """A quantile in the dashboard is never above the last bucket but +Inf."""
    buckets = {float(bound) for bound in metrics["afterward_task_duration_seconds_bucket"]["le"]}
    assert max(buckets - {inf}) == Settings(_env_file=None).task_timeout_seconds


def test_the_guide_explains_every_metric(metrics: Metrics) -> None:
    table = GUIDE.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    explained = re.findall(r"^\| `(\w+)", table, re.MULTILINE)
    names = {re.sub("_created$", "_total", name) for name in metrics} - {"up"}
    assert set(explained) == {re.sub("_(bucket|count|sum)$", "", name) for name in names} - {
        "afterward_task_duration_seconds_total"
    }


def test_the_guide_says_what_to_do_for_each_alert() -> None:
    headings = re.findall("^### (Afterward.*)$", GUIDE, re.MULTILINE)
    assert headings == [rule["alert"] for rule in ALERTS]
    for rule in ALERTS:
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (ROOT / page, anchor) == (OPERATIONS / "README.md", rule["alert"].lower())


def test_the_panels_of_the_dashboard_fit_into_its_24_columns_without_a_gap() -> None:
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    places = [panel["gridPos"] for panel in panels]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["description"] for panel in panels)
    for row in sorted({place["y"] for place in places}):
        in_row = [place for place in places if place["y"] == row]
        assert sum(place["w"] for place in in_row) == 24
        assert all(left["x"] + left["w"] == right["x"] for left, right in pairwise(in_row))
