"""Invalid JSON: malformed, not encodable, too deep, too long, or of the wrong shape.

The service refuses each body (4xx), in at most 4 KB that repeat no part of the input. If an object
has a name twice, the last value counts, as for most parsers (RFC 8259, section 4); the service
validates and uses the same value.
"""

import json

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.api.requests import LARGEST_PROBLEM
from tests.support.target import JSON, MARK, NOTIFICATION, Target
from tests.support.torture import Tried, form

SAVE_DATA = "/save-data/?user_id=ada"
PROCESS = "/process/"
PATHS = [NOTIFICATION, SAVE_DATA, PROCESS]

MALFORMED = {
    "NaN": b'{"subject": NaN}',
    "NaN that is to be echoed": b'{"do-not-repeat-me": NaN}',
    "an infinity": b'{"message": -Infinity}',
    "a number that becomes an infinity": b'{"message": 1e999}',
    "one that becomes minus infinity": b'{"message": [[-1e999]]}',
    "one that does so without an exponent": b'{"message": ' + b"9" * 309 + b".0}",
    "one that does so with a small one": b'{"message": ' + b"9" * 250 + b"e59}",
    "half a surrogate pair": b'{"subject": "\\ud800"}',
    "the other half": b'{"subject": "\\udfff do-not-repeat-me"}',
    "two halves the wrong way round": b'{"subject": "\\udc00\\ud800"}',
    "half a surrogate pair as a name": b'{"\\udfff": 1}',
    "a byte that is no UTF-8": b'{"subject": "\xff"}',
    "half a surrogate pair in UTF-8": b'{"subject": "\xed\xa0\x80"}',
    "an overlong NUL": b'{"subject": "\xc0\x80"}',
    "half a character": b'{"subject": "\xf0\x9f\x98"}',
    "UTF-16": '{"subject": "x"}'.encode("utf-16"),
    "UTF-32": '{"subject": "x"}'.encode("utf-32"),
    "a byte order mark": b'\xef\xbb\xbf{"subject": "x"}',
    "100,000 levels of lists": b"[" * 100_000 + b"]" * 100_000,
    "100,000 levels of objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "100,000 levels in a field": b'{"subject": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a million open lists": b"[" * 1_000_000,
    "5,000 digits": b'{"message": ' + b"9" * 5_000 + b"}",
    "a million digits": b'{"message": ' + b"9" * 1_000_000 + b"}",
    "5,000 digits after the point": b'{"message": 1e' + b"9" * 5_000 + b"}",
    "a control character": b'{"subject": "a\nb"}',
    "NUL": b'{"subject": "x"}\0',
    "a comma too many": b'{"subject": "x",}',
    "one quote": b"{'subject': 'x'}",
    "no quotes": b"{subject: 1}",
    "half an object": b'{"subject": "do-not-repeat-me',
    "two objects": b"{}{}",
    "a comment": b"{} // do-not-repeat-me",
    "an unknown escape": b'{"subject": "\\x41"}',
    "hexadecimal": b'{"subject": 0x41}',
    "a leading zero": b'{"subject": 007}',
    "a plus": b'{"subject": +1}',
    "no value": b" ",
    "a word": b"do-not-repeat-me",
    "a form": b"subject=do-not-repeat-me",
}
# Bodies of a notification, and their wrong fields.
WRONG_FIELDS: list[tuple[object, list[str]]] = [
    ({"subject": True}, ["/subject"]),
    ({"subject": 1}, ["/subject"]),
    ({"subject": 1.5}, ["/subject"]),
    ({"subject": None}, ["/subject"]),
    ({"subject": [MARK]}, ["/subject"]),
    ({"subject": "x" * 201}, ["/subject"]),
    ({"subject": MARK * 60_000}, ["/subject"]),
    ({"message": {MARK: 1}}, ["/message"]),
    ({"message": [MARK] * 40_000}, ["/message"]),
    ({"subject": 1, "message": 2}, ["/subject", "/message"]),
    ({"colour": MARK}, ["/colour"]),
    ({"Subject": MARK}, ["/Subject"]),
    ({"subject ": MARK}, [""]),
    ({"__proto__": {MARK: 1}}, ["/__proto__"]),
    ({"__class__": MARK}, ["/__class__"]),
    ({"html": MARK}, ["/html"]),
    ({f"two words, {MARK}": 1}, [""]),
    ({MARK * 10: 1}, [""]),
    ({MARK * 60_000: 1}, [""]),
]


def send(target: Target, body: bytes, path: str = NOTIFICATION) -> httpx2.Response:
    return target.post(path, content=body, headers=JSON)


@pytest.mark.usefixtures("leaves_no_traces")
@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_is_not_strict_json_is_refused(target: Target, path: str, tried: Tried) -> None:
    for body in MALFORMED.values():
        target.refused(send(target, body, path), 400, 422)
    tried(f"{len(MALFORMED)} malformed bodies, to {path}", "all refused, 0 echoed")


@pytest.mark.usefixtures("leaves_no_traces")
@pytest.mark.parametrize(("body", "pointers"), WRONG_FIELDS, ids=lambda value: str(value)[:30])
def test_a_wrong_field_is_named_and_its_value_is_never_repeated(
    target: Target, body: object, pointers: list[str]
) -> None:
    errors = target.refused(send(target, json.dumps(body).encode()), 422)["errors"]
    assert [error["pointer"] for error in errors] == pointers
    assert all(error["detail"] for error in errors)


@pytest.mark.usefixtures("leaves_no_traces")
@pytest.mark.parametrize("path", ["/items/true", "/items/1.5", "/items/" + "9" * 5_000])
def test_a_path_parameter_that_is_no_integer_is_refused(target: Target, path: str) -> None:
    (error,) = target.refused(target.post(path), 422)["errors"]
    assert error["pointer"] == "/item_id"


@pytest.mark.usefixtures("leaves_no_traces")
@pytest.mark.parametrize("path", PATHS)
def test_two_megabytes_in_a_wrong_field_lead_to_a_small_problem(target: Target, path: str) -> None:
    body = b'{"%b": "%b"}' % (MARK.encode(), b"x" * 2_000_000)
    target.refused(send(target, body, path), 413)


@pytest.mark.usefixtures("leaves_no_traces")
@pytest.mark.parametrize("path", [NOTIFICATION, "/send-notification/" + "%F0%9F%98%80" * 300])
def test_a_thousand_wrong_fields_lead_to_a_small_problem(target: Target, path: str) -> None:
    body = {f"{number:040}": number for number in range(1_000)}
    errors = target.refused(send(target, json.dumps(body).encode(), path), 422)["errors"]
    assert len(errors) <= 20


def test_of_a_duplicate_name_the_last_value_is_validated_and_used(target: Target) -> None:
    evil, good = b'"subject": "a\\r\\nBcc: eve@example.com"', b'"subject": "good"'
    with target.unmoved():
        target.refused(send(target, b"{%b, %b}" % (good, evil)), 422)
    mail = target.mail_of(send(target, b"{%b, %b}" % (evil, good)))
    assert b"\r\nSubject: good\r\n" in mail.content
    assert b"eve@example.com" not in mail.content


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=10,
)
FIELDS = st.sampled_from(["subject", "message", "html", "send_at"]) | st.text()
BODIES = st.binary() | st.dictionaries(FIELDS, VALUES, max_size=3).map(
    lambda body: json.dumps(body).encode()
)


@settings(max_examples=form(60, 10_000), deadline=None)
@given(body=BODIES, query=st.sampled_from(["", "?q=a", "?q=%ff", "?q=%00", "?&=", "?q=a&q=b"]))
def test_any_body_leads_to_a_promise_or_to_a_problem(
    target: Target, body: bytes, query: str
) -> None:
    response = send(target, body, NOTIFICATION + query)
    if response.status_code == 202:
        assert target.service.get(response.headers["location"]).json()["id"]
    else:
        target.refused(response, 400, 422)


# The negative control


def test_control_plain_fastapi_answers_500_and_repeats_its_input(tried: Tried) -> None:
    app = FastAPI()

    class Message(BaseModel):
        subject: str = ""
        message: int = 0

    @app.post("/")
    async def send(message: Message) -> Message:
        return message

    client = TestClient(app, raise_server_exceptions=False)
    bodies = [*MALFORMED.values(), *(json.dumps(body).encode() for body, _ in WRONG_FIELDS)]
    answers = [client.post("/", content=body, headers=JSON) for body in bodies]
    errors = sum(answer.status_code >= 500 for answer in answers)
    echoes = sum(MARK in answer.text for answer in answers)
    largest = max(len(answer.content) for answer in answers)
    tried(
        f"plain FastAPI, {len(bodies)} malformed or wrong bodies",
        f"{errors} answered 500, {echoes} echoed, the largest answer {largest:,} bytes",
    )
    assert errors >= 3
    assert echoes
    assert largest > LARGEST_PROBLEM
