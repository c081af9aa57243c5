"""The arguments and the result of a task as texts for people."""

import json
from dataclasses import dataclass
from typing import Any

LONG = 200  # characters; a longer text, or a text of several lines, is folded
MOST_SHOWN = 20_000  # characters of one text

_INDENTED = json.JSONEncoder(ensure_ascii=False, indent=2)


@dataclass(frozen=True, slots=True)
class NamedValue:
    """A value from JSON as a text. `size` is the length of the whole value in characters.

    `is_cut` says whether the page shows only the beginning. If the value is no text, `size` then
    counts its JSON without indents.
    """

    name: str
    text: str
    size: int
    is_cut: bool

    @property
    def is_long(self) -> bool:
        """Whether the page folds it."""
        return self.size > LONG or "\n" in self.text


def arguments(stored: str) -> list[NamedValue]:
    """Return the arguments of a task, from the JSON in its row. Those without names come first."""
    call = _parse(stored)
    if not isinstance(call, dict):
        return [_named("arguments", stored)]
    positional, by_name = call.get("args"), call.get("kwargs")
    return [
        *(_named(f"argument {n}", value) for n, value in enumerate(_list(positional), start=1)),
        *(_named(name, value) for name, value in _dict(by_name).items()),
    ]


def result(stored: str | None) -> list[NamedValue]:
    """Return the result of a task, from the JSON in its row: the fields of an object by name."""
    value = None if stored is None else _parse(stored)
    if value is None:
        return []
    fields = value if isinstance(value, dict) else {"result": value}
    return [_named(name, field) for name, field in fields.items()]


def _parse(stored: str) -> Any:
    """Parse stored JSON. The text of damaged JSON stands for itself."""
    try:
        return json.loads(stored)
    except (ValueError, RecursionError):
        return stored


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _named(name: str, value: object) -> NamedValue:
    text = value if isinstance(value, str) else _beginning(value)
    is_cut = len(text) > MOST_SHOWN
    whole = text if isinstance(value, str) or not is_cut else json.dumps(value, ensure_ascii=False)
    return NamedValue(_encodable(name), _encodable(text[:MOST_SHOWN]), len(whole), is_cut)


def _beginning(value: object) -> str:
    """Return a value as JSON with indents; of a long one, a little more than MOST_SHOWN characters.

    The indents of deeply nested lists can take hundreds of times the memory of the lists.
    """
    text = ""
    for chunk in _INDENTED.iterencode(value):
        text += chunk
        if len(text) > MOST_SHOWN:
            break
    return text


def _encodable(text: str) -> str:
    """Replace halves of surrogate pairs: JSON may have them, but UTF-8 has no form for them."""
    return text.encode(errors="replace").decode()
