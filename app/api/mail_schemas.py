"""The JSON of the inbox, as pydantic models."""

import mimetypes
import re
from datetime import datetime
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field

from app.api.schemas import Pattern, SearchText
from app.mail.caught import Attachment, Caught, Summary
from app.uploads.names import display_name

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class MailQuery(BaseModel):
    """The search and the page of a list of mails."""

    q: Annotated[
        SearchText,
        Field(
            max_length=200,
            description="Words. The mails that are listed have each of them in their sender, a "
            "recipient or their subject, in upper or lower case.",
            examples=["ada invoice"],
        ),
    ] = ""
    limit: Annotated[int, Field(ge=1, le=100)] = 50
    after: Annotated[
        Annotated[str, Pattern("[0-9]{19}-[0-9a-f]{8}", "must be the id of a mail")] | None,
        Field(description="The last id of the previous page. That mail may have been removed."),
    ] = None


class _Mail(BaseModel):
    id: str
    from_: Annotated[
        str,
        Field(serialization_alias="from", description="The sender, from the envelope of the mail."),
    ]
    to: Annotated[list[str], Field(description="The recipients, from the envelope of the mail.")]
    subject: str
    received_at: datetime
    size: Annotated[int, Field(description="In bytes.")]


class MailSummary(_Mail):
    """A mail in the inbox."""

    attachments: Annotated[
        int | None, Field(description="Their number. Null if another program stored the mail.")
    ]

    @classmethod
    def of(cls, mail: Summary) -> Self:
        """Return the public fields of a mail in a list."""
        return cls(**_fields_of(mail), attachments=mail.attachments)


class MailPage(BaseModel):
    """A page of mails, newest first."""

    data: list[MailSummary]
    has_more: bool


class MailAttachment(BaseModel):
    """An attachment: each part of a mail besides its text and its HTML."""

    filename: Annotated[
        str, Field(description="Safe to show, and no path. A part without a name gets one.")
    ]
    content_type: str
    size: Annotated[int, Field(description="In bytes, without the transfer encoding.")]


class MailDetail(_Mail):
    """A mail. `text` and `html` have at most 2 MiB each; the source has the rest."""

    text: str | None
    html: str | None
    headers: Annotated[
        list[tuple[str, str]],
        Field(description="Names and values in their order, with encoded-words decoded."),
    ]
    attachments: list[MailAttachment]

    @classmethod
    def of(cls, mail: Caught) -> Self:
        """Return the public fields of a mail."""
        return cls(
            **_fields_of(mail),
            text=mail.text,
            html=mail.html,
            headers=list(mail.headers),
            attachments=[
                MailAttachment(
                    filename=name_of(attachment, number),
                    content_type=attachment.content_type,
                    size=attachment.size,
                )
                for number, attachment in enumerate(mail.attached)
            ],
        )


def _fields_of(mail: Summary) -> dict[str, Any]:
    return {
        "id": mail.id,
        "from_": mail.sender,
        "to": list(mail.recipients),
        "subject": mail.subject,
        "received_at": mail.received_at,
        "size": mail.size,
    }


def name_of(attachment: Attachment, number: int) -> str:
    """Return the name under which an attachment is shown and saved.

    It is the given name without its path, if that is safe to show. Otherwise it has the number of
    the attachment, which is counted from 0: the first picture is "attachment-1.png".
    """
    extension = mimetypes.guess_extension(attachment.content_type) or ""
    given = _CONTROLS.sub("", attachment.filename or "")
    return display_name(given, f"attachment-{number + 1}{extension}")
