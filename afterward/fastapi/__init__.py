"""Durable tasks in FastAPI: collect them in a route, commit them, and only then answer 202.

    router = APIRouter(route_class=DurableRoute)

    @router.post("/orders", status_code=202)
    async def order(durable_tasks: DurableTasks) -> str:
        return durable_tasks.add_task(send_email, "ada@example.com").id

route         DurableRoute, which commits between a route's return and its response
unit_of_work  DurableTasks, the tasks that a request collects, and its idempotency key
idempotency   reads the key, and makes the response to store, or to repeat
"""

from afterward.fastapi.idempotency import IdempotencyKeyReused
from afterward.fastapi.route import DurableRoute
from afterward.fastapi.unit_of_work import DurableTasks, RequestUnitOfWork

__all__ = ["DurableRoute", "DurableTasks", "IdempotencyKeyReused", "RequestUnitOfWork"]
