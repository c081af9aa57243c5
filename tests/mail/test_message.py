"""The checks of a mail's fields, and the bytes that it is composed to."""

import re
import string
from datetime import UTC, datetime
from email import message_from_bytes, policy
from email.message import EmailMessage

import pytest
from email_validator import EmailNotValidError, validate_email
from hypothesis import assume, example, given
from hypothesis import strategies as st

from app.mail.message import address, body_text, compose, header_text, message_id, task_of

NOON = datetime(2025, 1, 2, 12, 0, tzinfo=UTC)
TASK = "01a1f8ed-6e76-70fa-96de-2c8618644aa5"
UNPAIRED = "\ud800"
LONG_DOMAIN = ".".join(["x" * 61] * 2 + ["x" * 61, "com"])  # 254 octets with 64 before the @

FORBIDDEN_IN_HEADERS = [
    *(chr(code) for code in [*range(0x20), *range(0x7F, 0xA0)]),
    "\u2028",
    "\u2029",
    "\r\n",
    "\r\nBcc: eve@example.com",
    UNPAIRED,
    "\udfff",
    "\u202e",
    "\u2066",
    "=?utf-8?q?Bcc=3A?=",
    "=?utf-8?B?QmNj?=",
    "=?iso-8859-1?Q?=0D=0ABcc:_eve=40example.com?=",
]

PRINTABLE = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=200)
BODIES = st.text(
    st.one_of(st.sampled_from("\r\n\t. a=é"), st.characters(exclude_categories=["Cc", "Cs"])),
    max_size=500,
)


def build(**changes: str | None) -> EmailMessage:
    values: dict[str, str | None] = {
        "sender": "notifications@example.com",
        "recipient": "ada@example.org",
        "subject": "Hello",
        "text": "Dear Ada",
        "message_id": "<task-1@example.com>",
    }
    return compose(date=NOON, **(values | changes))  # type: ignore[arg-type]


def parsed(message: EmailMessage) -> EmailMessage:
    return message_from_bytes(message.as_bytes(), policy=policy.default)


def body(message: EmailMessage, kind: str) -> str:
    part = parsed(message).get_body((kind,))
    assert part is not None
    content: str = part.get_content()
    return content.replace("\r\n", "\n")


@pytest.mark.parametrize("html", [None, "<p>Dear Ada</p>"])
def test_the_same_inputs_give_the_same_bytes(html: str | None) -> None:
    assert build(html=html).as_bytes() == build(html=html).as_bytes()


def test_the_headers_are_a_fixed_set() -> None:
    assert parsed(build(html="<p>Dear Ada</p>")).keys() == [
        "From",
        "To",
        "Subject",
        "Message-ID",
        "Date",
        "Auto-Submitted",
        "MIME-Version",
        "Content-Type",
    ]


def test_the_message_id_consists_of_the_task_id_and_the_senders_domain() -> None:
    assert message_id("7f3a", "notifications@example.com") == "<7f3a@example.com>"


@pytest.mark.parametrize(
    ("message_id", "task"),
    [
        (message_id(TASK, "notifications@example.com"), TASK),
        (f"<{TASK}@>", TASK),
        (f"{TASK}@example.com", None),
        (f"<{TASK}@a@b>", None),
        (f"<{TASK.upper()}@example.com>", None),
        (f"<{TASK}>", None),
        ("<7f3a@example.com>", None),
        ("", None),
    ],
)
def test_the_task_is_read_from_its_message_id_only(message_id: str, task: str | None) -> None:
    assert task_of(message_id) == task


def test_text_and_html_are_alternatives_with_the_text_first() -> None:
    message = build(text="plain", html="<p>rich</p>")
    kinds = [part.get_content_type() for part in parsed(message).iter_parts()]
    assert kinds == ["text/plain", "text/html"]
    assert body(message, "plain") == "plain\n"
    assert body(message, "html") == "<p>rich</p>\n"


def test_a_body_that_contains_the_boundary_does_not_end_its_part() -> None:
    first = build(text="x", html="<p>y</p>").get_boundary()
    message = build(text=f"x\n--{first}--\n", html="<p>y</p>")
    assert body(message, "plain") == f"x\n--{first}--\n"


@given(subject=PRINTABLE)
def test_a_subject_arrives_as_it_was_given(subject: str) -> None:
    assume("=?" not in subject)
    assume(not re.search("[\u202a-\u202e\u2066-\u2069]", subject))
    raw = build(subject=subject).as_bytes()
    assert message_from_bytes(raw, policy=policy.default)["Subject"] == subject
    header, _, _ = raw.partition(b"\r\nMessage-ID")
    assert max(map(len, header.split(b"\r\n"))) <= 78


@given(text=BODIES, html=st.none() | BODIES)
def test_lines_end_in_crlf_have_at_most_998_bytes_and_contain_only_ascii(
    text: str, html: str | None
) -> None:
    raw = build(text=text, html=html).as_bytes()
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n|[^\t\r\n\x20-\x7e]", raw)
    assert max(map(len, raw.split(b"\r\n"))) <= 998


LINES = st.lists(
    st.sampled_from(
        ["x" * 77, "x" * 78, "x" * 79, "x" * 1200, "é" * 40, "", ".", " ", "--=_", "="]
    ),
    max_size=15,
).map("\r\n".join)


@given(text=BODIES | LINES, html=BODIES | LINES)
def test_two_bodies_give_the_same_bytes_as_the_standard_library(text: str, html: str) -> None:
    written = build(text=text, html=html)
    usual = build(text=text)
    usual.add_alternative(html, subtype="html")
    usual.set_boundary(str(written.get_boundary()))
    assert written.as_bytes() == usual.as_bytes()


@given(text=BODIES)
def test_a_body_arrives_unchanged_except_for_its_line_ends(text: str) -> None:
    # Only CR, LF and CRLF end a line in a mail. str.splitlines knows more line ends.
    expected = re.sub("\r\n|\r|\n", "\n", text).removesuffix("\n") + "\n"
    assert body(build(text=text), "plain") == expected


@pytest.mark.parametrize("forbidden", FORBIDDEN_IN_HEADERS)
@pytest.mark.parametrize("place", ["{}", "{}after", "before{}", "before{}after"])
@pytest.mark.thorough
def test_a_header_refuses_characters_that_could_start_another_header(
    forbidden: str, place: str
) -> None:
    subject = place.format(forbidden)
    with pytest.raises(ValueError, match=r"^must not hold") as complaint:
        header_text(subject)
    assert forbidden not in str(complaint.value)
    with pytest.raises(ValueError, match=r"^must not hold"):
        build(subject=subject)


@pytest.mark.parametrize("name", ["sender", "recipient", "message_id"])
def test_no_header_can_be_injected_through_an_address_or_the_message_id(name: str) -> None:
    with pytest.raises(ValueError, match=r"^must "):
        build(**{name: "<x@example.com>\r\nBcc: eve@example.com"})


@pytest.mark.parametrize(
    "subject",
    [
        "",
        "Ünïcödé, and no end",
        "👩\u200d💻 and 🏳\ufe0f\u200d🌈",
        "می\u200cخواهم",  # noqa: RUF001 -- Persian
        "\u200fעברית",  # noqa: RUF001 -- Hebrew
        "what=? is =?this",
    ],
)
def test_a_header_accepts_any_language_and_emoji(subject: str) -> None:
    assert header_text(subject) == subject


@pytest.mark.parametrize("forbidden", ["\0", "\x0b", "\x0c", "\x1b", "\x7f", "\x85", UNPAIRED])
def test_a_body_refuses_controls_and_lone_surrogates(forbidden: str) -> None:
    with pytest.raises(ValueError, match=r"^must not hold") as complaint:
        body_text(f"before{forbidden}after")
    assert forbidden not in str(complaint.value)
    for bodies in ({"text": forbidden}, {"html": forbidden}, {"text": forbidden, "html": "y"}):
        with pytest.raises(ValueError, match=r"^must not hold"):
            build(**bodies)


def test_a_body_accepts_tabs_and_every_line_end() -> None:
    text = "a\tb\rc\nd\r\ne\u2028f"
    assert body_text(text) == text


@pytest.mark.parametrize(
    ("given_address", "mailbox"),
    [
        ("ada@example.com", "ada@example.com"),
        ("Ada@EXAMPLE.com", "Ada@example.com"),
        ("ada+tag@example.com", "ada+tag@example.com"),
        ("-oQ@example.com", "-oQ@example.com"),
        ("ada@bücher.example.com", "ada@xn--bcher-kva.example.com"),
        ("ada@ⓔxample.com", "ada@example.com"),
        ("x" * 64 + "@example.com", "x" * 64 + "@example.com"),
        ("PostMaster@example.com", "postmaster@example.com"),
        (f"{'x' * 64}@{LONG_DOMAIN}", f"{'x' * 64}@{LONG_DOMAIN}"),
    ],
)
def test_an_address_is_converted_to_ascii(given_address: str, mailbox: str) -> None:
    assert address(given_address) == mailbox


@pytest.mark.parametrize(
    "refused",
    [
        "",
        "ada",
        "ada@",
        "@example.com",
        "a,v@example.com",
        "ada@example.com,eve@example.com",
        "Ada <ada@example.com>",
        "g: a@example.com, b@example.com;",
        '"a b"@example.com',
        "ada@[127.0.0.1]",
        "ada@localhost",
        "ada@example.com\r\nRCPT TO:<eve@example.com>",
        "ada\0@example.com",
        "ada%0d%0a@example.com\n",
        "ada@example.com\udcff",
        f"ada{UNPAIRED}@example.com",
        "ädä@example.com",
        "=?utf-8?q?eve=40example.com?=@example.com",
        "x" * 65 + "@example.com",
        "ada@" + ".".join(["x" * 60] * 4) + ".example.com",
        "ada@" + ".".join(["ü" * 30] * 8) + ".com",
        f"{'x' * 64}@x{LONG_DOMAIN}",
        "@".join(["x" * 64, ".".join(["ü" * 40] * 2 + ["com"]) + "." + "x" * 20 + ".com"]),
    ],
)
def test_anything_but_a_single_plain_mailbox_is_refused(refused: str) -> None:
    with pytest.raises(ValueError, match=r"^must ") as complaint:
        address(refused)
    assert str(complaint.value) in {
        "must be one email address, such as ada@example.com",
        "must not hold an encoded-word (=?…?=)",
    }


@pytest.mark.parametrize(
    "domain",
    [
        "corp.local",
        "site.test",
        "mail.internal",
        "host.localhost",
        "x.invalid",
        "x.onion",
        "a.arpa",
    ],
)
def test_special_use_domains_are_accepted_for_mail_inside_a_company(domain: str) -> None:
    assert address(f"ada@{domain}") == f"ada@{domain}"


# Building blocks of addresses near the border between valid and invalid. Some of them change in the
# conversion to ASCII.
PIECES = st.sampled_from(
    [
        *("@", "@", "@", ".", ".", "..", "-", "=?", "?=", "1", "a", "Ada", "INFO", "Postmaster"),
        *"<>()[],:;\\\"' \t\r\n\0\x7f=?_+!%`{|}~^",
        *("example.com", "com", "test", "localhost", "arpa", "[127.0.0.1]", "[IPv6:::1]"),
        *("xn--", "xn--bcher-kva", "ab--c", "x" * 60, "x" * 63, "x" * 64, "x" * 190),
        *("bücher", "ü" * 30, "ü" * 55, "日本" * 10, "ß", "\u017f", "\u212a", "ⓔ", "אב", "\u0661"),
        *("e\u0301", "\u0338", "\uff20", "\ufe6b", "\u3002", "\uff0e"),
        *("\u200d", "\u202e", "\ufe0f", UNPAIRED),
    ]
)
LOCAL_PARTS = st.lists(PIECES, max_size=5).map("".join) | st.text(max_size=70)
DOMAINS = (
    st.lists(PIECES, max_size=6).map("".join)
    | st.lists(PIECES, min_size=1, max_size=6).map(".".join).map("{}.com".format)
    | st.lists(st.integers(1, 64).map("ü".__mul__), max_size=5).map(".".join).map("{}.com".format)
    | st.lists(st.integers(1, 64).map("x".__mul__), max_size=5).map(".".join).map("{}.com".format)
    | st.just("example.com")
)


@given(LOCAL_PARTS, DOMAINS)
@example("x" * 64, LONG_DOMAIN)
@example("x" * 64, "x" + LONG_DOMAIN)
def test_an_address_is_accepted_exactly_if_email_validator_accepts_it(
    local: str, domain: str
) -> None:
    """The service's own check is twenty times faster, because it remembers the checked domains."""
    value = f"{local}@{domain}"
    try:
        expected = validate_email(
            value, check_deliverability=False, allow_smtputf8=False, strict=True
        ).ascii_email
    except EmailNotValidError:
        expected = None
    if expected is not None and "=?" not in expected:
        assert address(value) == expected
    else:
        with pytest.raises(
            ValueError, match="^must not hold an enc" if expected else "^must be one"
        ):
            address(value)


@given(st.text(st.characters() | st.sampled_from(string.printable), max_size=300))
def test_an_address_is_safe_on_a_command_line_or_refused(text: str) -> None:
    for value in (text, f"{text}@example.com", f"ada@{text}"):
        try:
            mailbox = address(value)
        except ValueError:
            continue
        assert re.fullmatch(r"[!#-'*+\-/-9=?A-Z^-~.]+@[a-z0-9.-]+", mailbox)
        assert len(mailbox) <= 254
        assert address(mailbox) == mailbox
