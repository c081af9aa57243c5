"""Whom mail may be sent to."""

import re
from collections.abc import Sequence


class Recipients:
    """Anybody, or whoever matches one of some patterns such as `*@example.com`.

    Compared are addresses as `message.address` gives them, after IDNA, without regard to case: a
    `*` stands for any characters but @, % and !, by which a server may be told to send a mail on
    to somewhere else (`eve%example.net@example.com`).
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        alternatives = [re.escape(pattern).replace(r"\*", "[^@%!]*") for pattern in patterns]
        flags = re.IGNORECASE | re.ASCII  # else s and k have letters of other scripts for a twin
        self._allowed = re.compile("|".join(alternatives), flags) if patterns else None

    def permit(self, address: str) -> bool:
        """Whether mail may be sent to this address."""
        return self._allowed is None or self._allowed.fullmatch(address) is not None
