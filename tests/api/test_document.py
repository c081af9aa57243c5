"""The OpenAPI document says what is so. Schemathesis asks whether the service keeps to it."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterward.fastapi.idempotency import _KEY
from app.mail.message import body_text, header_text
from app.main import create_app
from app.settings import Settings

DOCUMENT: dict[str, Any] = create_app(Settings(_env_file=None)).openapi()
NOTIFICATION = DOCUMENT["components"]["schemas"]["Notification"]["properties"]
HEADER = DOCUMENT["paths"]["/test-task/"]["post"]["parameters"][0]

# Half of a surrogate pair is in no JSON that arrives, so no pattern needs to name it.
CHARACTERS = st.characters(exclude_categories=["Cs"])
SUSPECTS = st.sampled_from(
    "=?\t\n\v\r\0\x1f\x7f\x9f\xa0\u2027\u2028\u202e\u202f\u2065\u2066\u2069a"
)


def takes(schema: dict[str, Any], text: str) -> bool:
    """Whether a schema's pattern matches; in JSON Schema's dialect `$` is the very end."""
    return bool(re.search(schema["pattern"].removesuffix("$") + r"\Z", text))


def test_every_reference_leads_somewhere() -> None:
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(DOCUMENT)):
        place = DOCUMENT
        for name in reference.split("/"):
            place = place[name]


@pytest.mark.parametrize(("field", "check"), [("subject", header_text), ("message", body_text)])
@given(text=st.text(SUSPECTS | CHARACTERS))
def test_the_pattern_of_a_text_takes_what_the_service_takes(
    field: str, check: Callable[[str], str], text: str
) -> None:
    try:
        taken = check(text) == text
    except ValueError:
        taken = False
    assert takes(NOTIFICATION[field], text) == taken


@given(st.text('"!#a~\\ \x7fé', max_size=5) | st.text('"a', min_size=253, max_size=259))
def test_the_pattern_of_an_idempotency_key_takes_what_the_service_takes(key: str) -> None:
    assert HEADER["name"] == "Idempotency-Key"
    assert takes(HEADER["schema"], key) == bool(_KEY.fullmatch(key))
