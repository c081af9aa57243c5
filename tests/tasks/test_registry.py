"""The registry: what is queued today is found by its name tomorrow."""

from app.settings import Settings
from app.tasks import registry


def test_the_names_are_what_is_stored_and_stay() -> None:
    """Names may be added; one that is changed or removed strands the tasks that bear it."""
    assert set(registry(Settings(_env_file=None))) >= {
        "send_email",
        "save_upload",
        "make_thumbnail",
        "save_data",
    }


def test_what_depends_on_the_outside_world_is_tried_for_days() -> None:
    """An outage of a weekend fails no mail and no upload."""
    kinds = registry(Settings(_env_file=None))
    patience = {kind: (policy := kinds.policy(kind)) and policy.give_up_after for kind in kinds}
    four_days = 4 * 24 * 3600
    assert patience == {
        "send_email": four_days,
        "save_upload": four_days,
        "make_thumbnail": four_days,
        "remove_upload": four_days,
        "save_data": None,
    }
