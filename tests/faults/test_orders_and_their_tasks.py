"""Kill a shop (SIGKILL) at random instants while clients order, and start it again.

The shop writes an order, and the task of its confirmation mail, in one transaction of its own. So
no order is without its task, and no task without its order, at whatever instant the kill comes.
"""

import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from tests.support.postgres import Sql
from tests.support.service import Service, until
from tests.support.torture import Tried, form
from tests.support.workers import UNFINISHED

SHOP = (sys.executable, "-m", "tests.support.orders")
KILLS = form(4, 100)
CLIENTS = 8
PATIENCE = 60.0  # seconds: for a start, and for the leases of crashed tasks

_ORDER_OF = "(SELECT (arguments::json->'kwargs'->>'order_id')::int FROM afterward.tasks)"
WITHOUT_A_TASK = f"SELECT count(*) FROM orders WHERE id NOT IN {_ORDER_OF}"
WITHOUT_AN_ORDER = f"""
    SELECT count(*) FROM {_ORDER_OF} AS wanted (order_id)
    WHERE order_id NOT IN (SELECT id FROM orders)
"""
# A task may be in three crashes in a row, and fails then.
UNCONFIRMED = """
    SELECT count(*) FROM orders WHERE NOT confirmed AND id NOT IN (
        SELECT (arguments::json->'kwargs'->>'order_id')::int FROM afterward.tasks
        WHERE status = 'failed' AND error::json->>'type' = 'WorkerDied'
    )
"""


@dataclass
class Answers:
    """How many orders were answered in each way."""

    accepted: int = 0
    refused: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, status: int) -> None:
        """Count an answer."""
        with self.lock:
            self.accepted += status == httpx2.codes.ACCEPTED
            self.refused += status == httpx2.codes.CONFLICT

    def wait_for(self, more: int) -> None:
        """Wait until so many more orders are accepted."""
        enough = self.accepted + more
        until(lambda: self.accepted >= enough, within=PATIENCE, what=f"{more} more orders")


def test_no_order_is_without_its_task_and_no_task_without_its_order(
    tmp_path: Path, database_url: str, sql: Sql, tried: Tried
) -> None:
    answers = kill_while_clients_order(tmp_path, database_url, sql, kills=KILLS)

    orders, tasks = (
        sql(f"SELECT count(*) FROM {table}") for table in ("orders", "afterward.tasks")
    )
    without_a_task, without_an_order = sql(WITHOUT_A_TASK), sql(WITHOUT_AN_ORDER)
    tried(
        f"{KILLS} kills, {answers.accepted:,} orders answered 202, {answers.refused:,} rolled back",
        f"{without_a_task} orders without a task, {without_an_order} tasks without an order",
    )
    assert (without_a_task, without_an_order) == ("0", "0")
    assert orders == tasks
    assert int(orders) >= answers.accepted  # a kill may come between a commit and its answer
    assert answers.refused
    assert sql(UNCONFIRMED) == "0"


def test_control_with_two_transactions_orders_are_without_their_tasks(
    tmp_path: Path, database_url: str, sql: Sql, tried: Tried
) -> None:
    kills = form(4, 20)
    kill_while_clients_order(tmp_path, database_url, sql, kills=kills, transactions=2)

    without_a_task = sql(WITHOUT_A_TASK)
    tried(f"two transactions, {kills} kills", f"{without_a_task} orders without a task")
    assert int(without_a_task) > 0


def kill_while_clients_order(
    directory: Path, database_url: str, sql: Sql, *, kills: int, transactions: int = 1
) -> Answers:
    """Kill the shop at random instants, and start it again; returns when its tasks are done."""
    sql("DROP TABLE IF EXISTS orders")
    answers = Answers()
    with Service(
        directory, command=SHOP, queue_url=database_url, transactions=transactions
    ) as shop:
        with _orders(shop.url, answers):
            for _ in range(kills):
                answers.wait_for(random.randint(1, 40))
                time.sleep(random.uniform(0, 0.02))
                shop.kill()
                shop.start()
        until(lambda: sql(UNFINISHED) == "0", within=PATIENCE)
        shop.stop()
    return answers


@contextmanager
def _orders(url: str, answers: Answers) -> Iterator[None]:
    """Let clients order for as long as the block runs; every fourth order is rolled back."""
    enough = threading.Event()

    def order() -> None:
        with httpx2.Client(base_url=url, timeout=10) as client:
            while not enough.is_set():
                in_stock = random.random() < 0.75
                try:
                    response = client.post(f"/orders?email=ada@example.com&in_stock={in_stock}")
                    answers.count(response.status_code)
                except httpx2.TransportError:
                    time.sleep(0.05)  # it was killed

    clients = [threading.Thread(target=order) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        enough.set()
        for client in clients:
            client.join()
