"""The addresses to which mail may be sent (ALLOWED_RECIPIENTS)."""

import re
from collections.abc import Sequence


class Recipients:
    """All addresses, or those that match one of some patterns such as `*@example.com`.

    Addresses are compared as `message.address` returns them, after IDNA, and without regard to
    case. A `*` matches any characters but @, % and !. With those a client could route the mail to
    another domain: some servers send `eve%example.net@example.com` on to example.net.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        alternatives = [re.escape(pattern).replace(r"\*", "[^@%!]*") for pattern in patterns]
        flags = re.IGNORECASE | re.ASCII  # without ASCII, U+017F matches s and U+212A k
        self._allowed = re.compile("|".join(alternatives), flags) if patterns else None

    def permit(self, address: str) -> bool:
        """Return whether mail may be sent to this address."""
        return self._allowed is None or self._allowed.fullmatch(address) is not None
