"""Protection against hostile clients. The service works without it.

app.main attaches it to the app with `harden`. app.__main__ attaches `deadlines` to the server.

request_checks  refuses ambiguous requests and large bodies
access          asks for an API key, and refuses web pages and forms of other sites
api_keys        reads the API keys, and finds the client of a key
rate_limit      limits the requests of each client
origins         lets the web pages of listed origins use the API (CORS)
openapi         describes the API keys in the OpenAPI document
deadlines       disconnects slow clients, and bounds the heads of requests
"""

from fastapi import FastAPI
from starlette.middleware import Middleware

from app.api.error_pages import SIGN_IN
from app.hardening.access import AccessCheck, KeyWatch
from app.hardening.api_keys import ApiKeys, BadKeys
from app.hardening.openapi import document_keys
from app.hardening.origins import Origins
from app.hardening.rate_limit import RateLimit
from app.hardening.request_checks import BodyLimit, RequestChecks, check_framing
from app.settings import BadSettings, Settings
from app.uploads.multipart import largest_form

# Bytes of the form to sign in. It is the only body that is read from clients without a key, and all
# of it is held in memory: no more than of the head of a request.
LARGEST_SIGN_IN = 32 * 1024


def harden(app: FastAPI, settings: Settings) -> None:
    """Attach the protection to an app that app.main has made.

    The checks run inside the app's own middleware, because that gives each request an id and a
    state, and each refusal its headers. CORS runs outside of it, because a browser's preflight
    request carries no API key, and because a script may read an error only with CORS headers.
    """
    keys = _api_keys(settings)
    rate_limit = RateLimit(settings.rate_limit) if settings.rate_limit else None
    access = AccessCheck(keys, rate_limit, settings.cors_origins)
    if keys is not None:
        app.state.client_of_key = keys.client_of  # for the page to sign in
    file_form = largest_form(settings.max_upload_bytes)
    sign_in = min(LARGEST_SIGN_IN, settings.max_body_bytes)
    # Starlette runs the first middleware of this list first: what is appended is innermost.
    app.user_middleware += [
        Middleware(RequestChecks, checks=(check_framing, access)),
        Middleware(
            BodyLimit,
            limit=settings.max_body_bytes,
            limits=dict.fromkeys(("/upload", "/upload/", "/board/uploads"), file_form)
            | {SIGN_IN: sign_in},
        ),
    ]
    if keys is not None and settings.api_keys_file:
        app.user_middleware.append(Middleware(KeyWatch, keys=keys))
    if settings.cors_origins:
        app.add_middleware(Origins, origins=settings.cors_origins)
    document_keys(app, required=keys is not None)


def _api_keys(settings: Settings) -> ApiKeys | None:
    if settings.is_open:
        return None
    text, file = settings.api_keys, settings.api_keys_file
    try:
        return ApiKeys(text.get_secret_value() if text else None, file)
    except BadKeys as error:
        raise BadSettings(str(error)) from None
