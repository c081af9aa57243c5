"""Counts and durations for Prometheus."""

from collections.abc import Callable
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from afterward.events import Event, EventType
from afterward.task import FINISHED, Backlog


class Metrics:
    """The numbers of one app, in a registry of its own. `listen` is a listener of the queue."""

    def __init__(self, smtp_connections: Callable[[], float]) -> None:
        self._registry = registry = CollectorRegistry()
        self._events = Counter(
            "afterward_tasks", "Changes of tasks.", ["kind", "outcome"], registry=registry
        )
        self._seconds = Histogram(
            "afterward_task_duration_seconds",
            "How long an attempt took.",
            ["kind", "outcome"],
            registry=registry,
        )
        # To look a pair of labels up takes longer than to count.
        self._counter, self._histogram = cache(self._events.labels), cache(self._seconds.labels)
        self._backlog = Gauge(
            "afterward_backlog", "Unfinished tasks by status.", ["status"], registry=registry
        )
        self._age = Gauge(
            "afterward_backlog_age_seconds",
            "How long the oldest waiting task has been due.",
            registry=registry,
        )
        Gauge(
            "afterward_smtp_connections", "SMTP connections open now.", registry=registry
        ).set_function(smtp_connections)

    def record(self, event: Event) -> None:
        """Count what happened."""
        if event.type is EventType.PROGRESSED:
            return
        self._counter(event.task.kind, event.type).inc()
        if event.seconds is not None:
            self._histogram(event.task.kind, event.type).observe(event.seconds)

    def exposition(self, backlog: Backlog, now: float) -> bytes:
        """Prometheus' text format, with the backlog as it stands."""
        for status, tasks in backlog.counts.items():
            if status not in FINISHED:
                self._backlog.labels(status).set(tasks)
        oldest = backlog.oldest_due_at
        self._age.set(0 if oldest is None else max(0.0, now - oldest))
        return generate_latest(self._registry)
