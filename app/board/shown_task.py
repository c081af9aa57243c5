"""A task as a page may show it. This is the one place that applies the setting HIDE_ARGUMENTS.

Lists of tasks need no such care: Engine.list_tasks returns tasks without their arguments.
"""

from dataclasses import replace
from typing import Annotated

from fastapi import Depends

from afterward.task import Task
from app.api.dependencies import ClientDep, QueueDep, SettingsDep
from app.api.routes.tasks import find_task
from app.api.schemas import SearchText


async def find_shown_task(
    task_id: SearchText, queue: QueueDep, client: ClientDep, settings: SettingsDep
) -> Task:
    """Return a task of this client. With HIDE_ARGUMENTS, its `arguments` are "".

    Raises TaskNotFound.
    """
    task = await find_task(task_id, queue, client)
    return replace(task, arguments="") if settings.hide_arguments else task


ShownTask = Annotated[Task, Depends(find_shown_task)]
