"""/board/sign-in and /board/sign-out: a browser sends its API key once, and keeps it in a cookie.

app.hardening.access reads the cookie, and refuses forms that another site has sent. It also lets
everyone see the page to sign in.
"""

import re
from collections.abc import Callable
from typing import Annotated

import structlog
from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, Response

from app.api.error_pages import SIGN_IN
from app.api.forms import read_form, see_other
from app.api.key_cookie import forget_key, keep_key
from app.api.pages import page
from app.api.route import ServiceRoute, without_turn

# The overview, the other pages, and their queries. Nothing else can follow a sign-in: no other
# server, and no route that answers with JSON. Browsers resolve /board/../tasks, also with %2E for a
# dot and a backslash for a slash.
_OWN_PAGE = re.compile(r"/(?:(?:board|inbox)(?:[/?][!-~]*)?|\?[!-~]*)?")
_LEADS_ELSEWHERE = re.compile(r"[^?]*(?:\\|/(?:\.|%2e){1,2}(?:[/?]|$))", re.IGNORECASE)
_WRONG_KEY = "This key is not valid."

router = APIRouter(include_in_schema=False, route_class=ServiceRoute)
log = structlog.get_logger(__name__)


@router.get(SIGN_IN)
@without_turn
async def read_sign_in(
    request: Request, next_page: Annotated[str, Query(alias="next")] = "/"
) -> Response:
    """Show the form for the key. A service without keys needs none, and shows its overview."""
    if _client_finder(request) is None:
        return see_other("/")
    return _sign_in_page(request, next_page)


@router.post(SIGN_IN)
@without_turn
async def sign_in(request: Request) -> Response:
    """Check a key, and let the browser keep it."""
    form = await read_form(request)
    key, next_page = form.get("key", "").strip(), form.get("next", "/")
    find_client = _client_finder(request)
    if find_client is None:
        return see_other("/")
    client = find_client(key.encode())
    if client is None:
        log.info("sign-in refused")
        return _sign_in_page(request, next_page, problem=_WRONG_KEY)
    log.info("signed in", client=client)
    response = see_other(own_page(next_page))
    keep_key(request, response, key)
    return response


@router.post("/board/sign-out")
@without_turn
async def sign_out(request: Request) -> Response:
    """Let the browser forget the key."""
    response = see_other(SIGN_IN)
    forget_key(request, response)
    return response


def own_page(address: str) -> str:
    """Return the address if it is a page of this service, or else that of the overview."""
    is_own = _OWN_PAGE.fullmatch(address) and not _LEADS_ELSEWHERE.match(address)
    return address if is_own else "/"


def _client_finder(request: Request) -> Callable[[bytes], str | None] | None:
    """Return the function that finds the client of a key; None if the service has no keys."""
    return getattr(request.app.state, "client_of_key", None)


def _sign_in_page(request: Request, next_page: str, *, problem: str | None = None) -> HTMLResponse:
    return page(
        request,
        "board/sign_in.html",
        status=403 if problem else 200,
        next_page=own_page(next_page),
        problem=problem,
    )
