"""Whatever is sent to the notification's route, the answer is one that the documentation names."""

import json
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from app.main import create_app
from tests.api.requests import problem_of
from tests.support.service import settings_in

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=10,
)
FIELDS = st.sampled_from(["subject", "message", "html", "send_at"]) | st.text()
BODIES = st.binary() | st.dictionaries(FIELDS, VALUES, max_size=3).map(
    lambda body: json.dumps(body).encode()
)
ADDRESSES = (
    st.sampled_from(["ada@example.com", "a+b@example.com"])
    | st.emails()
    | st.text(min_size=1).map(lambda text: text.replace("/", "@"))
)
QUERIES = st.sampled_from(["", "?q=a", "?q=%ff", "?q=%00", "?&=", "?q=a&q=b"])


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    directory = tmp_path_factory.mktemp("fuzz")
    with TestClient(create_app(settings_in(directory, worker_concurrency=0))) as client:
        yield client


@settings(max_examples=100, deadline=None)
@given(address=ADDRESSES, query=QUERIES, body=BODIES)
def test_every_answer_is_a_promise_or_a_problem(
    client: TestClient, address: str, query: str, body: bytes
) -> None:
    # A path cannot hold half of a surrogate pair: it is sent as the bytes that others would send.
    path = quote(address.encode("utf-8", "surrogatepass"), safe="")
    response = client.post(
        f"/send-notification/{path}{query}",
        content=body,
        headers={"Content-Type": "application/json"},
    )
    if response.status_code == 202:
        task = client.get(response.headers["location"]).json()
        assert task["status"] == "queued"
    else:
        problem_of(response, 400, 404, 422)
