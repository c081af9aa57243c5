"""Uploads without a size limit, as they are often written, for negative controls."""

import email
import os

import uvicorn
from fastapi import FastAPI, Request, UploadFile

app = FastAPI()


@app.get("/livez")
async def livez() -> None:
    """Answer 200."""


@app.post("/upload", status_code=202)
async def upload(file: UploadFile) -> int:
    """Read the whole file into memory, and return its size."""
    return len(await file.read())


@app.post("/form", status_code=202)
async def form(request: Request) -> int:
    """Parse a form with the standard library's `email`, and return the number of its parts.

    The `cgi` module, which used to parse forms, left the standard library in Python 3.13.
    """
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    message = email.message_from_bytes(head + await request.body())
    return len(message.get_payload())


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]), access_log=False)
