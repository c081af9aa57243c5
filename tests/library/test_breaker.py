"""The circuit breaker, which reads no clock: each call passes the time to it."""

import pytest

from afterward.circuit_breaker import LONGEST_PAUSE_SECONDS, Admits, Breaker, Ended
from tests.library.support import DAY, NOW


@pytest.fixture
def breaker() -> Breaker:
    """A closed breaker without jitter."""
    return Breaker(uniform=lambda _, longest: longest)


def open_up(breaker: Breaker, at: float = NOW) -> None:
    breaker.end(breaker.begin(), Ended.AWAY, at)


def test_a_closed_breaker_admits_all(breaker: Breaker) -> None:
    for how in (Ended.WORKED, Ended.UNKNOWN):
        breaker.end(breaker.begin(), how, NOW)
    assert breaker.admits(NOW) is Admits.ALL
    assert (breaker.pause_left(NOW), breaker.away_since) == (0, None)


def test_an_outage_begins_a_pause_and_after_it_one_probe_is_admitted(breaker: Breaker) -> None:
    open_up(breaker)
    assert breaker.admits(NOW + 0.9) is Admits.NONE
    assert breaker.pause_left(NOW + 0.75) == 0.25
    assert breaker.admits(NOW + 1) is Admits.ONE
    breaker.begin()
    assert breaker.admits(NOW + 1) is Admits.NONE
    # While a probe hangs, the breaker admits no other task.
    assert breaker.admits(NOW + DAY) is Admits.NONE
    assert breaker.away_since == NOW


def test_a_pause_doubles_with_each_probe_that_fails_up_to_half_a_minute(breaker: Breaker) -> None:
    now, pauses = NOW, []
    for _ in range(100):
        open_up(breaker, now)
        pauses.append(breaker.pause_left(now))
        now += pauses[-1]
    assert pauses[:7] == [1, 2, 4, 8, 16, 30, 30]
    assert pauses[-1] == LONGEST_PAUSE_SECONDS


def test_a_pause_has_jitter() -> None:
    """Jitter keeps the workers that noticed the same outage from probing at the same moment."""
    pauses = set()
    for _ in range(20):
        open_up(breaker := Breaker())
        pauses.add(breaker.pause_left(NOW))
    assert len(pauses) > 1
    assert all(0.8 <= pause <= 1 for pause in pauses)


def test_a_probe_that_finds_no_outage_closes_the_breaker(breaker: Breaker) -> None:
    """The next outage begins with the shortest pause again."""
    open_up(breaker)
    open_up(breaker, NOW + 1)
    breaker.end(breaker.begin(), Ended.WORKED, NOW + 3)
    assert breaker.admits(NOW + 3) is Admits.ALL
    assert breaker.away_since is None
    open_up(breaker, NOW + 4)
    assert breaker.pause_left(NOW + 4) == 1


def test_a_cancelled_probe_is_followed_by_a_new_probe(breaker: Breaker) -> None:
    open_up(breaker)
    breaker.end(breaker.begin(), Ended.UNKNOWN, NOW + 1)
    assert breaker.admits(NOW + 1) is Admits.ONE
    assert breaker.away_since == NOW


@pytest.mark.parametrize("how", Ended)
def test_an_attempt_from_before_the_outage_changes_nothing(breaker: Breaker, how: Ended) -> None:
    """Its end neither lengthens nor ends the pause, is no probe, and opens no breaker."""
    stragglers = [breaker.begin() for _ in range(4)]
    open_up(breaker)
    breaker.end(stragglers[0], how, NOW + 0.5)
    assert breaker.pause_left(NOW + 0.5) == 0.5
    breaker.end(stragglers[1], how, NOW + 1)
    assert breaker.admits(NOW + 1) is Admits.ONE
    probe = breaker.begin()
    breaker.end(stragglers[2], how, NOW + 1)
    assert breaker.admits(NOW + 1) is Admits.NONE
    breaker.end(probe, Ended.WORKED, NOW + 1)
    breaker.end(stragglers[3], how, NOW + 2)
    assert breaker.admits(NOW + 2) is Admits.ALL


@pytest.mark.parametrize("how", Ended)
def test_an_attempt_that_begins_beside_the_probe_changes_nothing(
    breaker: Breaker, how: Ended
) -> None:
    """A task that was claimed before the pause may begin after it."""
    open_up(breaker)
    breaker.begin()
    breaker.end(breaker.begin(), how, NOW + 1)
    assert breaker.admits(NOW + 1) is Admits.NONE
    assert breaker.pause_left(NOW + 1) == 0


@pytest.mark.parametrize("jump", [-DAY, -0.5, DAY])
def test_no_jump_of_the_clock_makes_a_pause_longer(breaker: Breaker, jump: float) -> None:
    open_up(breaker)
    assert breaker.pause_left(NOW + jump) == 0
    assert breaker.admits(NOW + jump) is Admits.ONE
