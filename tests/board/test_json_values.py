"""The arguments and results of tasks as texts: what is shown, and what it costs."""

import json
import tracemalloc

from app.board.json_values import MOST_SHOWN, arguments, result

MB = 1_000_000


def test_values_are_shown_by_name_as_json_with_indents() -> None:
    stored = json.dumps({"args": [1, "two"], "kwargs": {"data": {"é": [None]}}})
    shown = [(value.name, value.text, value.is_cut) for value in arguments(stored)]
    assert shown == [
        ("argument 1", "1", False),
        ("argument 2", "two", False),
        ("data", '{\n  "é": [\n    null\n  ]\n}', False),
    ]
    assert [(value.name, value.text) for value in result("[]")] == [("result", "[]")]


def test_a_long_text_and_a_long_value_are_cut_and_their_whole_size_is_known() -> None:
    text, numbers = arguments(json.dumps({"args": ["x" * 30_000, list(range(10_000))]}))
    assert (len(text.text), text.size, text.is_cut) == (MOST_SHOWN, 30_000, True)
    assert (len(numbers.text), numbers.is_cut) == (MOST_SHOWN, True)
    assert numbers.size == len(json.dumps(list(range(10_000))))
    (whole,) = arguments(json.dumps({"args": ["x" * MOST_SHOWN]}))
    assert not whole.is_cut


def test_a_long_list_in_many_lists_needs_little_memory() -> None:
    """With indents, all of it would have 40 MB."""
    stored = f'{{"args": [{"[" * 190}{",".join(["1"] * 100_000)}{"]" * 190}]}}'
    tracemalloc.start()
    (value,) = arguments(stored)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(value.text), value.is_cut) == (MOST_SHOWN, True)
    assert peak < 5 * MB
