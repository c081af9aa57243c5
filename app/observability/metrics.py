"""Counts and durations for Prometheus."""

from collections.abc import Callable
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from afterward.events import Event, EventType
from afterward.task import FINISHED, Backlog


class Metrics:
    """The metrics of one app, in a registry of their own. `record` subscribes to the queue."""

    def __init__(self, smtp_connections: Callable[[], float]) -> None:
        self._registry = registry = CollectorRegistry()
        self._events = Counter(
            "afterward_tasks", "Events of tasks.", ["kind", "outcome"], registry=registry
        )
        self._seconds = Histogram(
            "afterward_task_duration_seconds",
            "Duration of an attempt.",
            ["kind", "outcome"],
            registry=registry,
        )
        # Looking up a pair of labels takes longer than counting, so the children are cached.
        self._counter, self._histogram = cache(self._events.labels), cache(self._seconds.labels)
        self._backlog = Gauge(
            "afterward_backlog", "Unfinished tasks by status.", ["status"], registry=registry
        )
        self._age = Gauge(
            "afterward_backlog_age_seconds",
            "Seconds since the oldest waiting task became due.",
            registry=registry,
        )
        Gauge(
            "afterward_smtp_connections", "Open SMTP connections.", registry=registry
        ).set_function(smtp_connections)

    def record(self, event: Event) -> None:
        """Count an event of the queue, and the duration of an attempt."""
        if event.type is EventType.PROGRESSED:
            return
        self._counter(event.task.kind, event.type).inc()
        if event.seconds is not None:
            self._histogram(event.task.kind, event.type).observe(event.seconds)

    def exposition(self, backlog: Backlog, now: float) -> bytes:
        """Return the metrics in the text format of Prometheus. `now` is seconds since the epoch."""
        for status, tasks in backlog.counts.items():
            if status not in FINISHED:
                self._backlog.labels(status).set(tasks)
        oldest = backlog.oldest_due_at
        self._age.set(0 if oldest is None else max(0.0, now - oldest))
        return generate_latest(self._registry)
