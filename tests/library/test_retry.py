"""The retry policy: whether a failed task is tried again, and when."""

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterward.errors import PermanentError, ServiceUnavailable, TemporaryError
from afterward.retry import Bounds, RetryPolicy
from afterward.task import Task
from tests.library.support import DAY, NOW, a_task

attempts = st.integers(1, 10_000)
seconds = st.floats(0.001, 1e6)

OUTSIDE = [TemporaryError("busy"), ServiceUnavailable("away")]
# A task with a bug is tried again as well, because a new release may mend it in the meantime.
UNEXPECTED = [OSError(), TimeoutError(), ValueError("a bug"), MemoryError(), SystemExit()]

FOUR_DAYS = RetryPolicy(attempts=8, give_up_after=4 * DAY)


def by_attempts(attempt: int, most: int) -> Task:
    return a_task(attempts=attempt, max_attempts=most)


def by_time(attempt: int = 1, *, errors: int = 0) -> Task:
    return a_task(attempts=attempt, errors=errors, max_attempts=None, gives_up_at=NOW + 4 * DAY)


# The waits


def test_the_longest_wait_doubles_up_to_a_quarter_of_an_hour() -> None:
    ceilings = [RetryPolicy().ceiling(attempt) for attempt in (1, 2, 3, 4, 10, 11, 12)]
    assert ceilings == [1, 2, 4, 8, 512, 900, 900]


@given(attempt=attempts, base=seconds, maximum=seconds, seed=st.integers())
def test_a_wait_is_random_between_zero_and_the_longest_wait(
    attempt: int, base: float, maximum: float, seed: int
) -> None:
    """This is full jitter. Even after 10,000 attempts the doubled wait does not overflow."""
    policy = RetryPolicy(base=base, maximum=maximum, uniform=random.Random(seed).uniform)
    task = by_attempts(attempt, attempt + 1)
    at = policy.next_attempt_at(task, TemporaryError("busy"), NOW)
    assert at is not None
    assert NOW <= at <= NOW + policy.ceiling(attempt) <= NOW + maximum


@given(attempt=attempts, base=seconds, maximum=seconds)
def test_the_longest_wait_doubles_up_to_the_maximum(
    attempt: int, base: float, maximum: float
) -> None:
    policy = RetryPolicy(base=base, maximum=maximum)
    assert policy.ceiling(1) == min(base, maximum)
    assert policy.ceiling(attempt + 1) == min(2 * policy.ceiling(attempt), maximum)


def test_a_task_that_met_an_outage_waits_for_the_end_of_the_pause() -> None:
    error = ServiceUnavailable("away")
    assert FOUR_DAYS.next_attempt_at(by_time(), error, NOW, resumes_at=NOW + 7) == NOW + 7


# Bounded by attempts


@given(attempt=attempts, most=attempts, error=st.sampled_from(OUTSIDE + UNEXPECTED))
def test_a_task_has_as_many_attempts_as_allowed_and_no_more(
    attempt: int, most: int, error: BaseException
) -> None:
    at = RetryPolicy().next_attempt_at(by_attempts(attempt, most), error, NOW)
    assert (at is None) == (attempt >= most)


@pytest.mark.parametrize("task", [by_attempts(1, 8), by_time()])
def test_a_permanent_error_is_not_tried_again(task: Task) -> None:
    assert FOUR_DAYS.next_attempt_at(task, PermanentError("refused"), NOW) is None


# Bounded by time


def test_a_policy_bounds_a_task_by_attempts_or_by_time() -> None:
    assert RetryPolicy(attempts=3).bounds(NOW) == Bounds(max_attempts=3, gives_up_at=None)
    assert FOUR_DAYS.bounds(NOW) == Bounds(max_attempts=None, gives_up_at=NOW + 4 * DAY)


@given(attempt=attempts, error=st.sampled_from(OUTSIDE), now=st.floats(NOW, NOW + 4 * DAY - 0.001))
def test_temporary_errors_are_retried_until_the_time_is_over(
    attempt: int, error: TemporaryError, now: float
) -> None:
    """The number of attempts does not matter. No wait goes beyond the end of the time."""
    at = FOUR_DAYS.next_attempt_at(by_time(attempt), error, now)
    assert at is not None
    assert now <= at <= NOW + 4 * DAY


@pytest.mark.parametrize("error", OUTSIDE)
def test_the_last_attempt_is_at_the_end_of_the_time(error: TemporaryError) -> None:
    end = NOW + 4 * DAY
    longest = RetryPolicy(give_up_after=4 * DAY, uniform=lambda _, longest: longest)
    assert longest.next_attempt_at(by_time(20), error, end - 1) == end
    assert longest.next_attempt_at(by_time(20), error, end - 1, resumes_at=end + 9) == end
    assert longest.next_attempt_at(by_time(21), error, end) is None
    assert longest.next_attempt_at(by_time(21), error, end + DAY) is None


@given(attempt=attempts, errors=st.integers(0, 20), error=st.sampled_from(UNEXPECTED))
def test_a_task_bounded_by_time_survives_a_few_unexpected_errors_only(
    attempt: int, errors: int, error: BaseException
) -> None:
    """Temporary errors do not count against this bound, because they are no bugs."""
    at = FOUR_DAYS.next_attempt_at(by_time(attempt, errors=errors), error, NOW)
    assert (at is None) == (errors + 1 >= 8)
    assert FOUR_DAYS.next_attempt_at(by_time(attempt, errors=errors), OUTSIDE[0], NOW) is not None


@pytest.mark.parametrize(
    "values",
    [
        *({"attempts": 0}, {"base": -1.0}, {"maximum": -1.0}, {"give_up_after": 0.0}),
        *({"base": math.nan}, {"maximum": math.inf}, {"give_up_after": math.inf}),
    ],
    ids=str,
)
def test_a_policy_refuses_wrong_values(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        RetryPolicy(**values)
