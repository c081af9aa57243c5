"""Uploads as they are often written, without a bound: what ours are compared with."""

import email
import os

import uvicorn
from fastapi import FastAPI, Request, UploadFile

app = FastAPI()


@app.get("/livez")
async def livez() -> None:
    """Answer."""


@app.post("/upload", status_code=202)
async def upload(file: UploadFile) -> int:
    """Read the whole file; gives its size."""
    return len(await file.read())


@app.post("/form", status_code=202)
async def form(request: Request) -> int:
    """Read a form with the standard library, now that it has no cgi; gives how many parts."""
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    message = email.message_from_bytes(head + await request.body())
    return len(message.get_payload())


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]), access_log=False)
