"""The unit of work: `add_task` looks like FastAPI's, and refuses a call that cannot be stored."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterward.registry import Registry, TaskKind
from afterward.retry import RetryPolicy
from afterward.task import Answer, Record, Status, Writes, new_id
from afterward.unit_of_work import Context, UnitOfWork
from tests.library.support import LONGEST_WAITS, NO_WAITS, NOW, Clock, in_batch


async def greet(context: Context[None], name: str, *, times: int = 1) -> None:
    """Greet a person."""


async def another(context: Context[None]) -> None:
    """Do nothing; this function is in no registry."""


@pytest.fixture
def durable_tasks(clock: Clock) -> UnitOfWork[None]:
    return UnitOfWork(
        Registry(greet), policy_of=lambda _: NO_WAITS, now=clock, request_id="request-1"
    )


# Adding


def test_a_call_is_collected_as_a_task(durable_tasks: UnitOfWork[None]) -> None:
    """A collected task becomes a promise only when it is committed."""
    task = durable_tasks.add_task(greet, "Ada", times=2)
    assert durable_tasks.collected() == Writes((task,))
    assert (task.kind, task.arguments) == ("greet", '{"args":["Ada"],"kwargs":{"times":2}}')
    assert (task.request_id, task.max_attempts) == ("request-1", 3)
    assert (task.status, task.attempts, task.next_attempt_at) == (Status.QUEUED, 0, None)
    assert task.created_at == task.updated_at == task.due_at == NOW


def test_a_task_is_about_the_value_of_the_named_parameter(clock: Clock) -> None:
    """Databases can store it: it is a text of at most 255 characters, without NUL."""

    async def send(
        context: Context[None], subject: str, recipient: str | int | None = None
    ) -> None: ...

    registry = Registry[None](TaskKind(send, about="recipient"), greet)
    durable_tasks = UnitOfWork(registry, policy_of=lambda _: NO_WAITS, now=clock)
    for task, about in [
        (durable_tasks.add_task(send, "Hello", "ada@example.com"), "ada@example.com"),
        (durable_tasks.add_task(send, "Hello", recipient="grace@example.com"), "grace@example.com"),
        (durable_tasks.add_task(send, "Hello", 7), "7"),
        (durable_tasks.add_task(send, "Hello", "a\0b" + "c" * 300), "ab" + "c" * 252),
        (durable_tasks.add_task(send, "Hello"), None),
        (durable_tasks.add_task(greet, "Ada"), None),
    ]:
        assert task.about == about


def test_a_task_is_about_a_default_value_or_one_that_only_a_name_gives(clock: Clock) -> None:
    async def invite(context: Context[None], *guests: str, host: str = "ada") -> None: ...

    registry = Registry[None](TaskKind(invite, about="host"))
    durable_tasks = UnitOfWork(registry, policy_of=lambda _: NO_WAITS, now=clock)
    assert durable_tasks.add_task(invite, "eve", "bob").about == "ada"
    assert durable_tasks.add_task(invite, "eve", "bob", host="grace").about == "grace"
    with pytest.raises(TypeError, match="invite has no parameter `guests`"):
        Registry[None](TaskKind(invite, about="guests"))


def test_a_task_is_about_a_parameter_of_the_decorated_function(clock: Clock) -> None:
    """A decorator that leaves out an argument has parameters of its own."""

    async def send(context: Context[None], subject: str, recipient: str) -> None: ...

    @wraps(send)
    async def greet(context: Context[None], recipient: str) -> None: ...

    registry = Registry[None](TaskKind(greet, about="recipient"))
    durable_tasks = UnitOfWork(registry, policy_of=lambda _: NO_WAITS, now=clock)
    assert durable_tasks.add_task(greet, "ada@example.com").about == "ada@example.com"
    with pytest.raises(TypeError, match="send has no parameter `subject`"):
        Registry[None](TaskKind(greet, about="subject"))


@pytest.mark.parametrize("name", ["sender", "context"])
def test_a_task_can_only_be_about_an_argument(name: str) -> None:
    with pytest.raises(TypeError, match=f"greet has no parameter `{name}`"):
        Registry[None](TaskKind(greet, about=name))


def test_tasks_records_and_the_answer_are_collected_together(
    durable_tasks: UnitOfWork[None],
) -> None:
    tasks = durable_tasks.add_task(greet, "Ada"), durable_tasks.add_task(greet, "Grace")
    durable_tasks.add_record("names", "1", {"name": "Ada"})
    gone = Record("names", "", "2", {}, NOW)
    durable_tasks.remove_record(gone)
    answer = Answer("key", "fingerprint", "{}", "/tasks/1", NOW)
    records = (Record("names", "", "1", {"name": "Ada"}, NOW),)
    assert durable_tasks.collected(answer) == Writes(tasks, records, answer, removed=(gone,))


def test_the_collected_tasks_can_be_made_a_batch(durable_tasks: UnitOfWork[None]) -> None:
    task = durable_tasks.add_task(greet, "Ada")
    batch_id = durable_tasks.as_batch()
    assert durable_tasks.collected() == Writes(in_batch(batch_id, task))


def test_what_is_added_after_the_commit_is_refused(durable_tasks: UnitOfWork[None]) -> None:
    """It would be lost."""
    record = Record("uploads", "", "1", {}, NOW)
    durable_tasks.collected()
    for add in (
        lambda: durable_tasks.add_task(greet, "Ada"),
        lambda: durable_tasks.add_record("uploads", "1", {}),
        lambda: durable_tasks.remove_record(record),
        durable_tasks.as_batch,
    ):
        with pytest.raises(RuntimeError, match="taken for its commit"):
            add()


def test_a_type_checker_sees_a_wrong_argument(durable_tasks: UnitOfWork[None]) -> None:
    """Here mypy is the test: it reports an `ignore` that hides no error."""
    durable_tasks.add_task(greet, 5)  # type: ignore[arg-type]
    durable_tasks.add_task(greet, "Ada", times="twice")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        durable_tasks.add_task(greet)  # type: ignore[call-arg]


def test_a_call_that_cannot_work_is_refused_at_once(durable_tasks: UnitOfWork[None]) -> None:
    """The request that contains the bug fails, and not a task that runs later."""
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'name'"):
        durable_tasks.add_task(greet)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'tims'"):
        durable_tasks.add_task(greet, "Ada", tims=2)  # type: ignore[call-arg]
    assert durable_tasks.collected() == Writes()


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (object(), TypeError),
        (b"bytes", TypeError),
        (float("nan"), ValueError),
        ({1: "a", "1": "b"}, TypeError),
        ([({"in": {None: "a"}},)], TypeError),
    ],
)
def test_a_value_that_is_not_json_is_refused(
    durable_tasks: UnitOfWork[None], value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        durable_tasks.add_task(greet, value)
    with pytest.raises(error):
        durable_tasks.add_record("names", "1", {"name": value})
    assert durable_tasks.collected() == Writes()


@pytest.mark.parametrize(
    ("call", "refusal"),
    [
        (lambda tasks: tasks.add_task(greet, b"Ada"), "greet: the argument `name`: bytes has no"),
        (
            lambda tasks: tasks.add_task(greet, "Ada", times={"exactly": {1}}),
            "greet: the argument `times`: set has no JSON form",
        ),
        (
            lambda tasks: tasks.add_task(greet, "Ada", times=float("nan")),
            "greet: the argument `times`: .* not JSON compliant",
        ),
        (
            lambda tasks: tasks.add_task(greet, [{"by_day": {True: "Ada"}}]),
            "greet: the argument `name`: a dict key of type bool has no JSON form",
        ),
    ],
    ids=["positional", "nested", "nan", "key"],
)
def test_a_refusal_names_the_task_and_the_argument(
    durable_tasks: UnitOfWork[None], call: Any, refusal: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=refusal):
        call(durable_tasks)


# The registry


def test_a_function_outside_the_registry_is_refused(durable_tasks: UnitOfWork[None]) -> None:
    """This includes a function with a registered name: the worker would run the wrong one."""
    with pytest.raises(TypeError, match="another is not in the registry"):
        durable_tasks.add_task(another)

    async def greet(context: Context[None]) -> None:
        """Have a name that is taken."""

    with pytest.raises(TypeError, match="greet is not in the registry"):
        durable_tasks.add_task(greet)


def test_a_registry_refuses_two_functions_of_the_same_name() -> None:
    async def another(context: Context[None]) -> None:
        """Have a name that is taken."""

    with pytest.raises(TypeError, match="two tasks are named another"):
        Registry(globals()["another"], another)


def test_a_registry_refuses_a_function_that_would_block() -> None:
    def blocking(context: Context[None]) -> None:
        """Block the event loop."""

    with pytest.raises(TypeError, match="blocking must be `async def`"):
        Registry(blocking)  # type: ignore[arg-type]


class Mailer:
    """An object whose methods may be tasks."""

    async def send(self, _: Context[None]) -> None:
        """Be a task."""

    async def __call__(self, _: Context[None]) -> None:
        """Be called, without a name."""


def test_a_method_of_an_object_may_be_a_task() -> None:
    mailer = Mailer()
    assert Registry[None](mailer.send).kind_of(mailer.send) == "send"


def test_a_registry_refuses_a_function_without_a_name() -> None:
    with pytest.raises(TypeError, match="has no name to be stored under"):
        Registry[None](Mailer())


def test_a_registry_refuses_two_policies_for_one_function() -> None:
    with pytest.raises(TypeError, match="two tasks are named greet"):
        Registry[None](greet, TaskKind(greet, retry=RetryPolicy()))


def test_a_registry_refuses_what_is_no_policy() -> None:
    with pytest.raises(TypeError, match="greet: retry must be a RetryPolicy"):
        Registry[None](TaskKind(greet, retry=3))  # type: ignore[arg-type]


def test_a_registry_finds_a_function_by_its_name() -> None:
    registry = Registry[None](greet, another)
    assert list(registry) == ["greet", "another"]
    assert registry.signature("greet").function is greet
    with pytest.raises(KeyError):
        registry.signature("unknown")


def test_a_kind_may_have_a_policy_of_its_own() -> None:
    registry = Registry[None](TaskKind(greet, retry=LONGEST_WAITS), another)
    assert registry.policy("greet") is LONGEST_WAITS
    assert registry.policy("another") is registry.policy("unknown") is None
    assert registry.kind_of(greet) == "greet"


# Identifiers


def test_an_id_is_a_uuid_of_version_7() -> None:
    task_id = uuid.UUID(new_id(NOW))
    assert (task_id.version, task_id.variant) == (7, uuid.RFC_4122)
    assert task_id.int >> 80 == NOW * 1000


def test_ids_of_the_same_moment_differ_and_keep_their_order() -> None:
    ids = [new_id(NOW) for _ in range(10_000)]
    assert len(set(ids)) == 10_000
    assert sorted(ids) == ids


@pytest.mark.thorough
def test_ids_that_threads_make_at_the_same_moment_differ() -> None:
    """FastAPI runs a route that is no coroutine in a thread."""
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(lambda _: new_id(NOW), range(10_000)))) == 10_000


@given(earlier=st.integers(0, 2**47), later=st.integers(0, 2**47))
def test_ids_sort_by_time(earlier: int, later: int) -> None:
    """Times here are whole milliseconds."""
    if earlier != later:
        earlier, later = sorted((earlier, later))
        assert new_id(earlier / 1000) < new_id(later / 1000)
