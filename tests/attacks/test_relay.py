"""Attempts to send mail without permission, to forbidden recipients, or too often.

A missing or wrong key is answered 401, a recipient outside of ALLOWED_RECIPIENTS 403, too many
requests 429, and a full backlog 503. The SMTP server gets no command in any of these cases.
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
FORBIDDEN = [
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
    """Run a service that sends its mail to this SMTP server."""
    directory.mkdir(exist_ok=True)
    if keys is not None:
        (directory / "keys").write_text("ada: ada-key-0\n")
        settings["api_keys_file"] = directory / "keys"
    with served(directory, catcher=False, smtp_port=smtp_server.port, **settings) as client:
        if keys is not None:
            (directory / "keys").write_text(keys)
        yield client


def recipients(smtp_server: SmtpServer) -> list[str]:
    """Return the recipients of all RCPT commands."""
    found = (re.fullmatch("RCPT TO:<(.*)>", command) for command in smtp_server.commands)
    return [match[1] for match in found if match]


def send_to(client: httpx2.Client, address: str, way: str, **options: object) -> httpx2.Response:
    """Request a mail to this address, with the route `way`."""
    return client.post(way.format(quote(address)), **options)  # type: ignore[arg-type]


def assert_only_this_mail_is_sent(
    client: TestClient, smtp_server: SmtpServer, permitted: str
) -> None:
    """Send a permitted mail. When it has arrived, all mails queued before it have arrived too."""
    task = send_to(client, permitted, MAIL_ROUTES[0]).json()
    wait_for(client, task["id"])
    assert recipients(smtp_server) == [permitted]
    assert len(client.get("/tasks").json()["data"]) == 1


def test_clients_without_a_valid_key_can_send_no_mail(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    with relay(tmp_path, smtp_server) as client:
        for way in MAIL_ROUTES:
            for who, headers in STRANGERS.items():
                answer = send_to(client, "eve@example.net", way, headers=headers)
                problem_of(answer, 401)
                assert answer.headers["www-authenticate"].startswith("Bearer"), who
        client.headers.update(bearing(KEY))
        assert_only_this_mail_is_sent(client, smtp_server, "ada@example.com")
    tried(f"{len(MAIL_ROUTES) * len(STRANGERS)} requests without a valid key", "all 401, 0 RCPT")


def test_no_mail_is_sent_to_a_recipient_outside_the_list(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    with relay(tmp_path, smtp_server, allowed_recipients=LIST) as client:
        client.headers.update(bearing(KEY))
        for way in MAIL_ROUTES:
            for address in FORBIDDEN:
                problem = problem_of(send_to(client, address, way), 403)
                assert address not in problem["detail"]
        assert_only_this_mail_is_sent(client, smtp_server, "ada@example.com")
    tried(f"{len(FORBIDDEN)} addresses outside the list, on 3 routes", "all 403, 0 RCPT")


def test_recipients_are_compared_after_idna_and_without_regard_to_case(
    tmp_path: Path, smtp_server: SmtpServer
) -> None:
    with relay(tmp_path, smtp_server, allowed_recipients=LIST) as client:
        client.headers.update(bearing(KEY))
        for address, reached in PERMITTED.items():
            answer = send_to(client, address, MAIL_ROUTES[0])
            assert answer.status_code == 202, address
            wait_for(client, answer.json()["id"])
            assert recipients(smtp_server)[-1] == reached


def test_a_task_from_before_the_list_is_never_sent_even_if_retried(
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
    tried("3 tasks queued before the list, each retried twice", "9 failures, 0 RCPT")


# Too many requests requests


def test_a_client_over_its_rate_limit_gets_429_with_the_time_to_wait(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    """After that time it is admitted. Each client's requests are counted separately."""
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
    tried(f"{rounds} times too many requests", "429; admitted after Retry-After seconds")


class Clock:
    """A clock that a test sets, in seconds."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


WINDOWS = {"1/second": 1, "3/second": 1, "60/minute": 60, "7/hour": 3600}


@pytest.mark.parametrize("limit", WINDOWS)
def test_retry_after_is_always_long_enough(limit: str, tried: Tried) -> None:
    """It holds for requests at random moments. Retry-After exceeds the window by 1 s at most."""
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
    tried(f"{refusals} refusals at {limit}", "each admitted after Retry-After seconds")


def allowed_around_the_end_of_a_minute(allows: Callable[[], bool], clock: Clock) -> int:
    """Return how many of 120 requests are allowed: 1 at a minute's start, 119 around its end."""
    allowed = 0
    for clock.now, requests in ((60_000.0, 1), (60_059.9, 59), (60_060.1, 60)):
        for _ in range(requests):
            allowed += allows()
    return allowed


def test_the_rate_is_not_doubled_around_the_end_of_a_minute() -> None:
    clock = Clock()
    rate = RateLimit("60/minute", now=clock)
    assert (
        allowed_around_the_end_of_a_minute(lambda: rate.count_request("ada").allowed, clock) <= 61
    )


def test_control_a_fixed_window_doubles_the_rate_around_its_end(tried: Tried) -> None:
    clock, counts = Clock(), Counter[int]()

    def allows() -> bool:
        counts[int(clock.now // 60)] += 1
        return counts[int(clock.now // 60)] <= 60

    allowed = allowed_around_the_end_of_a_minute(allows, clock)
    assert allowed == 120
    tried("60/minute over a fixed window", f"{allowed - 1} allowed within 0.2 s")


def test_the_number_of_counted_clients_is_limited(tried: Tried) -> None:
    """A new client replaces the client that has been silent for the longest time."""
    clock = Clock()
    rate = RateLimit("2/day", most_counted=3, now=clock)
    for client in ("eve", "joe", "ada", "ada"):
        assert rate.count_request(client).allowed
    strangers = [f"192.0.2.{number}" for number in range(form(20, 200))]
    for stranger in strangers:
        assert rate.count_request(stranger).allowed
        assert not rate.count_request("ada").allowed
        assert len(rate._counts) == 3
    tried(
        f"{len(strangers)} addresses, with room for 3", "3 counted; a refused client stays refused"
    )


def test_all_addresses_of_an_ipv6_network_count_as_one_client(tmp_path: Path) -> None:
    """A client has 2^64 addresses, and could use a new one for each request."""
    app = create_app(settings_in(tmp_path, rate_limit="2/hour", worker_concurrency=0))
    asked = [("2001:db8::1", 200), ("2001:db8::2:3", 200), ("2001:db8::4", 429)]
    asked += [("2001:db8:0:1::1", 200), ("192.0.2.1", 200), ("192.0.2.2", 200)]
    asked += [(f"::ffff:192.0.2.{number}", 200) for number in range(3)]
    for address, status in asked:
        with TestClient(app, client=(address, 50_000)) as client:
            assert client.get("/tasks").status_code == status, address


def test_a_full_backlog_refuses_mails_until_a_task_ends(
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
    tried("a backlog of 3", "503 for 4 more requests, 0 tasks; room again when a task is done")


# Negative controls: the same without the defences


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
    tried("the same requests to a service without keys and list", f"{asked} RCPT")


def test_control_a_list_that_is_compared_as_text_admits_forbidden_recipients(tried: Tried) -> None:
    """To compare the end of the address with `endswith` is wrong in both directions."""
    lets_in = [address for address in FORBIDDEN if address.endswith("example.com")]
    keeps_out = [address for address in PERMITTED if not address.endswith(LIST_AS_TEXT)]
    assert lets_in
    assert keeps_out
    tried("endswith", f"{len(lets_in)} forbidden admitted, {len(keeps_out)} permitted refused")
