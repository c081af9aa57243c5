"""Builds mails, always of the same bytes, and checks addresses, headers and texts."""

import hashlib
import re
from datetime import datetime
from email.header import Header
from email.message import EmailMessage, MIMEPart
from email.policy import EmailPolicy
from email.utils import format_datetime
from functools import lru_cache
from typing import cast

from email_validator import SPECIAL_USE_DOMAIN_NAMES, EmailNotValidError, validate_email
from email_validator.rfc_constants import (
    CASE_INSENSITIVE_MAILBOX_NAMES,
    DOT_ATOM_TEXT,
    EMAIL_MAX_LENGTH,
    LOCAL_PART_MAX_LENGTH,
)

# Allow special-use domains (RFC 6761, RFC 6762), because companies have internal ones such as
# corp.local and site.test. The SMTP server decides whether a domain takes mail. email-validator
# documents this way to allow them.
SPECIAL_USE_DOMAIN_NAMES.clear()

LINE_LENGTH = 78  # characters that a line should have at most (RFC 5322, 2.1.1); 998 is the limit


def compose(
    *,
    sender: str,
    recipient: str,
    subject: str,
    text: str,
    html: str | None = None,
    message_id: str,
    date: datetime,
) -> EmailMessage:
    """Build one mail. The same arguments always give the same bytes.

    `sender` and `recipient` are addresses as `address` returns them; `Mailer.send` checks them.
    `date` has a time zone; `message_id` comes from the function of that name. Raises ValueError
    for any text that `header_text` or `body_text` refuses.
    """
    message = EmailMessage(policy=_POLICY)
    message["From"] = sender
    message["To"] = recipient
    message["Subject"] = subject
    message["Message-ID"] = message_id
    message["Date"] = format_datetime(date)
    message["Auto-Submitted"] = "auto-generated"  # stops out-of-office replies (RFC 3834, 5)
    text = body_text(text)
    if html is None:
        message.set_content(text)
        return message
    html = body_text(html)
    boundary = _boundary(message_id, text, html)
    message["MIME-Version"] = "1.0"
    message["Content-Type"] = f'multipart/alternative; boundary="{boundary}"'
    # The parts are written by hand, because add_alternative takes nearly twice as long.
    message.set_payload(
        f"--{boundary}\r\n{_part('plain', text)}\r\n"
        f"--{boundary}\r\n{_part('html', html, 'MIME-Version: 1.0')}\r\n"
        f"--{boundary}--\r\n"
    )
    return message


def message_id(task_id: str, sender: str) -> str:
    """Return a Message-ID, `<task@domain>`, the same on every attempt (RFC 5322, 3.6.4)."""
    return f"<{task_id}@{sender.rpartition('@')[2]}>"


def task_of(message_id: str) -> str | None:
    """Return the id of the task in a Message-ID as the function above makes it, or None."""
    match = _MESSAGE_ID.fullmatch(message_id)
    return match and match[1]


_MESSAGE_ID = re.compile(r"<([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})@[^@<>]*>")


def address(value: str) -> str:
    """Return one email address in ASCII, with its domain in lower case and after IDNA.

    For example, `Ada@Exämple.com` becomes `Ada@xn--exmple-cua.com`. The result is safe in an SMTP
    command and in a header.

    Raises ValueError for anything but one plain address: for a display name, a list, a quoted local
    part, an address literal, more than 64 octets before the @, or more than 254 octets in all (RFC
    5321, 4.5.3.1). The message does not repeat the value.
    """
    local, _, domain = value.partition("@")
    if len(local) > LOCAL_PART_MAX_LENGTH or not DOT_ATOM_TEXT.match(local):
        raise ValueError(_NO_ADDRESS)
    ascii_domain, longest = _domain(domain)
    if len(local) + len("@") + longest > EMAIL_MAX_LENGTH:
        raise ValueError(_NO_ADDRESS)
    # RFC 5322, 3.2.3, allows it, but a program that decodes it reads another recipient.
    if "=?" in local:
        raise ValueError("must not hold an encoded-word (=?…?=)")
    if local.lower() in CASE_INSENSITIVE_MAILBOX_NAMES:  # postmaster and the like (RFC 2142)
        local = local.lower()
    return f"{local}@{ascii_domain}"


@lru_cache(maxsize=1024)  # a check is slow, and most mail goes to few domains
def _domain(value: str) -> tuple[str, int]:
    """Return a domain in ASCII, and the length in octets of the longest of its three forms.

    The forms are the value itself, the domain in Unicode, and the domain in ASCII.
    """
    try:
        found = validate_email(f"a@{value}", check_deliverability=False)
    except EmailNotValidError:
        # The error of email-validator repeats parts of the value.
        raise ValueError(_NO_ADDRESS) from None
    forms = (value, found.domain, found.ascii_domain)
    return found.ascii_domain, max(len(form.encode()) for form in forms)


_NO_ADDRESS = "must be one email address, such as ada@example.com"


def header_text(value: str) -> str:
    """Return the value if it is safe in a header.

    Raises ValueError for control characters and line breaks, which could end the header; for an
    encoded-word (RFC 2047), which would be decoded; and for characters that change the direction of
    the text. The message does not repeat the value. Joiners, variation selectors and plain
    direction marks are allowed, because emoji, Persian and Hebrew need them.
    """
    for characters, complaint in _NOT_IN_HEADERS:
        if characters.search(value):
            raise ValueError(complaint)
    start = value.find("=?")
    if start >= 0 and value.find("?=", start + 2) >= 0:
        raise ValueError("must not hold an encoded-word (=?…?=)")
    return value


def body_text(value: str) -> str:
    """Return the value if it is safe in a body.

    Raises ValueError for lone surrogates, and for control characters other than tab, CR and LF. The
    message does not repeat the value.
    """
    for characters, complaint in _NOT_IN_BODIES:
        if characters.search(value):
            raise ValueError(complaint)
    return value


_SURROGATES = (
    re.compile("[\ud800-\udfff]"),
    "must not hold half of a surrogate pair",
)
_NOT_IN_HEADERS = (
    _SURROGATES,
    (
        re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]"),
        "must not hold control characters or line breaks",
    ),
    (
        re.compile("[\u202a-\u202e\u2066-\u2069]"),
        "must not hold characters that change the direction of the text",
    ),
)
_NOT_IN_BODIES = (
    _SURROGATES,
    (
        re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),
        "must not hold control characters other than tabs and line breaks",
    ),
)


def _boundary(*parts: str) -> str:
    """Return a boundary that neither part can contain, because it is a hash over both."""
    return "=_" + hashlib.blake2s("\0".join(parts).encode(), digest_size=12).hexdigest()


def _part(subtype: str, body: str, *more_headers: str) -> str:
    """Return one part of a multipart mail: its headers, an empty line and the encoded body."""
    encoding, content = _encoded(body)
    headers = (
        f'Content-Type: text/{subtype}; charset="utf-8"',
        f"Content-Transfer-Encoding: {encoding}",
        *more_headers,
    )
    return "\r\n".join([*headers, "", content])


def _encoded(body: str) -> tuple[str, str]:
    """Return a Content-Transfer-Encoding (RFC 2045, 6), and the body in this encoding."""
    lines = body.splitlines()
    if body.isascii() and all(len(line) <= LINE_LENGTH for line in lines):
        return "7bit", "\r\n".join(lines) + "\r\n"
    part = MIMEPart(policy=_POLICY)
    part.set_content(body)
    content = cast(str, part.get_payload())  # its lines end in LF alone
    return part["Content-Transfer-Encoding"], content.replace("\n", "\r\n")


class _HeadersAsGiven(EmailPolicy):
    """Checks each header when it is set, and never parses one.

    The standard policies parse each header. That takes most of the time of building a mail, and in
    Python 3.11.7 it could turn an encoded-word into a header of its own. They also lose spaces when
    they fold a long subject.
    """

    def header_store_parse(self, name: str, value: str) -> tuple[str, str]:
        return name, header_text(value)

    def header_max_count(self, name: str) -> None:
        """Return None, so that headers are not counted: `compose` sets each only once."""

    def header_fetch_parse(self, name: str, value: str) -> str:  # noqa: ARG002 -- the base's signature
        return value

    def fold_binary(self, name: str, value: str) -> bytes:
        if name == "Subject" and not _fits_one_line(value):
            value = Header(value, "utf-8", header_name=name).encode(linesep=self.linesep)
        return f"{name}: {value}{self.linesep}".encode("ascii")


def _fits_one_line(subject: str) -> bool:
    # A space at either end would be lost on the way, so such a subject is encoded.
    return (
        subject.isascii()
        and subject == subject.strip()
        and len("Subject: ") + len(subject) <= LINE_LENGTH
    )


_POLICY = _HeadersAsGiven(linesep="\r\n", cte_type="7bit", max_line_length=LINE_LENGTH)
