"""Durable background tasks for FastAPI, on SQLite or PostgreSQL.

A task is a row in a database, committed before the client gets its 202. A worker claims the row,
runs the task's function, and tries it again if it fails. So a task survives a crash of the process
that accepted it, and a crash of the worker that runs it.

Two words are our own. A durable task that was accepted is a *promise*: it runs at least once, and
its outcome is kept. A task of FastAPI's BackgroundTasks is a *courtesy*: a crash loses it.

Read in this order:

    fastapi          DurableRoute and DurableTasks: collect tasks in a route, commit, then answer
    unit_of_work     add_task(function, *args, **kwargs): the tasks of one transaction
    queue            commits, cancels and retries tasks; tells subscribers of each change
    worker           claims due tasks for its free slots
    attempt          runs one task, and writes its outcome
    call             calls the function of a task, and describes its error
    heartbeat        extends the leases of running tasks

    runtime          Afterward: starts and stops the engine, the worker and retention
    registry         the functions that may run, and their retry policies
    signature        the arguments of a function: to JSON, and back by its annotations
    retry            when a failed task is tried again
    task             a task as it is stored, and its states
    filter           the conditions that select tasks, for lists, counts and bulk actions
    bulk             retries or cancels many tasks in slices
    history          the failed attempts of a task
    errors           the errors of the queue, and the errors that tasks raise
    tracing          the hook for distributed tracing; opentelemetry makes spans of attempts
    events           changes of tasks, for subscribers; task_log writes them as log lines
    retention        removes old tasks and stored responses
    pauses           lets tasks wait while a service is away; circuit_breaker decides for one kind
    backlog_limit    refuses tasks when too many are unfinished
    keep_trying      repeats a database operation until it succeeds
    engine           the operations that a database must have; engines has SQLite and PostgreSQL

Most apps need only the names of this module and of `afterward.fastapi`. An app that wires the parts
itself, as the service of this repository does, may also use `bulk`, `engine`, `engines`, `errors`,
`events`, `filter`, `history`, `opentelemetry`, `queue`, `registry`, `retention`, `retry`, `task`,
`task_log`, `tracing`, `unit_of_work` and `worker`. The other modules, and names that begin with an
underscore, may change with any version.
"""

from afterward.errors import (
    CannotStart,
    PermanentError,
    QueueError,
    QueueUnavailable,
    ServiceUnavailable,
    TaskNotFound,
    TemporaryError,
)
from afterward.events import Event, EventType
from afterward.queue import Queue
from afterward.registry import TaskKind
from afterward.retry import RetryPolicy
from afterward.runtime import Afterward
from afterward.task import Status, Task
from afterward.unit_of_work import Context, UnitOfWork

__all__ = [
    "Afterward",
    "CannotStart",
    "Context",
    "Event",
    "EventType",
    "PermanentError",
    "Queue",
    "QueueError",
    "QueueUnavailable",
    "RetryPolicy",
    "ServiceUnavailable",
    "Status",
    "Task",
    "TaskKind",
    "TaskNotFound",
    "TemporaryError",
    "UnitOfWork",
]
