"""A slow SMTP server: `python -m tests.support.slow_smtp PORT SECONDS` takes SECONDS per mail."""

import asyncio
import sys

from tests.support.smtp_server import SmtpServer


async def main(port: int, seconds: float) -> None:
    """Accept every mail, each after a delay of `seconds`."""
    server = SmtpServer()
    server.port = port
    server.delay["dot"] = seconds
    async with server:
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
