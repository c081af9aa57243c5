"""The catalogue: what is queued today is found by its name tomorrow."""

from app.tasks import CATALOGUE


def test_the_names_are_what_is_stored_and_stay() -> None:
    """Names may be added; one that is changed or removed strands the tasks that bear it."""
    assert set(CATALOGUE) >= {"send_email", "save_upload", "make_thumbnail", "save_data"}
