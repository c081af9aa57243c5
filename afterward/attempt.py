"""Run one attempt of a task, and say how it ended: no path through here leaves it unsaid."""

import asyncio
import inspect
import json
from collections.abc import Awaitable
from typing import Any, TypeVar

from afterward.errors import PermanentError, TaskError, UnusableResult
from afterward.registry import Function
from afterward.task import to_json

DETAIL_LENGTH = 1000  # characters of an error's description

ResultT = TypeVar("ResultT")


async def call(function: Function, context: object, arguments: str) -> str | None:
    """Call a task's function with its stored arguments; give its result as JSON, None for None.

    Raises whatever the function raises; PermanentError if the arguments cannot be read, or do not
    fit the function; UnusableResult if the result is not JSON.
    """
    args, kwargs = _read(arguments)
    try:
        # A coroutine function checks its arguments here, and runs nothing before the await.
        coroutine = function(context, *args, **kwargs)
    except TypeError as error:
        raise PermanentError(f"its stored arguments do not fit: {described(error)}") from error
    return _encoded(await coroutine)


def _read(arguments: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        call = json.loads(arguments)
        return [*call["args"]], {**call["kwargs"]}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise PermanentError(f"its stored arguments cannot be read: {described(error)}") from error


def _encoded(result: object) -> str | None:
    if result is None:
        return None
    try:
        encoded = to_json(result)
        if "\\ud" in encoded:  # it may be half of a pair, which cannot be answered in UTF-8
            json.dumps(result, ensure_ascii=False).encode()
    except Exception as error:
        if inspect.iscoroutine(result):
            result.close()  # or Python complains that it was never awaited
        raise UnusableResult(
            f"the work was done, but its result is not JSON: {described(error)}"
        ) from error
    return encoded


async def within(seconds: float, work: Awaitable[ResultT]) -> ResultT:
    """Give the result of `work`; raises TimeoutError with a description after so many seconds."""
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            return await work
    except TimeoutError as error:
        if deadline.expired():
            error.args = (f"the attempt took longer than {seconds:g} s",)
        raise


def error_as_json(error: BaseException) -> str:
    """Give an error as the API shows it: its type, its description, and the facts about it.

    Facts that are not JSON are left out. The code that describes a failure must not fail itself.
    """
    told = {"type": type(error).__name__, "detail": described(error)}
    return to_json((_facts(error) if isinstance(error, TaskError) else {}) | told)


def _facts(error: TaskError) -> dict[str, Any]:
    facts = {}
    try:
        for name, fact in error.facts.items():
            value = _clean(fact) if isinstance(fact, str) else fact
            if _is_json(value):
                facts[_clean(name)] = value
    except Exception:  # noqa: BLE001 -- a subclass may have anything in their place
        return {}
    return facts


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except Exception:  # noqa: BLE001 -- an object of any class may raise anything
        return False
    return True


def described(error: BaseException) -> str:
    """Give an error's description, whatever it does when it is asked for one."""
    try:
        return _clean(str(error)[:DETAIL_LENGTH])
    except BaseException as second:  # noqa: BLE001 -- it may raise anything
        return f"it cannot be described: {type(second).__name__}"


def _clean(text: str) -> str:
    # A lone surrogate has no form in UTF-8, and PostgreSQL's JSON has none for NUL.
    return text.encode("utf-8", "replace").decode().replace("\0", "?")
