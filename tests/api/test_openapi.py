"""The OpenAPI document: its references exist, and its patterns match what the service accepts.

Whether the responses keep to the document is tested by tests/attacks/test_schemathesis.py.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.routing import APIRoute
from hypothesis import given
from hypothesis import strategies as st

from afterward.fastapi.idempotency import _KEY
from app.mail.message import body_text, header_text
from app.main import create_app
from app.settings import Settings

APP = create_app(Settings(_env_file=None))
DOCUMENT: dict[str, Any] = APP.openapi()
NOTIFICATION = DOCUMENT["components"]["schemas"]["Notification"]["properties"]
HEADER = DOCUMENT["paths"]["/test-task/"]["post"]["parameters"][0]

# No pattern needs to exclude surrogates, because no JSON that arrives contains one.
CHARACTERS = st.characters(exclude_categories=["Cs"])
SUSPECTS = st.sampled_from(
    "=?\t\n\v\r\0\x1f\x7f\x9f\xa0\u2027\u2028\u202e\u202f\u2065\u2066\u2069a"
)


def matches(schema: dict[str, Any], text: str) -> bool:
    """Return whether a schema's pattern matches; in JSON Schema `$` matches the very end only."""
    return bool(re.search(schema["pattern"].removesuffix("$") + r"\Z", text))


def test_every_reference_in_the_document_has_a_target() -> None:
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(DOCUMENT)):
        place = DOCUMENT
        for name in reference.split("/"):
            place = place[name]


def test_each_operation_has_the_name_of_its_function() -> None:
    """Generated clients name their functions after it, so no two operations share a name."""
    operations = [operation for path in DOCUMENT["paths"].values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations]

    assert {"send_notification", "list_tasks", "read_task", "retry_task"} <= set(names)
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z]+(_[a-z]+)*", name) for name in names)
    functions = {route.endpoint.__name__ for route in APP.routes if isinstance(route, APIRoute)}
    assert set(names) <= functions


@pytest.mark.parametrize(("field", "check"), [("subject", header_text), ("message", body_text)])
@given(text=st.text(SUSPECTS | CHARACTERS))
def test_the_pattern_of_a_text_matches_what_the_service_accepts(
    field: str, check: Callable[[str], str], text: str
) -> None:
    try:
        taken = check(text) == text
    except ValueError:
        taken = False
    assert matches(NOTIFICATION[field], text) == taken


@given(st.text('"!#a~\\ \x7fé', max_size=5) | st.text('"a', min_size=253, max_size=259))
def test_the_pattern_of_an_idempotency_key_matches_what_the_service_accepts(key: str) -> None:
    assert HEADER["name"] == "Idempotency-Key"
    assert matches(HEADER["schema"], key) == bool(_KEY.fullmatch(key))
