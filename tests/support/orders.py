"""A shop on PostgreSQL, with a durable task that confirms each order by mail.

`python -m tests.support.orders` serves it at PORT. It writes the order and the task in one
transaction; with TRANSACTIONS=2, for a negative control, in one after the other.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, HTTPException
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from afterward import Afterward, Context, PermanentError

QUEUE_URL = os.environ["QUEUE_URL"]
BETWEEN_SECONDS = 0.02  # between the two transactions; a shop may do something there

database = create_async_engine(QUEUE_URL.replace("postgresql://", "postgresql+asyncpg://"))


class Base(DeclarativeBase):
    """The shop's tables."""


class Order(Base):
    """An order."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]
    confirmed: Mapped[bool] = mapped_column(default=False)


async def confirm(_: Context[None], *, order_id: int) -> None:
    """Stand in for a mail: mark the order. Fails for good if there is no such order."""
    async with AsyncSession(database) as session, session.begin():
        order = await session.get(Order, order_id)
        if order is None:
            raise PermanentError("there is no such order")
        order.confirmed = True


afterward = Afterward[None](QUEUE_URL, tasks=[confirm], lease_seconds=1)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Create the shop's table, and run the queue."""
    async with database.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with afterward.lifespan(app):
        yield
    await database.dispose()


app = FastAPI(lifespan=lifespan)


@app.get("/livez")
async def livez() -> None:
    """Answer."""


@app.post("/orders", status_code=202)
async def place_order(email: str, *, in_stock: bool) -> None:
    """Take an order, and refuse it at the last moment if the goods are sold out."""
    if os.environ.get("TRANSACTIONS") == "2":
        await _place_in_two_transactions(email)
        return
    async with AsyncSession(database) as session, session.begin():
        order = Order(email=email)
        session.add(order)
        await session.flush()  # gives the order its id
        await afterward.queue.add_task_in(session, confirm, order_id=order.id)
        if not in_stock:
            raise HTTPException(409, "Sold out.")


async def _place_in_two_transactions(email: str) -> None:
    queue = afterward.queue
    async with AsyncSession(database, expire_on_commit=False) as session, session.begin():
        order = Order(email=email)
        session.add(order)
    await asyncio.sleep(BETWEEN_SECONDS)
    durable_tasks = queue.collect()
    durable_tasks.add_task(confirm, order_id=order.id)
    await queue.commit(durable_tasks.collected())


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]), access_log=False)
