"""Counts and durations for Prometheus. docs/operations explains each metric."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from afterward.events import Event, EventType
from afterward.task import FINISHED, Backlog

_COUNTED = frozenset(EventType) - {EventType.PROGRESSED}
# In seconds, up to the default of TASK_TIMEOUT_SECONDS.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 900)


class Metrics:
    """The metrics of one app, in a registry of their own. `record` subscribes to the queue.

    `kinds` are the kinds of tasks, `smtp_connections` returns the number of open connections, and
    `max_backlog` is MAX_BACKLOG.
    """

    def __init__(
        self, kinds: Iterable[str], smtp_connections: Callable[[], float], max_backlog: int
    ) -> None:
        self._registry = registry = CollectorRegistry()
        self._events = Counter(
            "afterward_tasks", "Events of tasks.", ["kind", "outcome"], registry=registry
        )
        self._seconds = Histogram(
            "afterward_task_duration_seconds",
            "Duration of an attempt.",
            ["kind", "outcome"],
            registry=registry,
            buckets=_BUCKETS,
        )
        # Looking up a pair of labels takes longer than counting, so the children are cached.
        self._counter, self._histogram = cache(self._events.labels), cache(self._seconds.labels)
        # Prometheus computes no increase from a series that begins above 0. So a first burst of
        # failures would raise no alert, if each series did not exist from the start.
        for kind in kinds:
            for event_type in _COUNTED:
                self._counter(kind, event_type)
        self._backlog = Gauge(
            "afterward_backlog", "Unfinished tasks by status.", ["status"], registry=registry
        )
        self._age = Gauge(
            "afterward_backlog_age_seconds",
            "Seconds since the oldest waiting task became due.",
            registry=registry,
        )
        Gauge(
            "afterward_backlog_limit", "MAX_BACKLOG: the most unfinished tasks.", registry=registry
        ).set(max_backlog)
        self._workers = Gauge(
            "afterward_workers", "Workers of all processes that are alive.", registry=registry
        )
        self._passes = Gauge(
            "afterward_check_passes",
            "Whether a check of /readyz passes: 1 or 0.",
            ["check"],
            registry=registry,
        )
        self._damaged = Gauge(
            "afterward_database_damaged",
            "Whether the file of the database is damaged: 1 or 0.",
            registry=registry,
        )
        Gauge(
            "afterward_smtp_connections", "Open SMTP connections.", registry=registry
        ).set_function(smtp_connections)

    def record(self, event: Event) -> None:
        """Count an event of the queue, and the duration of an attempt."""
        if event.type not in _COUNTED:
            return
        self._counter(event.task.kind, event.type).inc()
        if event.seconds is not None:
            self._histogram(event.task.kind, event.type).observe(event.seconds)

    def exposition(
        self,
        backlog: Backlog,
        now: float,
        *,
        workers: int,
        checks: Mapping[str, bool],
        database_is_damaged: bool,
    ) -> bytes:
        """Return the metrics in the text format of Prometheus.

        `now` is in seconds since the epoch. `workers` is the number of workers that are alive.
        `checks` has the name of each check, and whether it passes.
        """
        for status, tasks in backlog.counts.items():
            if status not in FINISHED:
                self._backlog.labels(status).set(tasks)
        oldest = backlog.oldest_due_at
        self._age.set(0 if oldest is None else max(0.0, now - oldest))
        self._workers.set(workers)
        for check, passes in checks.items():
            self._passes.labels(check).set(passes)
        self._damaged.set(database_is_damaged)
        return generate_latest(self._registry)
