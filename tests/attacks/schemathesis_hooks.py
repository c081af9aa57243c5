"""Hooks for Schemathesis: rules of the service for requests that JSON Schema cannot express."""

import re
import uuid
from typing import Any

import schemathesis
from hypothesis import strategies as st

# The format "email" also allows addresses in reserved domains, which the service refuses
# (RFC 6761), encoded-words in the local part, which it refuses too, and per cent signs, which
# Schemathesis does not encode in a path.
schemathesis.openapi.format(
    "email",
    st.emails(domains=st.sampled_from(["example.com", "EXAMPLE.org"])).filter(
        lambda address: "=?" not in address and "%" not in address
    ),
)


@schemathesis.hook
def before_call(
    context: schemathesis.HookContext,
    case: schemathesis.Case[Any],
    kwargs: dict[str, Any],
) -> None:
    """Make each Idempotency-Key unique, because the service refuses a key with a new request.

    Add a condition to a filter of nulls, because a bulk action needs one.
    """
    key = case.headers.get("Idempotency-Key", "")
    if re.fullmatch(r'"[!#-~]{1,255}"|[!#-~][!-~]{0,254}', key):
        case.headers["Idempotency-Key"] = uuid.uuid4().hex + key[32:255]
    wanted = case.body.get("filter") if isinstance(case.body, dict) else None
    if isinstance(wanted, dict) and wanted and all(value is None for value in wanted.values()):
        wanted["kind"] = "send_email"
