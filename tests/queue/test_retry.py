"""When a failed task is tried again."""

import random

from hypothesis import given
from hypothesis import strategies as st

from app.queue.errors import PermanentError, TemporaryError
from app.queue.retry import RetryPolicy

attempts = st.integers(1, 10_000)
seconds = st.floats(0.001, 1e6)

# A bug in a task may be mended by the time of its next attempt: it is tried again as well.
ERRORS = [TemporaryError("busy"), OSError(), TimeoutError(), ValueError("a bug"), MemoryError()]


def test_the_longest_wait_doubles_up_to_an_hour() -> None:
    ceilings = [RetryPolicy().ceiling(attempt) for attempt in (1, 2, 3, 4, 12, 13, 14)]
    assert ceilings == [1, 2, 4, 8, 2048, 3600, 3600]


@given(attempt=attempts, base=seconds, maximum=seconds, seed=st.integers())
def test_a_wait_is_anything_from_nothing_to_the_longest(
    attempt: int, base: float, maximum: float, seed: int
) -> None:
    """Full jitter; and no attempt is so late that its wait does not fit a number."""
    policy = RetryPolicy(base=base, maximum=maximum, uniform=random.Random(seed).uniform)
    wait = policy.wait_after(attempt, attempt + 1, TemporaryError("busy"))
    assert wait is not None
    assert 0 <= wait <= policy.ceiling(attempt) <= maximum


@given(attempt=attempts, base=seconds, maximum=seconds)
def test_the_longest_wait_doubles_until_it_is_the_maximum(
    attempt: int, base: float, maximum: float
) -> None:
    policy = RetryPolicy(base=base, maximum=maximum)
    assert policy.ceiling(1) == min(base, maximum)
    assert policy.ceiling(attempt + 1) == min(2 * policy.ceiling(attempt), maximum)


@given(attempt=attempts, most=attempts, error=st.sampled_from(ERRORS))
def test_there_are_as_many_attempts_as_allowed_and_no_more(
    attempt: int, most: int, error: BaseException
) -> None:
    wait = RetryPolicy().wait_after(attempt, most, error)
    assert (wait is None) == (attempt >= most)


@given(attempt=attempts, more=attempts)
def test_a_permanent_error_is_not_tried_again(attempt: int, more: int) -> None:
    assert RetryPolicy().wait_after(attempt, attempt + more, PermanentError("refused")) is None
