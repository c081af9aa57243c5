"""/inbox: the mails that the embedded catcher has received. app.api.routes.inbox has their JSON."""

import asyncio
import re
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from app.api.forms import messages_of, read_form, see_other
from app.api.mail_schemas import MailDetail, MailQuery
from app.api.negotiation import VARY_BY_ACCEPT
from app.api.page_texts import query_with
from app.api.pages import example, page
from app.api.route import ServiceRoute, without_turn
from app.api.routes.inbox import ExistingMail, RunningCatcher, delete_with
from app.api.schemas import SearchText
from app.mail.message import task_of

LONGEST_TEXT = 200_000  # characters of a mail's text on its page; escaped, each can become five
VIEWS = ("html", "text", "headers", "attachments")
_NOT_HERE = (
    "No mail with this Message-ID is in the inbox, or not yet: its task may have to send it first. "
    "It may also have been deleted, or given way to newer mails."
)
# The HTML of a mail can neither run scripts nor load anything, even outside its frame. The policy
# does not cover the connections that a browser prepares: it looks up the hosts of links, and
# connects to those of <link rel="preconnect">, and of frames before the policy forbids them. That
# would tell the sender that the mail was read.
_CONNECTING = re.compile(r"<(?=link|i?frame)", re.IGNORECASE)
_SANDBOX = {
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-DNS-Prefetch-Control": "off",
}

router = APIRouter(include_in_schema=False, route_class=ServiceRoute)


@router.get("/inbox", dependencies=[VARY_BY_ACCEPT])
@router.get("/inbox/", dependencies=[VARY_BY_ACCEPT])
@without_turn
async def show_list(request: Request, catcher: RunningCatcher) -> HTMLResponse:
    """Show a page of the list, newest first, with a form for a search."""
    try:
        query = MailQuery.model_validate(dict(request.query_params))
    except ValidationError as error:
        return _list_page(request, status=422, errors=messages_of(error))
    mails = await asyncio.to_thread(
        catcher.list, query.q.split(), after=query.after, limit=query.limit + 1
    )
    shown = mails[: query.limit]
    return _list_page(
        request,
        status=200 if shown or query.after is None else 404,
        mails=shown,
        older=query_with(request, after=shown[-1].id) if len(mails) > query.limit else None,
        is_first=query.after is None,
        count=await asyncio.to_thread(catcher.count),
    )


def _list_page(request: Request, *, status: int, **found: Any) -> HTMLResponse:
    nothing = dict[str, Any](errors={}, mails=[], older=None, is_first=True, count=0)
    return page(
        request,
        "inbox.html",
        status=status,
        typed=request.query_params.get("q", ""),
        newest=query_with(request, after=None),
        example=example(request),
        **(nothing | found),
    )


@router.post("/inbox/delete")
@without_turn
async def delete_all(request: Request, catcher: RunningCatcher) -> Response:
    """Delete the mails that the list has shown, and not those that came since."""
    form = await read_form(request)
    await delete_with(catcher.delete_all, form.get("newest", ""))
    return see_other("/inbox")


@router.get("/inbox/by-message-id/{message_id:path}")
@without_turn
async def find_mail(message_id: str, catcher: RunningCatcher) -> Response:
    """Go to the newest mail with this Message-ID, which the task of a mail knows."""
    mail_id = await asyncio.to_thread(catcher.find, message_id)
    if mail_id is None:
        raise HTTPException(404, _NOT_HERE)
    return see_other(f"/inbox/{mail_id}")


@router.get("/inbox/{mail_id}", dependencies=[VARY_BY_ACCEPT])
@without_turn
async def show_mail(request: Request, mail: ExistingMail, view: str = "") -> HTMLResponse:
    """Show one mail: its HTML, its text, its header fields or its attachments."""
    best = "text" if mail.html is None else "html"
    return page(
        request,
        "mail.html",
        mail=mail,
        text=mail.text and mail.text[:LONGEST_TEXT],
        is_cut=mail.is_cut or len(mail.text or "") > LONGEST_TEXT,
        attachments=MailDetail.of(mail).attachments,
        view=view if view in VIEWS else best,
        task=task_of(mail.message_id or ""),
    )


@router.get("/inbox/{mail_id}/html")
@without_turn
async def read_html(mail: ExistingMail) -> HTMLResponse:
    """Return the HTML of a mail, for the frame. Each <link> in it becomes a comment: <!link>."""
    if mail.html is None:
        raise HTTPException(404, "This mail has no HTML.")
    return HTMLResponse(_CONNECTING.sub("<!", mail.html), headers=_SANDBOX)


@router.post("/inbox/{mail_id}/delete")
@without_turn
async def delete_mail(mail_id: SearchText, catcher: RunningCatcher) -> Response:
    """Delete one mail. After a double click, it is gone already."""
    await delete_with(catcher.delete, mail_id)
    return see_other("/inbox")
