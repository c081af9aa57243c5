"""Addresses for which the catcher fails on purpose. They show failures without a broken server.

    refuse+550@…   RCPT is answered with 550: the mail fails for good. 500 to 559; but after a code
                   about the server, such as 530, the mail is tried again
    defer+451@…    the first two attempts of each mail are answered with 451. 400 to 459
    slow+3@…       the answer to the content comes 3 seconds late. At most 30

Only the part before the @ counts, in any case. Every other address is an ordinary one, also
`refuse+999@…`.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import sha256

from app.mail.fields import first_field

DEFERRED_ATTEMPTS = 2  # of each mail; the next one is accepted
LONGEST_DELAY = 30  # seconds
MOST_REMEMBERED = 1_000  # deferred mails

# The second digit of a reply is 0 to 5 (RFC 5321, 4.2).
_REFUSE = re.compile("refuse\\+(5[0-5][0-9])", re.IGNORECASE)
_DEFER = re.compile("defer\\+(4[0-5][0-9])", re.IGNORECASE)
_SLOW = re.compile("slow\\+([0-9]{1,9})", re.IGNORECASE)


def refusal(address: str) -> str | None:
    """Return the reply to RCPT for an address that asks to be refused, or else None."""
    code = _number(_REFUSE, address)
    return code and f"{code} 5.0.0 This address asks the catcher to refuse its mail"


def delay(recipients: Sequence[str]) -> float:
    """Return for how many seconds the reply to the content of a mail is delayed."""
    seconds = (int(_number(_SLOW, address) or 0) for address in recipients)
    return min(max(seconds, default=0), LONGEST_DELAY)


class Deferrals:
    """Counts the attempts of mails to addresses that ask to be deferred.

    A mail is recognised by its recipient and its Message-ID, or by its content without one. The
    counts are kept in memory: after a restart they begin again.
    """

    def __init__(self) -> None:
        self._attempts: OrderedDict[bytes, int] = OrderedDict()

    def deferral(self, recipients: Sequence[str], content: bytes) -> str | None:
        """Count an attempt. Return the reply to the content if it is deferred, or else None.

        An attempt counts for every recipient that asks for a deferral, so a mail to several is not
        deferred longer. An accepted mail is forgotten.
        """
        deferring = [address for address in recipients if _number(_DEFER, address)]
        if not deferring:
            return None
        mail = _digest((first_field(content, b"message-id") or "").encode() or content)
        codes = {
            _digest(mail + address.lower().encode("utf-8", "replace")): _number(_DEFER, address)
            for address in deferring
        }
        attempts = {key: self._attempts.pop(key, 0) + 1 for key in codes}
        for key, attempt in attempts.items():
            if attempt <= DEFERRED_ATTEMPTS:
                self._remember(attempts)
                return (
                    f"{codes[key]} 4.0.0 This address asks the catcher to defer its mail: "
                    f"attempt {attempt} of {DEFERRED_ATTEMPTS} that are deferred"
                )
        return None

    def _remember(self, attempts: Mapping[bytes, int]) -> None:
        self._attempts.update(attempts)
        while len(self._attempts) > MOST_REMEMBERED:
            self._attempts.popitem(last=False)


def _digest(content: bytes) -> bytes:
    return sha256(content).digest()


def _number(form: re.Pattern[str], address: str) -> str | None:
    """Return the number in the local part of an address that has this form, or else None."""
    match = form.fullmatch(address.rpartition("@")[0])
    return match and match[1]
