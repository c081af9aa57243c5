"""Arguments with types: stored as JSON, checked, and made again before the function is called."""

import json
import typing
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum, StrEnum
from functools import wraps
from inspect import signature as signature_of
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    computed_field,
    field_serializer,
    field_validator,
)

from afterward.call import call
from afterward.engine import Engine
from afterward.errors import PermanentError, UnusableResult
from afterward.registry import Registry
from afterward.signature import Signature
from afterward.task import Status
from afterward.unit_of_work import Context
from afterward.worker import Worker
from tests.library.support import Clock, a_task, promise, put, queue_of

if TYPE_CHECKING:
    from elsewhere import Elsewhere  # type: ignore[import-not-found]

pytestmark = pytest.mark.anyio

# The same in every process, because they are in the names of tests.
TODAY = datetime(2026, 11, 28, 12, 30, 15, 123456, UTC)
BERLIN = ZoneInfo("Europe/Berlin")
SKU = UUID("6f0c5a52-3f0e-4a5c-9d0e-2f6b1c7d8e9f")


class Size(Enum):
    """A choice."""

    SMALL = "s"
    LARGE = "l"


class Open(BaseModel):
    """A model with fields that are not declared."""

    model_config = ConfigDict(extra="allow")


class Letter(StrEnum):
    """A choice that is equal to a text."""

    A = "a"


class Item(BaseModel):
    """A part of an order."""

    sku: UUID
    price: Decimal
    size: Size = Size.SMALL


class Order(BaseModel):
    """A model with much of what models may have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    number: int = Field(validation_alias="number-in", serialization_alias="number-out")
    items: list[Item] = []
    placed_at: datetime = TODAY

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total(self) -> Decimal:
        """The sum of the prices."""
        return sum((item.price for item in self.items), Decimal(0))


class Gift(Order):
    """An order with a field that Order does not have."""

    greeting: str = "Hello"


@dataclass
class Point:
    """A dataclass, which does not check the types of its fields."""

    x: float
    tags: frozenset[str] = frozenset()


class Strange(BaseModel):
    """A model that raises an error which is no ValidationError."""

    x: int

    @field_validator("x")
    @classmethod
    def look_up(cls, x: int) -> int:
        """Refuse all but 1."""
        return {1: 1}[x]


class Coupon(BaseModel):
    """A model whose validators and serializer show the value in their errors."""

    kind: Literal["coupon"] = "coupon"
    code: str

    @field_validator("code")
    @classmethod
    def check(cls, code: str) -> str:
        """Refuse a code that contains "hunter2"."""
        if "hunter2" in code:
            raise ValueError(f"{code} is not a code")
        return code

    @field_serializer("code")
    def write(self, code: str) -> str:
        """Refuse "hunter2" too, which only a model without validation has."""
        if code == "hunter2":
            raise ValueError(code)
        return code


class Kinded(BaseModel):
    """Another kind, so that there is a union with a tag."""

    kind: Literal["other"]


class Locked(BaseModel):
    """A model with a private part that JSON does not have."""

    x: int
    _lock: object = PrivateAttr(default_factory=object)


class Unfinished(BaseModel):
    """A model with a type that does not exist."""

    where: "Elsewhere"


@dataclass(eq=False)
class Unequal:
    """A dataclass whose objects are equal to themselves only."""

    x: int


@dataclass
class Opaque:
    """A dataclass that pydantic has no schema for."""

    clock: Clock


ITEM = Item(sku=SKU, price=Decimal("1.10"), size=Size.LARGE)
ORDER = Order.model_validate({"number-in": 7, "items": [ITEM]})
Echo = Callable[..., Coroutine[Any, Any, Any]]


def echo_of(annotation: Any, got: list[Any] | None = None) -> Echo:
    """Return a task with one parameter of this type. It puts its argument into `got`."""

    async def echo(_: object, value: Any) -> None:
        assert got is not None
        got.append(value)

    echo.__annotations__["value"] = annotation
    return echo


async def call_with(function: Echo, *args: Any, **kwargs: Any) -> str | None:
    """Store the arguments as JSON, and call the function with them."""
    signature = Signature(function)
    return await call(signature, None, signature.encode(args, kwargs))


# Arguments that come back


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Order, ORDER),
        ("Order", ORDER),
        (list[Order], [ORDER, ORDER]),
        (Order | None, None),
        (dict[str, Order], {"first": ORDER}),
        (dict[int, str], {1: "one"}),
        (Point, Point(1.5, frozenset({"a"}))),
        (datetime, TODAY),
        (UUID, SKU),
        (Decimal, Decimal("1.10")),
        (Size, Size.LARGE),
        (tuple[int, ...], (1, 2)),
        (Annotated[str, Field(max_length=3)], "abc"),
        (Annotated[float, Field(gt=0)], 5.0),
        (Point, Point(1)),
        (list[Order], []),
        (dict[str, Coupon], {"a": Coupon(code="b")}),
        (Open, Open.model_validate({"x": 1})),
    ],
    ids=str,
)
async def test_an_argument_comes_back_as_its_annotation_says(annotation: Any, value: Any) -> None:
    got: list[Any] = []
    await call_with(echo_of(annotation, got), value)
    assert [(type(one), one) for one in got] == [(type(value), value)]


async def test_the_fields_of_a_dataclass_without_eq_are_compared() -> None:
    got: list[Unequal] = []
    await call_with(echo_of(Unequal, got), Unequal(7))
    assert [one.x for one in got] == [7]


@pytest.mark.parametrize(
    ("at", "stored"),
    [
        (datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN), "2026-10-25T02:30:00+02:00"),
        (datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=1), "2026-10-25T02:30:00+01:00"),
        (datetime(2026, 3, 29, 2, 30, tzinfo=BERLIN), "2026-03-29T02:30:00+01:00"),
    ],
    ids=["first", "second", "gap"],
)
async def test_a_time_around_a_clock_change_comes_back_with_its_offset(
    at: datetime, stored: str
) -> None:
    """Python says that such a time equals no time in another zone (PEP 495)."""
    got: list[Any] = []
    await call_with(echo_of(list[datetime], got), [at])
    assert [one.isoformat() for one in got[0]] == [stored]


@pytest.mark.parametrize(
    "annotation",
    [
        *(Mapping, Sequence, typing.Dict, typing.Mapping),  # noqa: UP006 -- the old names, bare
        *(str, int | None, Any, dict, list[int], dict[str, Any], Mapping[str, Sequence[str]]),
        *(Clock, Clock | None),
    ],
)
def test_an_argument_of_a_json_type_or_an_unknown_type_is_not_converted(annotation: Any) -> None:
    """So the usual argument costs nothing, and a parameter for a test's client may exist."""
    assert Signature(echo_of(annotation)).takes_json


async def test_each_kind_of_parameter_has_its_type() -> None:
    got: list[Any] = []

    async def work(
        _: object, first: UUID, /, second: int, *rest: Size, third: Decimal, **others: UUID
    ) -> None:
        got.extend([first, second, *rest, third, others])

    one, two = uuid.uuid4(), uuid.uuid4()
    arguments = [one, 2, Size.SMALL, Size.LARGE]
    await call_with(work, *arguments, third=Decimal(3), first=two)
    assert got == [*arguments, Decimal(3), {"first": two}]


async def test_a_decorated_function_keeps_its_types() -> None:
    got: list[Any] = []

    def logged(function: Echo) -> Echo:
        @wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> None:
            await function(*args, **kwargs)

        return wrapper

    await call_with(logged(echo_of(Order, got)), value=ORDER)
    assert got == [ORDER]


async def test_a_decorator_names_its_own_parameters() -> None:
    """By explicit parameters, or by __signature__ if it adds an argument."""

    async def charge(_: object, session: UUID, order: Order) -> None:
        assert (session, order) == (SKU, ORDER)

    @wraps(charge)
    async def explicit(context: object, order: Order) -> None:
        await charge(context, SKU, order)

    @wraps(charge)
    async def injecting(context: object, *args: Any) -> None:
        await charge(context, SKU, *args)

    await call_with(explicit, ORDER)
    with pytest.raises(ValueError, match=r"`session`: .*; a decorator that adds .* __signature__$"):
        Signature(injecting).encode((ORDER,), {})
    injecting.__signature__ = signature_of(explicit, follow_wrapped=False)  # type: ignore[attr-defined]
    await call_with(injecting, ORDER)


async def test_the_context_may_be_the_first_of_any_number() -> None:
    async def add(*args: UUID) -> None:
        assert args[1:] == (SKU, SKU)

    await call_with(add, SKU, SKU)


# Refused where they enter


@pytest.mark.parametrize(
    ("annotation", "value", "reason"),
    [
        (Order, "7", "Input should be .*instance of Order"),
        (Coupon, {"code": "a", "price": 1}, "price: Extra inputs are not permitted"),
        (datetime, 5, "Input should be a valid datetime"),
        (Decimal, 0.3, "Input should be an instance of Decimal"),
        (Annotated[int, Field(gt=0)], "5", "Input should be a valid integer"),
        (Annotated[int, Field(gt=0)], True, "Input should be a valid integer"),
        (tuple[bool, ...], (True, "yes"), "1: Input should be a valid boolean"),
        (list[Letter | str], [Letter.A], "Letter comes back from JSON as another value"),
        (Locked, Locked(x=1), "object comes back .* as another value; it has no __eq__"),
        (Point, Point("far"), "x: Input should be a valid number"),  # type: ignore[arg-type]
        (list[Item], [ITEM, {}], "1.sku: Field required; 1.price: Field required"),
        (Order, Gift.model_validate({"number-in": 7}), "Gift comes back .* as another value"),
        (SecretStr, SecretStr("hunter2"), "SecretStr comes back from JSON as another value"),
        (Sequence[UUID], (ITEM.sku,), "tuple comes back from JSON as another value"),
        (Point, Point(float("nan")), "not JSON compliant"),
        (Strange, Strange.model_construct(x=2), "its type raised KeyError$"),
        (Callable[[], int], int, "its type raised PydanticSerializationError"),
        (bytes, b"\xff", "its type raised UnicodeDecodeError"),
        (Coupon, Coupon.model_construct(code="hunter2"), "its type raised Pyd.*Error$"),
        (Coupon, Coupon.model_construct(code="hunter2!"), "code: value_error$"),
        (
            Annotated[Coupon | Kinded, Field(discriminator="kind")],
            {"kind": "hunter2"},
            "union_tag_",
        ),
        (dict[str, int | Item], {"hunter2@example.com": "x"}, "int: Input"),
    ],
    ids=str,
)
def test_what_the_worker_would_not_get_back_is_refused_by_name(
    annotation: Any, value: Any, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"^echo: the argument `value`: .*{reason}") as refusal:
        Signature(echo_of(annotation)).encode((value,), {})
    assert "hunter2" not in str(refusal.value)
    assert (refusal.value.__cause__, refusal.value.__context__) == (None, None)


@pytest.mark.parametrize("model", [ORDER, Point(1)])
def test_a_model_without_an_annotation_is_refused_with_advice(model: object) -> None:
    with pytest.raises(TypeError, match="has no JSON form; annotate the parameter with its class"):
        Signature(echo_of(Any)).encode((), {"value": model})


def test_an_annotation_without_a_schema_is_not_asked_for_again() -> None:
    with pytest.raises(TypeError, match="no JSON form; pydantic has no schema for the annotation"):
        Signature(echo_of(Opaque)).encode((Opaque(Clock()),), {})


def test_beside_a_model_an_argument_that_is_not_json_is_refused_by_name() -> None:
    async def send(_: object, order: Order, name: str) -> None:
        """Be a task."""

    with pytest.raises(TypeError, match="send: the argument `name`: bytes has no JSON form"):
        Signature(send).encode((ORDER, b"Ada"), {})
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="send: the argument `name`: Circular reference"):
        Signature(send).encode((ORDER, endless), {})


def test_annotations_that_cannot_be_resolved_are_refused_by_the_registry() -> None:
    async def send(_: object, where: "Elsewhere") -> None:
        """Have a type that only type checkers know."""

    with pytest.raises(TypeError, match=r"send: .* name 'Elsewhere' is not .* Define the types in"):
        Registry[None](send)


def test_a_class_with_unresolved_annotations_is_refused_by_the_registry() -> None:
    with pytest.raises(TypeError, match=r"echo: the annotations inside .*Unfinished\] cannot be"):
        Registry[None](echo_of(list[Unfinished]))


async def without_context() -> None:
    """Take nothing."""


async def by_name_only(*, name: str) -> None:
    """Take no positional argument."""


@pytest.mark.parametrize("function", [without_context, by_name_only])
def test_a_function_without_a_context_is_refused_by_the_registry(function: Echo) -> None:
    with pytest.raises(TypeError, match="its first parameter must take the Context"):
        Registry[None](function)


def test_the_type_of_the_context_may_be_known_to_type_checkers_only() -> None:
    async def send(_: "Context[Elsewhere]", order: Order) -> None:
        """Be a task."""

    assert not Registry[None](send).signature("send").takes_json


# Read back by the worker


async def test_a_stored_argument_that_no_longer_fits_fails_its_task_at_once(
    engine: Engine, clock: Clock
) -> None:
    """The error names the task and the argument, and not the value."""
    queue = queue_of(engine, function := echo_of(list[Item], []), now=clock)
    stored = json.dumps({"args": [], "kwargs": {"value": [{"sku": str(ITEM.sku), "cost": "5"}]}})
    task = a_task(kind=function.__name__, arguments=stored)
    await put(engine, task)
    await Worker(queue, None).run_until_idle()
    failed = await engine.get(task.id)
    assert (failed.status, failed.attempts) == (Status.FAILED, 1)
    assert json.loads(failed.error or "") == {
        "type": "PermanentError",
        "detail": "echo: the stored argument `value` does not fit: 0.price: Field required",
    }


async def test_any_error_of_a_model_is_permanent() -> None:
    """The error is stored with the task and logged, so neither it nor its cause shows the value."""
    with pytest.raises(PermanentError, match=r"not fit: its type raised KeyError$") as refusal:
        await call(Signature(echo_of(Strange)), None, '{"args":[{"x":2}],"kwargs":{}}')
    assert (refusal.value.__cause__, refusal.value.__context__) == (None, None)


async def test_a_model_goes_from_a_transaction_to_the_worker(engine: Engine, clock: Clock) -> None:
    """And the model that the function returns is the task's result."""

    async def cheapest(_: Context[None], order: Order, *, at: datetime) -> Item:
        assert at.tzinfo is not None
        return order.items[0]

    queue = queue_of(engine, cheapest, now=clock)
    task = await promise(queue, cheapest, ORDER, at=datetime.now(UTC))
    await Worker(queue, None).run_until_idle()
    done = await engine.get(task.id)
    assert (done.status, done.error) == (Status.SUCCEEDED, None)
    assert Item.model_validate_json(done.result or "") == ITEM


# Results


@pytest.mark.parametrize(
    ("result", "stored"),
    [
        (Point(1.5), '{"x":1.5,"tags":[]}'),
        ([{"item": ITEM}], f'[{{"item":{ITEM.model_dump_json()}}}]'),
        (ORDER, ORDER.model_dump_json(by_alias=True)),
        ({"id": ITEM.sku, "size": Size.LARGE}, f'{{"id":"{ITEM.sku}","size":"l"}}'),
        (Decimal("1.10"), '"1.10"'),
        (datetime(2030, 1, 2, tzinfo=UTC), '"2030-01-02T00:00:00Z"'),
    ],
)
async def test_a_result_may_be_a_model_or_contain_one(result: object, stored: str) -> None:
    async def work(_: object) -> object:
        return result

    assert await call_with(work) == stored


@pytest.mark.parametrize("result", [Point, Point(float("inf")), Point(object())])  # type: ignore[arg-type]
async def test_a_model_without_a_json_form_is_no_result(result: object) -> None:
    async def work(_: object) -> object:
        return result

    with pytest.raises(UnusableResult, match="the work was done, but its result is not JSON"):
        await call_with(work)
