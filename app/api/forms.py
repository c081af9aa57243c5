"""Forms of the pages: read the fields, tell what is wrong with them, answer with a redirect."""

from urllib.parse import parse_qsl

from fastapi import Request
from fastapi.responses import RedirectResponse
from pydantic import ValidationError
from starlette.datastructures import ImmutableMultiDict
from starlette.exceptions import HTTPException

from app.api.errors import message_of
from app.api.json_body import check_coding

MEDIA_TYPE = "application/x-www-form-urlencoded"
MOST_FIELDS = 1000

FormFields = ImmutableMultiDict[str, str]


async def read_form(request: Request) -> FormFields:
    """Return the fields of a form: `fields.get(name)`, or `fields.getlist(name)` for several.

    Raises HTTPException: 415 for another kind of body, 400 for a body that is no form in UTF-8.
    The size of a body is bounded before, by MAX_BODY_BYTES.
    """
    check_coding(request)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != MEDIA_TYPE:
        raise HTTPException(415, f"Send a form, with Content-Type: {MEDIA_TYPE}.")
    body = await request.body()
    try:
        # UTF-8 is the only charset of a form (WHATWG URL, section 5.1).
        text = body.decode("ascii")
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MOST_FIELDS)
    except ValueError:
        raise HTTPException(400, "The form cannot be read.") from None
    return ImmutableMultiDict(pairs)


def messages_of(error: ValidationError) -> dict[str, str]:
    """Return a message for each field that is not valid. No message repeats the value."""
    messages = {
        str(details["loc"][0]): message_of(details)
        for details in error.errors(include_input=False, include_url=False)
    }
    return {name: text[:1].upper() + text[1:] for name, text in messages.items()}


def see_other(path: str) -> RedirectResponse:
    """Answer a form: the browser loads the page at `path`, a path of this service.

    The middleware puts the prefix of a proxy before the path. After the redirect, a reload of the
    page does not send the form again.
    """
    return RedirectResponse(path, 303)
