"""Call the function of a task. Its result, or the error that it raises, becomes JSON."""

import asyncio
import inspect
import json
from collections.abc import Awaitable
from dataclasses import is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, TypeVar
from uuid import UUID

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from afterward.errors import PermanentError, TaskError, UnusableResult
from afterward.signature import Signature
from afterward.task import json_encoder, to_json

DETAIL_LENGTH = 1000  # characters of an error's description

_RESULT_TYPES = (BaseModel, date, time, timedelta, Decimal, Enum, UUID)  # beside those of JSON

ResultT = TypeVar("ResultT")


async def call(signature: Signature, context: object, arguments: str) -> str | None:
    """Call a task's function with its stored arguments; return its result as JSON, None for None.

    Pydantic models, dataclasses, dates, UUIDs and the like become JSON as in a response of FastAPI.

    Raises whatever the function raises; PermanentError if the arguments cannot be read, or do not
    fit the function; UnusableResult if the result is not JSON.
    """
    args, kwargs = _read_arguments(arguments)
    if not signature.takes_json:
        args, kwargs = signature.decode(args, kwargs)
    try:
        # A coroutine function checks its arguments here. Its body runs only at the await.
        coroutine = signature.function(context, *args, **kwargs)
    except TypeError as error:
        raise PermanentError(f"its stored arguments do not fit: {describe(error)}") from error
    return _encode_result(await coroutine)


def _read_arguments(arguments: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        stored = json.loads(arguments)
        return [*stored["args"]], {**stored["kwargs"]}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise PermanentError(f"its stored arguments cannot be read: {describe(error)}") from error


def _encode_result(result: object) -> str | None:
    if result is None:
        return None
    try:
        encoded = _result_to_json(result)
        if "\\ud" in encoded:  # perhaps half of a surrogate pair, which has no form in UTF-8
            json.dumps(json.loads(encoded), ensure_ascii=False).encode()
    except Exception as error:
        if inspect.iscoroutine(result):
            result.close()  # else Python warns that it was never awaited
        raise UnusableResult(
            f"the work was done, but its result is not JSON: {describe(error)}"
        ) from error
    return encoded


def _to_jsonable(value: object) -> object:
    """Return a value of _RESULT_TYPES, or a dataclass, in types of JSON. Raises TypeError.

    Pydantic would also turn a set into a list, and bytes into text. Such a result is refused, so
    that it is not changed silently. So is the class of a dataclass: only an instance is a value.
    """
    if isinstance(value, _RESULT_TYPES) or (is_dataclass(value) and not isinstance(value, type)):
        return to_jsonable_python(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


_result_to_json = json_encoder(_to_jsonable)


async def with_timeout(seconds: float, work: Awaitable[ResultT]) -> ResultT:
    """Return the result of `work`. Raises TimeoutError with a description after `seconds`.

    A TimeoutError that `work` raises itself passes through unchanged.
    """
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            return await work
    except TimeoutError as error:
        if deadline.expired():
            error.args = (f"the attempt took longer than {seconds:g} s",)
        raise


def error_as_json(error: BaseException) -> str:
    """Return an error as it is stored with the task: type, detail, and the facts of a TaskError.

    Facts that have no JSON form are left out. This never raises, because an attempt whose error
    cannot be described must be settled too.
    """
    facts = _storable_facts(error) if isinstance(error, TaskError) else {}
    return to_json(facts | {"type": type(error).__name__, "detail": describe(error)})


def _storable_facts(error: TaskError) -> dict[str, Any]:
    facts = {}
    try:
        for name, fact in error.facts.items():
            value = _printable(fact) if isinstance(fact, str) else fact
            if _is_json(value):
                facts[_printable(name)] = value
    except Exception:  # noqa: BLE001 -- a subclass may have replaced `facts` by any object
        return {}
    return facts


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except Exception:  # noqa: BLE001 -- encoding an unknown object may raise any error
        return False
    return True


def describe(error: BaseException) -> str:
    """Return the text of an error, at most 1,000 characters, even if its `__str__` raises."""
    try:
        return _printable(str(error)[:DETAIL_LENGTH])
    except BaseException as second:  # noqa: BLE001 -- `__str__` may raise any error
        return f"it cannot be described: {type(second).__name__}"


def _printable(text: str) -> str:
    # UTF-8 has no form for half of a surrogate pair, and PostgreSQL's JSON has none for NUL.
    return text.encode("utf-8", "replace").decode().replace("\0", "?")
