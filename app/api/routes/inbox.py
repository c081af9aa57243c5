"""GET /inbox: pages with the mails that the embedded catcher has received."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

from app.api.dependencies import CatcherDep
from app.api.pages import example, page
from app.mail.catcher import Catcher
from app.mail.caught import Caught

MOST_LISTED = 200

# The HTML of a mail can neither run scripts nor load anything, even outside its frame.
_SANDBOX = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"

router = APIRouter(tags=["inbox"], include_in_schema=False, default_response_class=HTMLResponse)


async def _running_catcher(catcher: CatcherDep) -> Catcher:
    if catcher is None:
        raise HTTPException(404, "The embedded mail catcher is off. CATCHER=true turns it on.")
    return catcher


RunningCatcher = Annotated[Catcher, Depends(_running_catcher)]


async def _caught_mail(mail_id: str, catcher: RunningCatcher) -> Caught:
    mail = await asyncio.to_thread(catcher.get, mail_id)
    if mail is None:
        raise HTTPException(404, "There is no such mail.")
    return mail


CaughtMail = Annotated[Caught, Depends(_caught_mail)]


@router.get("/inbox")
@router.get("/inbox/")
async def list_mails(request: Request, catcher: RunningCatcher) -> HTMLResponse:
    """List the mails, newest first."""
    mails = await asyncio.to_thread(catcher.list, MOST_LISTED)
    return page(request, "inbox.html", mails=mails, example=example(request))


@router.get("/inbox/{mail_id}")
async def read_mail(request: Request, mail: CaughtMail) -> HTMLResponse:
    """Show one mail, with its HTML in a sandboxed frame."""
    return page(request, "mail.html", mail=mail)


@router.get("/inbox/{mail_id}/html")
async def read_html(mail: CaughtMail) -> HTMLResponse:
    """Return the HTML of a mail, for the frame."""
    if mail.html is None:
        raise HTTPException(404, "This mail has no HTML.")
    return HTMLResponse(mail.html, headers={"Content-Security-Policy": _SANDBOX})
