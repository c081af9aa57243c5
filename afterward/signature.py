"""The arguments of tasks as JSON: models and dataclasses too, by the annotations of the function.

    async def send(context: Context, order: Order, copies: int) -> None: ...

`add_task(send, Order(id=7), 2)` stores `{"args":[{"id":7},2],"kwargs":{}}`. The worker calls `send`
with an Order again, because the annotation says so.
"""

import inspect
import re
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from itertools import chain, repeat
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from pydantic_core.core_schema import ErrorType

from afterward.errors import PermanentError
from afterward.task import to_json

Function = Callable[..., Coroutine[Any, Any, Any]]

_SCALARS = (str, int, float, bool, NoneType)
_JSON_TYPES = (*_SCALARS, Any, inspect.Parameter.empty)
_PLACE = re.compile(r"\d{1,9}|[A-Za-z_]\w{0,63}", re.ASCII)  # an index, or a usual field name


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter. `adapter` turns its arguments into JSON and back; None if they are JSON."""

    name: str
    annotation: Any = inspect.Parameter.empty
    adapter: TypeAdapter[Any] | None = None


class Signature:
    """The function of a task, and the types of its parameters after the context.

    The annotations are resolved once, here. If an annotation is JSON already, such as `str` or
    `dict[str, int]`, its arguments are stored and passed on as JSON has them: a tuple comes back as
    a list. So are they if there is no annotation, or if pydantic does not know the type. Raises
    TypeError if an annotation cannot be resolved, or if the function takes no context.

    The parameters of a decorated function are those of the function inside, if the decorator passes
    on `*args` and `**kwargs`. A decorator that adds an argument must set `__signature__`.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.defaults: dict[str, Any] = {}
        """The default of each parameter but `*args` and `**kwargs`; None if it has none."""
        self._positional: list[_Parameter] = []
        self._named: dict[str, _Parameter] = {}
        self._more_positional = self._more_named = _Parameter("")  # for *args and **kwargs
        parameters = [self._add(parameter) for parameter in _resolved_parameters(function)]
        self.takes_json = all(parameter.adapter is None for parameter in parameters)
        """Whether every argument is JSON, so that nothing has to be decoded."""

    def encode(self, args: Iterable[Any], kwargs: dict[str, Any]) -> str:
        """Return the arguments of a call as JSON.

        Raises TypeError if an argument has no JSON form; ValueError for NaN and infinities, for an
        argument that does not fit its annotation, and for one that its annotated type would not
        restore unchanged, such as a SecretStr. The message names the task and the argument, and
        does not show the value, which may be secret.
        """
        if self.takes_json:
            try:
                return to_strict_json({"args": args, "kwargs": kwargs})
            except (TypeError, ValueError, RecursionError):
                pass  # to name the argument, encode each for itself
        args, kwargs = self._convert(self._encode_argument, args, kwargs)
        return to_json({"args": args, "kwargs": kwargs})

    def argument(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the value of a parameter in a call with these arguments."""
        for parameter, value in zip(self._positional, args, strict=False):
            if parameter.name == name:
                return value
        return kwargs.get(name, self.defaults[name])

    def decode(self, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of a call from their JSON values.

        Raises PermanentError if one does not fit its annotation, for example because its model has
        changed since the task was added. The message names the task and the argument.
        """
        return self._convert(self._decode_argument, args, kwargs)

    def _add(self, given: inspect.Parameter) -> _Parameter:
        parameter = _Parameter(
            given.name, given.annotation, _adapter(self.function, given.annotation)
        )
        if given.kind is given.VAR_POSITIONAL:
            self._more_positional = parameter
        elif given.kind is given.VAR_KEYWORD:
            self._more_named = parameter
        else:
            self.defaults[given.name] = None if given.default is given.empty else given.default
            if given.kind is not given.KEYWORD_ONLY:
                self._positional.append(parameter)
            if given.kind is not given.POSITIONAL_ONLY:
                self._named[given.name] = parameter
        return parameter

    def _convert(
        self, convert: Callable[[_Parameter, Any], Any], args: Iterable[Any], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return all arguments, converted one by one."""
        parameters = chain(self._positional, repeat(self._more_positional))
        named = {
            name: convert(self._named.get(name, self._more_named), value)
            for name, value in kwargs.items()
        }
        return list(map(convert, parameters, args)), named

    def _encode_argument(self, parameter: _Parameter, value: Any) -> Any:
        try:
            if parameter.adapter is not None:
                return _to_json_value(parameter.adapter, value)
            to_strict_json(value)
        except Exception as error:  # noqa: BLE001 -- a validator may raise any error
            kind = TypeError if isinstance(error, TypeError) else ValueError
            reason = _explain(error, parameter) + self._advice(parameter, value)
        else:
            return value
        # Outside of the handler, because a traceback of the first error would show the value.
        raise kind(f"{self.function.__name__}: the argument `{parameter.name}`: {reason}")

    def _advice(self, parameter: _Parameter, value: Any) -> str:
        """Return the advice that follows the reason for a refusal; perhaps none."""
        advice = ""
        if parameter.adapter is None and (isinstance(value, BaseModel) or is_dataclass(value)):
            if _is_json(parameter.annotation):
                advice += "; annotate the parameter with its class"
            else:
                advice += "; pydantic has no schema for the annotation of the parameter"
        if hasattr(self.function, "__wrapped__") and not _has_own_parameters(self.function):
            advice += "; a decorator that adds an argument must set __signature__"
        return advice

    def _decode_argument(self, parameter: _Parameter, value: Any) -> Any:
        if parameter.adapter is None:
            return value
        try:
            return _from_json_value(parameter.adapter, value)
        except Exception as error:  # noqa: BLE001 -- a validator may raise any error
            reason = _explain(error, parameter)
        raise PermanentError(
            f"{self.function.__name__}: the stored argument `{parameter.name}` does not fit: "
            f"{reason}"
        )


def to_strict_json(value: object) -> str:
    """Return JSON as `to_json` does, but raise TypeError for a dict key that is not a str.

    JSON has no other keys. `json` makes a str of a number, so 1 and "1" would become one key.
    """
    encoded = to_json(value)  # first, because it refuses a value that contains itself
    rest = [value]
    for part in rest:
        if isinstance(part, dict):
            for key in part:
                if not isinstance(key, str):
                    raise TypeError(f"a dict key of type {type(key).__name__} has no JSON form")
            rest += part.values()
        elif isinstance(part, list | tuple):
            rest += part
    return encoded


def _resolved_parameters(function: Function) -> list[inspect.Parameter]:
    """Return the parameters after the context, with annotations that are types, and not texts."""
    source = inspect.unwrap(function, stop=_has_own_parameters)
    parameters = list(inspect.signature(source, follow_wrapped=False).parameters.values())
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    if not parameters or parameters[0].kind in by_name:
        raise TypeError(f"{function.__name__}: its first parameter must take the Context")
    # The context is left out, so a module may import its class for type checkers only. A function
    # `(*args)` takes the context and the arguments with one parameter.
    if parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        del parameters[0]
    annotated = SimpleNamespace(__annotations__={each.name: each.annotation for each in parameters})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        types = get_type_hints(annotated, names, include_extras=True)
    except Exception as error:
        raise TypeError(
            f"{function.__name__}: its annotations cannot be resolved: {error}. Define the types "
            "in a module, not in a function, and import them at run time too, not for type "
            "checkers only"
        ) from error
    return [each.replace(annotation=types[each.name]) for each in parameters]


def _has_own_parameters(wrapper: Function) -> bool:
    """Tell whether a decorator's function names its parameters, and does not pass on any."""
    parameters = inspect.signature(wrapper, follow_wrapped=False).parameters.values()
    return hasattr(wrapper, "__signature__") or not any(
        each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters
    )


def _adapter(function: Function, annotation: Any) -> TypeAdapter[Any] | None:
    """Return the TypeAdapter of an annotation; None for JSON types, and for unknown types.

    Raises TypeError if a class inside the annotation has an annotation that cannot be resolved.
    """
    if _is_json(annotation):
        return None
    try:
        adapter = TypeAdapter(annotation)
    except PydanticUserError:
        return None
    if not adapter.pydantic_complete:
        raise TypeError(
            f"{function.__name__}: the annotations inside {annotation!r} cannot be resolved. "
            "Define or import their types before the function is registered"
        )
    return adapter


def _is_json(annotation: Any) -> bool:
    """Tell whether JSON has this type, so that its values need no conversion."""
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (dict, Mapping):
        # JSON has no other keys. A bare `dict` has no arguments.
        return not arguments or (arguments[0] is str and _is_json(arguments[1]))
    if origin in (list, Sequence, Collection, Iterable, Union, UnionType):
        return all(map(_is_json, arguments))
    return annotation in _JSON_TYPES


def _to_json_value(adapter: TypeAdapter[Any], value: Any) -> Any:
    """Return the JSON form of an argument. Raises ValueError if the worker could not restore it."""
    # Strict, because otherwise "5" becomes an int in silence. And without unknown keys, because
    # otherwise a dict for a model or a TypedDict loses them in silence.
    value = adapter.validate_python(value, strict=True, extra="forbid")
    # The names of the fields, because a field may have one alias for reading, and another for
    # writing.
    # No warnings, because a value of the wrong type does not come back as it was.
    encoded = adapter.dump_python(
        value, mode="json", by_alias=False, round_trip=True, warnings=False
    )
    _check_same(value, _from_json_value(adapter, encoded))
    return encoded


def _from_json_value(adapter: TypeAdapter[Any], encoded: Any) -> Any:
    # Not validate_python: strict models accept a text for a time or a UUID in JSON only.
    return adapter.validate_json(to_json(encoded), by_alias=False, by_name=True)


def _check_same(value: Any, restored: Any) -> None:
    """Raise ValueError unless both are of the same types and equal, down to the last field.

    `==` alone does not see that a StrEnum in a list came back as a str.
    """
    kind = type(value)
    # The usual part takes a shorter way: a text, a number or None.
    if kind in _SCALARS and kind is type(restored) and value == restored:
        return
    parts, restored_parts = _parts(value), _parts(restored)
    if kind is type(restored) and parts and len(parts) == len(restored_parts):
        for part, restored_part in zip(parts, restored_parts, strict=True):
            _check_same(part, restored_part)
    elif not _is_equal(value, restored):
        has_eq = kind.__eq__ is not object.__eq__  # type: ignore[comparison-overlap]
        reason = "" if has_eq else "; it has no __eq__"
        raise ValueError(f"{kind.__name__} comes back from JSON as another value{reason}")


def _is_equal(value: Any, restored: Any) -> bool:
    """Tell whether two values without parts have one type and are equal."""
    if isinstance(value, datetime) and isinstance(restored, datetime):
        # Not `==`: around a clock change, a time in a named zone equals no time in another zone
        # (PEP 495). A named zone such as Europe/Berlin comes back as its offset, such as +02:00.
        return value.isoformat() == restored.isoformat()
    kinds = type(value), type(restored)
    # A dataclass may have an int in a field for floats: 1 comes back as 1.0.
    return bool((kinds[0] is kinds[1] or kinds == (int, float)) and value == restored)


def _parts(value: Any) -> list[Any]:
    """Return the values inside a model, a dataclass, a dict, a list or a tuple; [] for others."""
    if isinstance(value, BaseModel):
        own = [getattr(value, name) for name in type(value).model_fields]
        return [*own, value.model_extra, value.__pydantic_private__]
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, dict):
        return [*value, *value.values()]
    return [*value] if isinstance(value, list | tuple) else []


def _explain(error: Exception, parameter: _Parameter) -> str:
    """Return the reason for a refusal, without the refused value.

    Only texts by pydantic and by this module are shown. A ValueError of a validator never gets
    here as it is, because pydantic makes it a part of a ValidationError; its KeyError does.
    """
    if isinstance(error, ValidationError):
        return "; ".join(map(_explain_fault, error.errors(include_url=False, include_input=False)))
    if parameter.adapter is None or type(error) is ValueError:
        return str(error)
    return f"its type raised {type(error).__name__}"


def _explain_fault(fault: ErrorDetails) -> str:
    """Return the place and the reason, such as "items.0.price: Field required".

    The place has no dict keys of unusual form. A message that may contain the input, or that a
    validator wrote, is replaced by the type of the fault, such as "value_error".
    """
    parts = [str(part) for part in fault["loc"]]
    place = ".".join(part for part in parts if _PLACE.fullmatch(part))
    may_show_input = fault["type"] not in get_args(ErrorType) or not {"error", "tag"}.isdisjoint(
        fault.get("ctx", {})
    )
    return f"{place}: {fault['type' if may_show_input else 'msg']}".removeprefix(": ")
