"""Email addresses that are lists, groups, literals, quoted, too long, or in foreign scripts.

Each is refused with 422 (404 if it is more than one segment of a path), or leads to a single RCPT
command with the address as `app.mail.message.address` normalises it.
"""

from email.message import EmailMessage
from itertools import product
from urllib.parse import quote, unquote

import aiosmtplib
import pytest
from fastapi import BackgroundTasks, FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from app.mail.message import address
from tests.support.target import Target
from tests.support.torture import Tried, form

ROUTES = ["/send-notification/{}", "/send-email/?email={}", "/items/7?email={}"]

# Percent-encoded, as in a path.
INVALID_ADDRESSES = [
    "ada",
    "@example.com",
    "ada@",
    "ada@localhost",
    "ada@example..com",
    "ada@.example.com",
    "ada@example.com%0d%0a",
    "ada%0d%0aBcc:eve@example.com",
    "ada@example.com%0d%0aRCPT%20TO:%3Ceve@example.com%3E",
    "ada@example.com%0aDATA",
    "ada@example.com%3E%20ORCPT=rfc822%3Beve@example.com",
    "ada%00@example.com",
    "ada@example.com%00",
    "%ff@example.com",
    "%C0%80@example.com",
    "%ED%A0%80@example.com",
    "ada@example.com%E2%80%A8",
    "ada@example.com%7F",
    "a,v@example.com",
    "ada@example.com,eve@example.com",
    "ada@example.com%3Beve@example.com",
    "ada@example.com%20eve@example.com",
    "ada@eve@example.com",
    "Name%20%3Ca@b.c%3E",
    "Ada%20%3Cada@example.com%3E",
    "%3Cada@example.com%3E",
    "ada@example.com%20(a%20comment)",
    "g:%20a,b%3B",
    "g:%20a@example.com,b@example.com%3B",
    "@relay.example.com:ada@example.com",
    "mailto:ada@example.com",
    "%22a%20b%22@example.com",
    "%22ada%5C%22@example.com",
    "ada@%5B127.0.0.1%5D",
    "ada@%5BIPv6:::1%5D",
    "ada@127.0.0.1",
    "ada@-example.com",
    "ada@exa_mple.com",
    "ada..b@example.com",
    ".ada@example.com",
    "ada.@example.com",
    "%20ada@example.com",
    "ada@example.com%20",
    "ad%C3%A9@example.com",
    "%D0%B0da@example.com",
    "ada%EF%BC%A0example.com",
    "=%3Futf-8%3Fq%3Feve%3F=@example.com",
    "%24%7Bjndi:ldap:example.com%7D@example.com",
    "x" * 65 + "@example.com",
    "ada@" + "x" * 64 + ".com",
    "ada@" + "x" * 250 + ".com",
    "ada@" + ".".join(["x" * 60] * 5) + ".com",
    "ada@" + ".".join([quote("ü" * 30)] * 8) + ".com",
    "x" * 9000,
]
NOT_A_PATH_SEGMENT = [
    "..%2f..%2fetc%2fpasswd",
    "ada@example.com%2Fx%2Fy",
    "a@b%2Fada@example.com",
    "a/b@example.com",  # a slash that is not encoded separates two segments
    "/ada@example.com",
    "a/b%2Fc@example.com",
    "",
    "/",
]

# Unusual, but valid.
UNUSUAL_ADDRESSES = [
    "-oQ@example.com",
    "--help@example.com",
    "a%2Bb@example.com",
    "a%2Fb@example.com",
    "%2fada%2F@example.com",
    "x" * 64 + "@example.com",
    "a%252Fb@example.com",
    "ada%250d%250aBcc@example.com",
    "eve%25example.org@example.com",
    "eve!example.org@example.com",
    "'or'1'='1@example.com",
    "%7B%7B7*7%7D%7D@example.com",
    "ADA@EXAMPLE.COM",
    "ada@%E2%93%94xample.com",
    "ada@%EF%BD%85xample.com",
    "ada@example%E3%80%82com",
    "ada@b%C3%BCcher.example.com",
    "ada@xn--bcher-kva.example.com",
]


def rcpts_of(target: Target, path: str) -> list[str] | None:
    """Return the RCPT commands of this request's mail, or None if the request was refused."""
    before = len(target.smtp_server.commands)
    response = target.post(path)
    if response.status_code != 202:
        target.refused(response, 422, 404)
        return None
    target.mail_of(response)
    commands = target.smtp_server.commands[before:]
    return [command for command in commands if command.startswith("RCPT")]


@pytest.mark.usefixtures("leaves_no_traces")
@pytest.mark.parametrize("route", ROUTES)
def test_text_that_is_not_exactly_one_address_is_refused(
    target: Target, route: str, tried: Tried
) -> None:
    for given_address in INVALID_ADDRESSES:
        response = target.post(route.format(given_address))
        (error,) = target.refused(response, 422)["errors"]
        assert error["pointer"] == "/email"
    tried(f"{len(INVALID_ADDRESSES)} invalid addresses, at {route}", "all refused, 0 RCPT")


@pytest.mark.usefixtures("leaves_no_traces")
@pytest.mark.parametrize("given_address", NOT_A_PATH_SEGMENT)
def test_an_address_that_is_no_single_path_segment_is_not_found(
    target: Target, given_address: str
) -> None:
    target.refused(target.post(f"/send-notification/{given_address}"), 404)


@pytest.mark.parametrize("path", ["a%2Fb@example.com", "a%2fb@example.com/"])
def test_an_encoded_slash_in_an_address_is_accepted(target: Target, path: str) -> None:
    """RFC 5322, 3.2.3, allows it in the local part. A trailing slash belongs to the route."""
    assert rcpts_of(target, f"/send-notification/{path}") == ["RCPT TO:<a/b@example.com>"]


@pytest.mark.usefixtures("leaves_no_traces")
def test_an_encoded_slash_in_a_path_without_an_address_is_not_found(target: Target) -> None:
    for path in ("/items/7%2F8", "/tasks/a%2Fb@example.com/cancel"):
        target.refused(target.post(path), 404)


def test_an_unusual_address_leads_to_one_rcpt_command(target: Target, tried: Tried) -> None:
    pairs = list(product(UNUSUAL_ADDRESSES, ROUTES))[:: form(2, 1)]
    for given_address, route in pairs:
        expected = [f"RCPT TO:<{address(unquote(given_address))}>"]
        assert rcpts_of(target, route.format(given_address)) == expected
    tried(f"{len(pairs)} unusual addresses", f"{len(pairs)} RCPT, each address normalised")


TEXTS = st.text(st.characters() | st.sampled_from('@.,;:<>"()[]%!=? \r\n\0ⓔ'), max_size=80)
MAILBOXES = st.emails() | TEXTS | TEXTS.map("{}@example.com".format) | TEXTS.map("ada@{}".format)


@settings(max_examples=form(40, 10_000), deadline=None)
@given(text=MAILBOXES)
def test_any_text_as_address_leads_to_one_rcpt_command_or_none(target: Target, text: str) -> None:
    # UTF-8 has no form for a surrogate, so it is sent as a careless client would encode it.
    encoded = quote(text.encode("utf-8", "surrogatepass"), safe="")
    rcpts = rcpts_of(target, f"/send-notification/{encoded}")
    assert rcpts is None or rcpts == [f"RCPT TO:<{address(text)}>"]


# The negative control


def test_control_the_tutorial_s_route_sends_mail_to_other_recipients(
    target: Target, tried: Tried
) -> None:
    """Its parameter is `email: str`, and the standard library reads lists and names in it."""
    app = FastAPI()

    @app.post("/send-email/", status_code=202)
    async def send_email(email: str, background_tasks: BackgroundTasks) -> None:
        mail = EmailMessage()
        mail["From"] = "notifications@example.com"
        mail["To"] = email
        mail.set_content("Hello")
        port = target.smtp_server.port
        background_tasks.add_task(aiosmtplib.send, mail, hostname="127.0.0.1", port=port)

    commands = target.smtp_server.commands
    client = TestClient(app, raise_server_exceptions=False)
    others, errors = 0, 0
    for given_address in INVALID_ADDRESSES:
        before = len(commands)
        response = client.post(f"/send-email/?email={given_address}")
        errors += response.status_code == 500
        rcpts = [command for command in commands[before:] if command.startswith("RCPT")]
        others += rcpts not in ([], [f"RCPT TO:<{unquote(given_address)}>"])
    tried(
        f"{len(INVALID_ADDRESSES)} invalid addresses to the tutorial's route",
        f"{others} sent to other recipients, {errors} answered 500",
    )
    assert others
