"""The arguments of tasks as JSON: models and dataclasses too, by the annotations of the function.

    async def send(context: Context, order: Order, copies: int) -> None: ...

`add_task(send, Order(id=7), 2)` stores `{"args":[{"id":7},2],"kwargs":{}}`. The worker calls `send`
with an Order again, because the annotation says so.
"""

import inspect
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import chain, repeat
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, PydanticUserError, TypeAdapter, ValidationError

from afterward.errors import PermanentError
from afterward.task import to_json

Function = Callable[..., Coroutine[Any, Any, Any]]

_JSON_TYPES = (str, int, float, bool, list, dict, NoneType, Any, inspect.Parameter.empty)


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter. `adapter` turns its arguments into JSON and back; None if they are JSON."""

    name: str
    adapter: TypeAdapter[Any] | None = None


class Signature:
    """The function of a task, and the types of its parameters after the context.

    The annotations are resolved once, here. If an annotation is JSON already, such as `str` or
    `dict[str, int]`, its arguments are stored and passed on as they are, at no cost. So are they if
    there is no annotation, or if pydantic does not know the type. Raises TypeError if an annotation
    cannot be resolved.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self._positional: list[_Parameter] = []
        self._named: dict[str, _Parameter] = {}
        self._more_positional = self._more_named = _Parameter("")  # for *args and **kwargs
        parameters = [self._add(parameter) for parameter in _resolved_parameters(function)]
        self.takes_json = all(parameter.adapter is None for parameter in parameters)
        """Whether every argument is JSON, so that nothing has to be decoded."""

    def encode(self, args: Iterable[Any], kwargs: dict[str, Any]) -> str:
        """Return the arguments of a call as JSON.

        Raises TypeError if an argument has no JSON form; ValueError for NaN and infinities, for an
        argument that does not fit its annotation, and for one that the worker would not get back
        unchanged, such as a SecretStr. The message names the task and the argument.
        """
        if self.takes_json:
            try:
                return to_json({"args": args, "kwargs": kwargs})
            except (TypeError, ValueError, RecursionError):
                pass  # to name the argument, encode each for itself
        args, kwargs = self._convert(self._encode_argument, args, kwargs)
        return to_json({"args": args, "kwargs": kwargs})

    def decode(self, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of a call from their JSON values.

        Raises PermanentError if one does not fit its annotation, for example because its model has
        changed since the task was added. The message names the task and the argument.
        """
        return self._convert(self._decode_argument, args, kwargs)

    def _add(self, given: inspect.Parameter) -> _Parameter:
        parameter = _Parameter(given.name, _adapter(given.annotation))
        if given.kind is given.VAR_POSITIONAL:
            self._more_positional = parameter
        elif given.kind is given.VAR_KEYWORD:
            self._more_named = parameter
        else:
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
            to_json(value)
        except Exception as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            reason = _explain(error)
            if parameter.adapter is None and (isinstance(value, BaseModel) or is_dataclass(value)):
                reason += "; annotate the parameter with its class"
            raise kind(
                f"{self.function.__name__}: the argument `{parameter.name}`: {reason}"
            ) from error
        return value

    def _decode_argument(self, parameter: _Parameter, value: Any) -> Any:
        if parameter.adapter is None:
            return value
        try:
            return _from_json_value(parameter.adapter, value)
        except Exception as error:
            raise PermanentError(
                f"{self.function.__name__}: the stored argument `{parameter.name}` does not fit: "
                f"{_explain(error)}"
            ) from error


def _resolved_parameters(function: Function) -> list[inspect.Parameter]:
    """Return the parameters after the context, with annotations that are types, and not texts."""
    try:
        _, *parameters = inspect.signature(function).parameters.values()
        # The context is left out, so a module may import its class for type checkers only.
        annotated = SimpleNamespace(
            __annotations__={each.name: each.annotation for each in parameters}
        )
        names = getattr(inspect.unwrap(function), "__globals__", {})
        types = get_type_hints(annotated, names, include_extras=True)
    except Exception as error:
        raise TypeError(
            f"{function.__name__}: its annotations cannot be resolved: {error}. Import the types "
            "at run time too, and not for type checkers only"
        ) from error
    return [each.replace(annotation=types[each.name]) for each in parameters]


def _adapter(annotation: Any) -> TypeAdapter[Any] | None:
    """Return the TypeAdapter of an annotation; None for JSON types, and for unknown types."""
    if _is_json(annotation):
        return None
    try:
        return TypeAdapter(annotation)
    except PydanticUserError:
        return None


def _is_json(annotation: Any) -> bool:
    """Tell whether JSON has this type, so that its values need no conversion."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (dict, Mapping):
        return arguments[0] is str and _is_json(arguments[1])  # JSON has no other keys
    if origin in (list, Sequence, Collection, Iterable, Union, UnionType):
        return all(map(_is_json, arguments))
    return annotation in _JSON_TYPES


def _to_json_value(adapter: TypeAdapter[Any], value: Any) -> Any:
    """Return the JSON form of an argument. Raises ValueError if the worker could not restore it."""
    value = adapter.validate_python(value)
    # The names of the fields, because a field may have one alias for reading, and another for
    # writing.
    # No warnings, because a value of the wrong type does not come back as it was.
    encoded = adapter.dump_python(
        value, mode="json", by_alias=False, round_trip=True, warnings=False
    )
    if _from_json_value(adapter, encoded) != value:
        raise ValueError(f"{type(value).__name__} comes back from JSON as another value")
    return encoded


def _from_json_value(adapter: TypeAdapter[Any], encoded: Any) -> Any:
    # Not validate_python: strict models accept a text for a time or a UUID in JSON only.
    return adapter.validate_json(to_json(encoded), by_alias=False, by_name=True)


def _explain(error: Exception) -> str:
    """Return the reason for a refusal. A ValidationError's own text shows the refused value."""
    if not isinstance(error, ValidationError):
        return str(error)
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(
        ": ".join([".".join(map(str, fault["loc"])), fault["msg"]]).removeprefix(": ")
        for fault in faults
    )
