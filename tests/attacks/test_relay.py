"""The service is used to send mail by those who may not, to whom it may not, or too often.

No key or a wrong one is a 401, a recipient off the list a 403, too many requests a 429, too long a
backlog a 503; and the SMTP server hears of none of it.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from urllib.parse import quote

import httpx2
import pytest
from fastapi.testclient import TestClient

from app.hardening.rate_limit import RateLimit
from app.main import create_app
from tests.api.requests import problem_of
from tests.support.gate import MAIL_ROUTES, bearing, served
from tests.support.service import settings_in, wait_for
from tests.support.smtp_server import SmtpServer
from tests.support.torture import Tried, form

KEY = "ada-key-1"
LIST = "*@example.com, Ada@Example.org ,*@BÜCHER.example"
LIST_AS_TEXT = ("example.com", "Ada@Example.org", "BÜCHER.example")

PERMITTED = {
    "ada@example.com": "ada@example.com",
    "ada@EXAMPLE.com": "ada@example.com",
    "ada@ⓔxample.com": "ada@example.com",
    "ada@example.org": "ada@example.org",
    "ADA@example.org": "ADA@example.org",
    "ada@bücher.example": "ada@xn--bcher-kva.example",
    "ada@XN--BCHER-KVA.example": "ada@xn--bcher-kva.example",
}
OFF_THE_LIST = [
    "eve@example.net",
    "eve@example.org",
    "ada@example.com.example.net",
    "ada@sub.example.com",
    "ada@xexample.com",
    "ada@examplexcom.net",
    "ada+x@example.org",
    "xada@example.org",
    "ada@bucher.example",
    "ada@buecher.example",
    "ada@ex\N{CYRILLIC SMALL LETTER A}mple.com",
    "example.com@example.net",
    "ada%example.com@example.net",
    "eve%example.net@example.com",
    "example.net!eve@example.com",
]
STRANGERS = {
    "no key": {},
    "a wrong key": bearing("ada-key-2"),
    "a revoked key": bearing("ada-key-0"),
    "no key but a name": {"Authorization": "Bearer ada"},
}


@contextmanager
def relay(
    directory: Path,
    smtp_server: SmtpServer,
    *,
    keys: str | None = f"ada: {KEY}",
    **settings: object,
) -> Iterator[TestClient]:
    """A service that sends its mail to this server."""
    directory.mkdir(exist_ok=True)
    if keys is not None:
        (directory / "keys").write_text("ada: ada-key-0\n")
        settings["api_keys_file"] = directory / "keys"
    with served(directory, catcher=False, smtp_port=smtp_server.port, **settings) as client:
        if keys is not None:
            (directory / "keys").write_text(keys)
        yield client


def recipients(smtp_server: SmtpServer) -> list[str]:
    """Whom the server was asked to deliver to."""
    found = (re.fullmatch("RCPT TO:<(.*)>", command) for command in smtp_server.commands)
    return [match[1] for match in found if match]


def send_to(client: httpx2.Client, address: str, way: str, **options: object) -> httpx2.Response:
    """Ask for a mail to this address, in one of the ways there are."""
    return client.post(way.format(quote(address)), **options)  # type: ignore[arg-type]


def only_those_were_sent(client: TestClient, smtp_server: SmtpServer, permitted: str) -> None:
    """Send one more mail: when it has arrived, whatever was queued before it has, too."""
    task = send_to(client, permitted, MAIL_ROUTES[0]).json()
    wait_for(client, task["id"])
    assert recipients(smtp_server) == [permitted]
    assert len(client.get("/tasks").json()["data"]) == 1


def test_strangers_send_nothing(tmp_path: Path, smtp_server: SmtpServer, tried: Tried) -> None:
    with relay(tmp_path, smtp_server) as client:
        for way in MAIL_ROUTES:
            for who, headers in STRANGERS.items():
                answer = send_to(client, "eve@example.net", way, headers=headers)
                problem_of(answer, 401)
                assert answer.headers["www-authenticate"].startswith("Bearer"), who
        client.headers.update(bearing(KEY))
        only_those_were_sent(client, smtp_server, "ada@example.com")
    tried(f"{len(MAIL_ROUTES) * len(STRANGERS)} requests of strangers", "all 401, 0 RCPT")


def test_nobody_is_written_to_who_is_not_on_the_list(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    with relay(tmp_path, smtp_server, allowed_recipients=LIST) as client:
        client.headers.update(bearing(KEY))
        for way in MAIL_ROUTES:
            for address in OFF_THE_LIST:
                problem = problem_of(send_to(client, address, way), 403)
                assert address not in problem["detail"]
        only_those_were_sent(client, smtp_server, "ada@example.com")
    tried(f"{len(OFF_THE_LIST)} addresses off the list, in 3 ways", "all 403, 0 RCPT")


def test_the_list_is_compared_after_idna_and_without_regard_to_case(
    tmp_path: Path, smtp_server: SmtpServer
) -> None:
    with relay(tmp_path, smtp_server, allowed_recipients=LIST) as client:
        client.headers.update(bearing(KEY))
        for address, reached in PERMITTED.items():
            answer = send_to(client, address, MAIL_ROUTES[0])
            assert answer.status_code == 202, address
            wait_for(client, answer.json()["id"])
            assert recipients(smtp_server)[-1] == reached


def test_a_task_from_before_the_list_is_not_sent_however_often_it_is_retried(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    with relay(tmp_path, smtp_server, worker_concurrency=0) as client:
        client.headers.update(bearing(KEY))
        tasks = [send_to(client, "eve@example.net", way).json()["id"] for way in MAIL_ROUTES]
    with relay(tmp_path, smtp_server, allowed_recipients=LIST) as client:
        client.headers.update(bearing(KEY))
        for _ in range(2):
            for task in tasks:
                failed = wait_for(client, task, "failed")
                assert failed["error"]["type"] == "PermanentError"
                assert failed["attempts"] == 1
                assert client.post(f"/tasks/{task}/retry").status_code == 202
        for task in tasks:
            wait_for(client, task, "failed")
    assert recipients(smtp_server) == []
    tried("3 tasks queued before the list, each retried twice", "9 times failed, 0 RCPT")


# Too many


def test_who_comes_too_often_is_told_when_to_come_back(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    """And is let in then. The others' requests are counted apart."""
    rounds = form(1, 30)
    keys = f"ada: {KEY}\neve: eve-key"
    with relay(tmp_path, smtp_server, keys=keys, rate_limit="2/second") as client:
        for _ in range(rounds):
            answers: list[httpx2.Response] = []
            while not answers or answers[-1].status_code != 429:
                answers.append(
                    send_to(client, "a@example.com", MAIL_ROUTES[0], headers=bearing(KEY))
                )
                assert len(answers) < 10, "it never refuses"
            problem_of(answers[-1], 429)
            for answer in answers:
                assert answer.headers["ratelimit-policy"] == '"default";q=2;w=1'
                left = re.fullmatch(r'"default";r=(\d+);t=(\d+)', answer.headers["ratelimit"])
                assert left
                assert 0 <= int(left[1]) < 2
            assert left is not None
            assert (left[1], left[2]) == ("0", answers[-1].headers["retry-after"])
            assert client.get("/tasks", headers=bearing("eve-key")).status_code in {200, 429}
            time.sleep(int(answers[-1].headers["retry-after"]))
            assert client.get("/tasks", headers=bearing(KEY)).status_code == 200
    tried(f"{rounds} times too many requests", "429 each; let in after Retry-After seconds")


class Clock:
    """A clock to be set, in seconds."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.now


WINDOWS = {"1/second": 1, "3/second": 1, "60/minute": 60, "7/hour": 3600}


@pytest.mark.parametrize("limit", WINDOWS)
def test_retry_after_is_always_long_enough(limit: str, tried: Tried) -> None:
    """At whatever moments the requests came, and it is no longer than the time they are for."""
    clock, random, refusals = Clock(), Random(3), 0
    window, amount = WINDOWS[limit], int(limit.partition("/")[0])
    for _ in range(form(20, 500)):
        rate = RateLimit(limit, now=clock)
        clock.now += random.random() * window
        for _ in range(200):
            quota = rate.count_request("ada")
            if not quota.allowed:
                refusals += 1
                assert 1 <= quota.seconds <= window + 1
                clock.now += quota.seconds
                assert rate.count_request("ada").allowed
            clock.now += random.expovariate(3 / window * amount)
    tried(f"{refusals} refusals at {limit}", "each let in after Retry-After seconds")


def allowed_around_the_turn(allows: Callable[[], bool], clock: Clock) -> int:
    """How many of 120 requests are: one in the beginning of a minute, the others about its end."""
    allowed = 0
    for clock.now, requests in ((60_000.0, 1), (60_059.9, 59), (60_060.1, 60)):
        for _ in range(requests):
            allowed += allows()
    return allowed


def test_the_turn_of_the_minute_is_no_moment_for_twice_as_many() -> None:
    clock = Clock()
    rate = RateLimit("60/minute", now=clock)
    assert allowed_around_the_turn(lambda: rate.count_request("ada").allowed, clock) <= 61


def test_control_a_fixed_window_allows_twice_as_many_at_its_turn(tried: Tried) -> None:
    clock, counts = Clock(), Counter[int]()

    def allows() -> bool:
        counts[int(clock.now // 60)] += 1
        return counts[int(clock.now // 60)] <= 60

    allowed = allowed_around_the_turn(allows, clock)
    assert allowed == 120
    tried("60/minute over a fixed window", f"{allowed - 1} allowed within 0.2 s")


def test_no_more_clients_are_counted_than_there_is_memory_for(tried: Tried) -> None:
    """The client that has been silent for longest is forgotten for another one."""
    clock = Clock()
    rate = RateLimit("2/day", most_counted=3, now=clock)
    for client in ("eve", "joe", "ada", "ada"):
        assert rate.count_request(client).allowed
    strangers = [f"192.0.2.{number}" for number in range(form(20, 200))]
    for stranger in strangers:
        assert rate.count_request(stranger).allowed
        assert not rate.count_request("ada").allowed
        assert len(rate._counts) == 3
    tried(f"{len(strangers)} addresses, with room for 3", "3 counted, and a refused one refused")


def test_addresses_of_one_ipv6_network_are_one_client(tmp_path: Path) -> None:
    """A client has 2^64 of them, and could take another one for each request."""
    app = create_app(settings_in(tmp_path, rate_limit="2/hour", worker_concurrency=0))
    asked = [("2001:db8::1", 200), ("2001:db8::2:3", 200), ("2001:db8::4", 429)]
    asked += [("2001:db8:0:1::1", 200), ("192.0.2.1", 200), ("192.0.2.2", 200)]
    asked += [(f"::ffff:192.0.2.{number}", 200) for number in range(3)]
    for address, status in asked:
        with TestClient(app, client=(address, 50_000)) as client:
            assert client.get("/tasks").status_code == status, address


def test_a_full_backlog_takes_nothing_more_until_something_is_done(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    with relay(tmp_path, smtp_server, worker_concurrency=0, max_backlog=3) as client:
        client.headers.update(bearing(KEY))
        ids = [
            send_to(client, "ada@example.com", way).raise_for_status().json()["id"]
            for way in MAIL_ROUTES
        ]
        for way in MAIL_ROUTES:
            answer = send_to(client, "ada@example.com", way)
            problem_of(answer, 503)
            assert int(answer.headers["retry-after"]) > 0
        assert len(client.get("/tasks").json()["data"]) == 3

        client.post(f"/tasks/{ids[0]}/cancel")
        answer = send_to(client, "ada@example.com", MAIL_ROUTES[0])
        assert answer.status_code == 202
        problem_of(client.post(f"/tasks/{ids[0]}/retry"), 503)
    with relay(tmp_path, smtp_server, max_backlog=3) as client:
        client.headers.update(bearing(KEY))
        for task in (*ids[1:], answer.json()["id"]):
            wait_for(client, task)
        assert send_to(client, "ada@example.com", MAIL_ROUTES[0]).status_code == 202
    tried("a backlog of 3", "503 for each of 4 more, nothing queued; room again once one is done")


# Negative controls: our defences taken away


def test_control_an_open_service_without_a_list_is_a_relay(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    with relay(tmp_path, smtp_server, keys=None) as client:
        asked = 0
        for way in MAIL_ROUTES:
            for headers in STRANGERS.values():
                task = send_to(client, "eve@example.net", way, headers=headers).json()
                wait_for(client, task["id"])
                asked += 1
    assert recipients(smtp_server) == ["eve@example.net"] * asked
    tried("the strangers' requests, without keys and list", f"{asked} RCPT")


def test_control_a_list_that_is_compared_as_text_lets_others_in(tried: Tried) -> None:
    """By how an address ends and as it came, as one writes it first: wrong in both directions."""
    lets_in = [address for address in OFF_THE_LIST if address.endswith("example.com")]
    keeps_out = [address for address in PERMITTED if not address.endswith(LIST_AS_TEXT)]
    assert lets_in
    assert keeps_out
    tried("endswith", f"{len(lets_in)} off the list let in, {len(keeps_out)} on it kept out")
