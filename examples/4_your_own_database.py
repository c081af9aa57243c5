"""Add a task in the same transaction as your own rows; or use an outbox where that cannot be.

    .venv/bin/pip install 'sqlalchemy[asyncio]'
    docker run --rm -p 5432:5432 -e POSTGRES_PASSWORD=secret postgres:18
    export DATABASE_URL=postgresql://postgres:secret@localhost/postgres
    .venv/bin/uvicorn examples.4_your_own_database:app
    curl -X POST localhost:8000/orders/ada@example.com
    curl -X POST localhost:8000/invoices/ada@example.com

/orders: the order and the task of its mail are rows of one database, and one commit writes both.
Kill the server at any moment (`pkill -9 -f 'uvicorn examples.4'`), and start it again: within
seconds every order has its mail. An order with `?in_stock=false` is refused after the task was
added, and leaves no task. DurableRoute has no task to commit here, but it answers 503 while too
many tasks are unfinished, or the queue is away. An Idempotency-Key does not protect an order: the
route of a repeated request runs again.

/invoices: the invoice is in a SQLite file, and the queue in another database, so no commit can
write both. Instead, the transaction of the invoice also writes a row to an outbox table. A relay
commits a task for each row, and then removes the row. The gap: if the process dies in between, the
next relay adds the task again, and the mail is sent twice. In the opposite order it would be lost.
A queue on SQLite is a file of its own, so it needs an outbox in any case.
"""

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, HTTPException
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from afterward import Afterward, Context, QueueUnavailable
from afterward.engines import make_tables
from afterward.fastapi import DurableRoute

URL = os.environ["DATABASE_URL"]
shop = create_async_engine(URL.replace("postgresql://", "postgresql+asyncpg://"))


class Base(DeclarativeBase):
    """The shop's own tables."""


class Order(Base):
    """An order."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]


async def send_email(_: Context[None], recipient: str, subject: str) -> None:
    """Stand in for SMTP. After a crash it runs again, even if the mail was sent just before."""
    await asyncio.sleep(2)
    print(f"sent to {recipient}: {subject}")


afterward = Afterward(URL, tasks=[send_email], lease_seconds=5)
invoices = sqlite3.connect("invoices.db")
for table in ("invoices (id INTEGER PRIMARY KEY, email)", "outbox (id INTEGER PRIMARY KEY, email)"):
    invoices.execute(f"CREATE TABLE IF NOT EXISTS {table}")


async def relay() -> None:
    """Move the rows of the outbox to the queue, for as long as the server runs."""
    while True:
        rows = invoices.execute("SELECT * FROM outbox ORDER BY id LIMIT 100").fetchall()
        with suppress(QueueUnavailable):  # the rows stay in the outbox until the queue takes them
            async with afterward.queue.transaction() as transaction:
                for _, email in rows:
                    transaction.add_task(send_email, email, "Your invoice")
            # This is the gap: after a crash here, the next relay finds the rows again.
            with invoices:
                invoices.executemany("DELETE FROM outbox WHERE id = ?", [row[:1] for row in rows])
        await asyncio.sleep(0.1)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, object]]:
    """Create the tables, and run a worker and the relay beside the API."""
    await make_tables(URL)
    async with shop.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with afterward.lifespan(app) as state:
        relaying = asyncio.create_task(relay())
        yield state  # DurableRoute finds the queue in it
        relaying.cancel()
    await shop.dispose()


app = FastAPI(lifespan=lifespan)
app.router.route_class = DurableRoute


@app.post("/orders/{email}", status_code=202)
async def place_order(email: str, *, in_stock: bool = True) -> dict[str, str]:
    """Take an order. Its row and the task of its mail are on disk before the 202, or neither is."""
    async with AsyncSession(shop) as session, session.begin():
        session.add(Order(email=email))
        task = await afterward.queue.add_task_in(session, send_email, email, "Your order")
        if not in_stock:
            raise HTTPException(409, "Sold out.")  # the error rolls back the order and the task
    return {"task": task.id}


@app.post("/invoices/{email}", status_code=202)
async def write_invoice(email: str) -> None:
    """Write an invoice. Its row and its mail's row in the outbox are on disk before the 202."""
    with invoices:  # a transaction
        invoices.execute("INSERT INTO invoices VALUES (NULL, ?)", (email,))
        invoices.execute("INSERT INTO outbox VALUES (NULL, ?)", (email,))
