"""The catalogue: what is queued today is found by its name tomorrow."""

from app.settings import Settings
from app.tasks import catalogue


def test_the_names_are_what_is_stored_and_stay() -> None:
    """Names may be added; one that is changed or removed strands the tasks that bear it."""
    assert set(catalogue(Settings(_env_file=None))) >= {
        "send_email",
        "save_upload",
        "make_thumbnail",
        "save_data",
    }
