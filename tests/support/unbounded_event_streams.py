"""The service with event streams that buffer whole tasks without a limit, for a negative control.

`python -m tests.support.unbounded_event_streams` serves like `python -m app`.
"""

import sys
from dataclasses import replace

from afterward.task import Task
from app.__main__ import main
from app.api import event_stream as feed

_of = feed.Change.of


def _with_arguments(task: Task) -> feed.Change:
    return replace(_of(task), data=task.arguments.encode())


if __name__ == "__main__":
    feed.MOST_UNREAD = feed.MOST_UNREAD_BYTES = sys.maxsize
    feed.Change.of = _with_arguments  # type: ignore[method-assign]
    main()
