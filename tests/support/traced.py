"""The system calls of a service in order, recorded by strace."""

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
    """A system call: its arguments as strace prints them, and its begin and end as line numbers."""

    name: str
    arguments: str
    began: int
    ended: int

    def __contains__(self, text: str) -> bool:
        """Return whether the arguments contain a text: a path, or some of the written bytes."""
        return text in self.arguments


def strace(command: tuple[str, ...], trace: Path) -> tuple[str, ...]:
    """Return a command that runs `command`, and writes its system calls to the file `trace`."""
    # -D: strace runs as a grandchild, so the process that a test starts and kills is the command.
    # -y: paths next to file descriptors. -s: long strings, because ids are anywhere in a page.
    options = f"-D -f -y -s 9000 --seccomp-bpf -e signal=kill -e trace={_CALLS} -o"
    return (tool("strace"), *shlex.split(options), str(trace), *command)


def calls(trace: str) -> Iterator[Call]:
    """Yield the successful calls, in the order of their ends.

    strace prints a call in two lines, begin and end, if a call of another thread comes between. So
    line numbers serve as a clock. For example, a call with lines 3 to 5 was over before a call with
    lines 7 to 7 began.
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
