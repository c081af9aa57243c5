"""What the service asks of a request that JSON Schema has no words for."""

import re
import uuid
from typing import Any

import schemathesis
from hypothesis import strategies as st

# "email" also stands for addresses in domains that nobody can have (RFC 6761). And not in the
# local part: an encoded-word, or a per cent sign, which schemathesis sends in a path as it is.
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
    """Use no Idempotency-Key twice: for another request it would be refused, and rightly so."""
    key = case.headers.get("Idempotency-Key", "")
    if re.fullmatch(r'"[!#-~]{1,255}"|[!#-~][!-~]{0,254}', key):
        case.headers["Idempotency-Key"] = uuid.uuid4().hex + key[32:255]
