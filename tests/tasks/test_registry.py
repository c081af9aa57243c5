"""The registry of the service's tasks: their stored names and retry policies."""

from app.settings import Settings
from app.tasks import registry


def test_the_names_of_the_tasks_do_not_change() -> None:
    """Stored tasks refer to these names. If a name changes, its tasks can no longer run."""
    assert set(registry(Settings(_env_file=None))) >= {
        "send_email",
        "save_upload",
        "make_thumbnail",
        "save_data",
        "retry_tasks",
        "cancel_tasks",
    }


def test_each_kind_of_task_is_tried_for_as_long_as_this_table_says() -> None:
    """Seconds, or None for RETRY_ATTEMPTS. An outage of a weekend fails no mail and no upload."""
    four_days = 4 * 24 * 3600
    table = {
        "send_email": four_days,
        "save_upload": four_days,
        "make_thumbnail": four_days,
        "remove_upload": four_days,
        "save_data": None,
        "retry_tasks": four_days,
        "cancel_tasks": four_days,
    }
    kinds = registry(Settings(_env_file=None))
    bounds = {kind: (policy := kinds.policy(kind)) and policy.give_up_after for kind in kinds}
    assert bounds == table, (
        "registry() in app/tasks has other kinds or bounds than this table in "
        "tests/tasks/test_registry.py: add yours"
    )


def test_bulk_actions_begin_before_the_tasks_that_wait() -> None:
    """A cancellation would come too late behind the tasks that it cancels."""
    assert registry(Settings(_env_file=None)).urgent == {"retry_tasks", "cancel_tasks"}
