"""What /openapi.json says beyond the routes: which API keys are asked for, and where."""

from typing import Any

from fastapi import FastAPI

from app.hardening.gate import PUBLIC

_SCHEMES = {
    "Bearer": {"type": "http", "scheme": "bearer"},
    "Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def document_keys(app: FastAPI, *, needed: bool) -> None:
    """Name the API keys in the document of `app`; if they are not needed, as a possibility."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        document = describe()
        document["components"]["securitySchemes"] = _SCHEMES
        document["security"] = [{scheme: []} for scheme in _SCHEMES] + ([] if needed else [{}])
        for path in PUBLIC & document["paths"].keys():
            for operation in document["paths"][path].values():
                operation["security"] = []
        return document

    app.openapi = openapi  # type: ignore[method-assign]
