"""An attempt: the call of a task's function, its result as JSON, and its error as JSON.

Neither strange arguments, nor strange results, nor strange errors may leave an attempt unsettled.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from afterward.call import call, describe, error_as_json, with_timeout
from afterward.errors import PermanentError, TaskError, TemporaryError, UnusableResult
from afterward.signature import Signature

pytestmark = pytest.mark.anyio

NO_ARGUMENTS = '{"args":[],"kwargs":{}}'


# Arguments


async def test_a_function_gets_its_context_and_its_stored_arguments() -> None:
    async def greet(context: object, name: str, *, times: int) -> list[object]:
        return [context, name, times]

    result = await call(Signature(greet), "context", '{"args":["Ada"],"kwargs":{"times":2}}')
    assert result == '["context","Ada",2]'


@pytest.mark.parametrize(
    "arguments",
    [
        *("", "{", "null", "[]", "{}", '{"args":[]}'),
        *('{"args":1,"kwargs":{}}', '{"args":[],"kwargs":1}', "[" * 100_000),
    ],
)
async def test_arguments_that_cannot_be_read_are_a_permanent_error(arguments: str) -> None:
    async def never(_: object) -> None:
        raise AssertionError

    with pytest.raises(PermanentError, match="stored arguments cannot be read"):
        await call(Signature(never), None, arguments)


async def test_arguments_that_do_not_fit_the_function_are_a_permanent_error() -> None:
    """A new version of the function may have other parameters than the stored arguments."""

    async def renamed(_: object, *, recipient: str) -> None:
        raise AssertionError

    with pytest.raises(PermanentError, match=r"do not fit: .*'to'"):
        await call(Signature(renamed), None, '{"args":[],"kwargs":{"to":"ada@example.com"}}')


async def test_a_type_error_inside_the_function_is_not_taken_for_wrong_arguments() -> None:
    async def wrong(_: object) -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        await call(Signature(wrong), None, NO_ARGUMENTS)


# Results


async def a_coroutine() -> None:
    """Do nothing; a task that returns this coroutine has forgotten to await it."""


def a_generator() -> Iterator[int]:
    yield 1


async def an_async_generator() -> AsyncIterator[int]:
    yield 1


class Wild(dict[str, int]):
    """A result that raises when it is read."""

    def items(self) -> Any:
        """Raise an error that no JSON encoder raises."""
        raise LookupError


def nested(depth: int) -> list[Any]:
    result: list[Any] = []
    for _ in range(depth):
        result = [result]
    return result


@pytest.mark.parametrize(
    "make",
    [
        object,
        lambda: b"bytes",
        lambda: {1, 2},
        lambda: {(1, 2): 3},
        lambda: float("nan"),
        lambda: float("inf"),
        lambda: "half a pair: \ud800",
        lambda: {"\udfff": 1},
        lambda: nested(100_000),
        lambda: Wild(a=1),
        a_coroutine,
        a_generator,
        an_async_generator,
        lambda: asyncio.get_running_loop().create_future(),
    ],
)
async def test_a_result_that_is_not_json_is_a_permanent_error(make: Any) -> None:
    """The error is permanent because the work is done, and must not be done again."""

    async def careless(_: object) -> Any:
        return make()

    with pytest.raises(UnusableResult, match="the work was done, but its result is not JSON"):
        await call(Signature(careless), None, NO_ARGUMENTS)


@pytest.mark.parametrize(
    ("result", "stored"),
    [(None, None), (False, "false"), ("😀", '"\\ud83d\\ude00"'), ((1, 2), "[1,2]")],
)
async def test_a_result_is_stored_as_json(result: object, stored: str | None) -> None:
    async def work(_: object) -> object:
        return result

    assert await call(Signature(work), None, NO_ARGUMENTS) == stored


# Time


async def test_work_that_exceeds_its_time_limit_raises_a_timeout_error() -> None:
    with pytest.raises(TimeoutError, match=r"the attempt took longer than 0\.01 s"):
        await with_timeout(0.01, asyncio.Event().wait())


async def test_a_timeout_error_of_the_work_itself_keeps_its_message() -> None:
    async def connect() -> None:
        raise TimeoutError("the server did not answer")

    with pytest.raises(TimeoutError, match="the server did not answer"):
        await with_timeout(60, connect())


# Errors


class Odd(Exception):
    """An error whose description cannot be read."""

    def __init__(self, second: BaseException) -> None:
        super().__init__()
        self._second = second

    def __str__(self) -> str:
        """Raise the second error."""
        raise self._second


class Bare(TaskError):
    """A TaskError without facts, because its __init__ does not call that of its base class."""

    def __init__(self) -> None:
        Exception.__init__(self, "bare")


NoText = type("NoText", (Exception,), {"__str__": lambda _: 5})


def as_a_client_reads_it(error: BaseException) -> dict[str, Any]:
    """Return the error as a client reads it, which must be JSON in UTF-8."""
    error_json: dict[str, Any] = json.loads(error_as_json(error))
    json.dumps(error_json, ensure_ascii=False).encode()
    return error_json


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError("x" * 5000), {"type": "OSError", "detail": "x" * 1000}),
        (KeyError("name"), {"type": "KeyError", "detail": "'name'"}),
        (
            TemporaryError("busy", smtp_code=450, smtp_text=None),
            {"type": "TemporaryError", "detail": "busy", "smtp_code": 450},
        ),
        (
            BaseExceptionGroup("two", [OSError(), SystemExit()]),
            {"type": "BaseExceptionGroup", "detail": "two (2 sub-exceptions)"},
        ),
        (
            Odd(KeyError("detail")),
            {"type": "Odd", "detail": "it cannot be described: KeyError"},
        ),
        (
            Odd(SystemExit()),
            {"type": "Odd", "detail": "it cannot be described: SystemExit"},
        ),
        (NoText(), {"type": "NoText", "detail": "it cannot be described: TypeError"}),
        (OSError("a\udcffb\0c"), {"type": "OSError", "detail": "a?b?c"}),
        (
            PermanentError(
                "no",
                payload=b"bytes",  # type: ignore[arg-type]
                ratio=float("nan"),  # type: ignore[arg-type]
                many=nested(100_000),  # type: ignore[arg-type]
                half="\ud800",
                code=7,
                type="disguise",
            ),
            {"type": "PermanentError", "detail": "no", "half": "?", "code": 7},
        ),
        (Bare(), {"type": "Bare", "detail": "bare"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_error_can_be_shown_to_a_client(error: BaseException, shown: dict[str, Any]) -> None:
    assert as_a_client_reads_it(error) == shown


def test_an_error_while_an_error_is_described_is_not_raised() -> None:
    assert describe(Odd(RecursionError())) == "it cannot be described: RecursionError"
