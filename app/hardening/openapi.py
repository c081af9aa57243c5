"""The API keys in /openapi.json: how a client sends one, and which routes need one."""

from typing import Any

from fastapi import FastAPI

from app.hardening.access import PUBLIC

_SCHEMES = {
    "Bearer": {"type": "http", "scheme": "bearer"},
    "Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def document_keys(app: FastAPI, *, required: bool) -> None:
    """Add the API keys to the OpenAPI document of `app`; as optional unless they are `required`."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        document = describe()
        document["components"]["securitySchemes"] = _SCHEMES
        document["security"] = [{scheme: []} for scheme in _SCHEMES] + ([] if required else [{}])
        for path in PUBLIC & document["paths"].keys():
            for operation in document["paths"][path].values():
                operation["security"] = []
        return document

    app.openapi = openapi  # type: ignore[method-assign]
