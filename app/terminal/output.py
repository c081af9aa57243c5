"""Standard output and standard error: colours on a terminal, plain lines in a pipe, or JSON.

Every text that comes from the service goes through `printable`. Some of these texts are chosen by
strangers: an SMTP server's reply, a recipient's address.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterable
from io import TextIOBase, TextIOWrapper
from typing import Any, TextIO

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Json = dict[str, Any]

NOTHING_MATCHED = 1
NOT_SUCCEEDED = 1  # the watched task, or the task that acts on many
TROUBLE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE


class Trouble(Exception):
    """Ends the command. Its message goes to standard error, in one line."""

    def __init__(self, message: str, exit_code: int = TROUBLE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def printable(value: object) -> str:
    r"""Return a text with each control character as an escape, for example `\x1b` or `\u202e`.

    The text then cannot move the cursor, change colours, begin a line, or run backwards.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(value)
    )


def prepare_streams() -> None:
    """Prepare standard output and standard error for any text, and for a reader of a pipe.

    A terminal that cannot show a character gets an escape. Each line is written at once, because
    the reader of a pipe waits for it. A stream that is closed (`>&-`) takes nothing.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or _Nowhere()
        setattr(sys, name, stream)
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


class _Nowhere(TextIOBase):
    """A stream that discards its input."""

    def write(self, text: str) -> int:
        """Discard a text."""
        return len(text)


def discard(stream: TextIO) -> None:
    """Discard what a stream still has to write, because Python flushes it once more at its exit."""
    with contextlib.suppress(OSError):  # it has no file, because it was closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(message: str) -> None:
    """Print the last line of a command to standard error, if that can be written."""
    try:
        print(message, file=sys.stderr)  # noqa: T201
    except OSError:
        discard(sys.stderr)


class _Console(Console):
    """A rich console without markup, so that `[red]` in a text is no colour."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, as `print` does. By default, rich would exit with code 1."""
        raise BrokenPipeError


class Output:
    """The two streams of a command. `as_json` is its option --json."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.console = _Console()
        self.notes = _Console(stderr=True)

    @property
    def is_terminal(self) -> bool:
        """Whether the output is a terminal.

        Then a person reads it, and gets headers, and ages instead of full times. rich says yes also
        for FORCE_COLOR, which many CI systems set. This is right for colours, but here a program
        may be the reader.
        """
        return sys.stdout.isatty()

    @property
    def notes_on_terminal(self) -> bool:
        """Whether standard error is a terminal. Then a person sees the progress."""
        return sys.stderr.isatty()

    def line(self, *parts: str | tuple[str, str], cut: bool = False) -> None:
        """Print a line. A part is a text, or a text and its style.

        A terminal wraps a long line, unless it is to be `cut` at the right edge.
        """
        text = Text.assemble(*parts)
        if cut:
            self.console.print(text, no_wrap=True, overflow="ellipsis")
        else:
            self.console.print(text, soft_wrap=True)

    def item(self, name: str, text: str, style: str = "", *, indent: int = 2) -> None:
        """Print a text beside its name. On a terminal, the lines of a long text stay beside it."""
        if not self.is_terminal:
            self.line(f"{' ' * indent}{name}  {text}")
            return
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(no_wrap=True, style="dim")
        row.add_column(overflow="fold")
        row.add_row(Text(name), Text(text, style))
        self.console.print(Padding(row, (0, 0, 0, indent)))

    def columns(self, values: Iterable[str]) -> None:
        """Print a line for other programs: the values, separated by tabs."""
        sys.stdout.write("\t".join(values) + "\n")

    def json(self, value: Json) -> None:
        """Print an object of the API in one line.

        The line is ASCII: other characters are escaped as JSON allows it, so that none of them
        reaches a terminal.
        """
        sys.stdout.write(json.dumps(value).replace("\x7f", "\\u007f") + "\n")

    def note(self, message: str) -> None:
        """Print a line to standard error, which does not mix with the results in a pipe."""
        self.notes.print(Text(printable(message)), soft_wrap=True)
