"""The system calls of a service in their order, as strace tells them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.tools import tool

_CALLS = "write,writev,sendto,sendmsg,pwrite64,rename,renameat,renameat2,fsync,fdatasync"
_LINE = re.compile(
    r"(?P<thread>\d+) +(?:<\.\.\. (?P<resumed>\w+) resumed>|(?P<name>\w+)\()(?P<rest>.*)"
)


@dataclass(frozen=True, slots=True)
class Call:
    """One system call: its arguments as strace writes them, and when it began and ended."""

    name: str
    arguments: str
    began: int
    ended: int

    def __contains__(self, text: str) -> bool:
        """Whether a text is in its arguments: a path, or some of the bytes it wrote."""
        return text in self.arguments


def strace(command: tuple[str, ...], trace: Path) -> tuple[str, ...]:
    """A command that runs another, and writes what it asks of the system."""
    # -D: the process that is started, and killed, is the command itself.
    # -y: paths instead of numbers. -s: a whole page of the database, where ids are to be found.
    options = f"-D -f -y -s 9000 --seccomp-bpf -e signal=kill -e trace={_CALLS} -o"
    return (tool("strace"), *shlex.split(options), str(trace), *command)


def calls(trace: str) -> Iterator[Call]:
    """The calls that have ended well, by the time when they did.

    A call in which another thread's comes is written in two parts, its begin and its end. So the
    number of a line is a clock: one call was over before another began if its line comes first.
    """
    begun: dict[str, tuple[int, str, str]] = {}
    for number, line in enumerate(trace.splitlines()):
        match = _LINE.match(line)
        if match is None:
            continue
        began, name, arguments = number, match["name"], match["rest"]
        if match["resumed"]:
            began, name, start = begun.pop(match["thread"])
            arguments = start + arguments
        if arguments.endswith("<unfinished ...>"):
            begun[match["thread"]] = (began, name, arguments.removesuffix("<unfinished ...>"))
        elif not re.search(r"= (-1|\?)", arguments.rpartition(")")[2]):
            yield Call(name, arguments, began, number)
