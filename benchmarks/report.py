"""Write the results: the lines of the table, docs/performance.md, and its charts."""

import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks import peers
from benchmarks.harness import Result, Series
from benchmarks.load import ROOT
from tests.support.postgres import INSTALLED

PAGE = ROOT / "docs" / "performance.md"
CHARTS = PAGE.with_name("charts")
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"

HEAD = """\
| | compared | to reach | reached (least to most) | ours against theirs | met | on |
|---|---|---|---|---|---|---|"""

OURS = ("fastapi", "uvicorn", "uvloop", "httptools", "pydantic", "aiosmtplib", "asyncpg")
THEIRS = (
    *("pgqueuer", "procrastinate", "saq", "taskiq", "taskiq-redis", "celery", "fastapi-mail"),
    *("huey", "litequeue", "persist-queue"),
)
PROGRAMS = {
    "wrk": ("wrk", "-v"),
    "Redis": ("redis-server", "--version"),
    "PostgreSQL": (f"{sysconfig.get_path('purelib')}/{INSTALLED}/bin/postgres", "--version"),
}


def line(result: Result) -> str:
    """Return the table's line for a result."""
    target, reached = result.target, result.reached
    cells = (
        result.measure,
        result.what,
        f"{target} {result.unit}".rstrip() if target else "",
        f"{_number(reached.median)} {result.unit}".rstrip()
        + f" ({_number(reached.low)} to {_number(reached.high)})",
        _figures(result),
        ("yes" if target.is_met_by(reached.median) else "**no**") if target else "",
        f"{datetime.now(UTC):%Y-%m-%d}",
    )
    return f"| {' | '.join(cells)} |"


def machine() -> str:
    """Describe the machine and the versions of the programs."""
    ours = ", ".join(f"{name} {version(name)}" for name in OURS)
    return (
        f"{os.cpu_count()} cores ({_processor()}), which the load generator shares; "
        f"{platform.system()} {platform.release()}; Python {platform.python_version()}, {ours}; "
        f"{peers.versions(*THEIRS)}; {', '.join(_programs())}."
    )


def sort_key(measure: str) -> tuple[int, str]:
    """Return a sort key that gives the order P1, P1b, P2, P10."""
    return int(re.sub(r"\D", "", measure)), measure


def write(lines: Sequence[str], series: Sequence[Series]) -> None:
    """Replace the measures' lines in docs/performance.md, and draw the charts."""
    before, rest = PAGE.read_text().split(BEGIN)
    measured, after = rest.split(END)
    kept = re.findall(r"^\| P\d.*$", measured, re.MULTILINE)
    anew = {_measure(line) for line in lines}
    table = [*(line for line in kept if _measure(line) not in anew), *lines]
    table.sort(key=lambda line: sort_key(_measure(line)))
    if series:
        _draw(series)
    parts = "\n\n".join(["\n".join([HEAD, *table]), machine(), *_pictures()])
    PAGE.write_text(f"{before}{BEGIN}\n{parts}\n\n{END}{after}")


def _draw(series: Sequence[Series]) -> None:
    CHARTS.mkdir(exist_ok=True)
    subprocess.run(
        [peers.python(), "-m", "benchmarks.charts", CHARTS],
        check=True,
        cwd=ROOT,
        input=json.dumps([asdict(curve) for curve in series]),
        text=True,
    )


def _pictures() -> Iterator[str]:
    for chart in sorted(CHARTS.glob("*.svg")):
        title = chart.stem.replace("-", " ").capitalize()
        yield f"![{title}]({CHARTS.name}/{chart.name})"


def _figures(result: Result) -> str:
    both = [_number(spread.median) for spread in (result.ours, result.theirs) if spread]
    return f"{' against '.join(both)} {result.figures_unit}".strip()


def _number(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.2f}"


def _measure(line: str) -> str:
    return line.split("|")[1].strip()


def _programs() -> Iterator[str]:
    for name, command in PROGRAMS.items():
        if shutil.which(command[0]):
            said = subprocess.run(command, check=False, capture_output=True, text=True).stdout
            number = re.search(r"\d+(\.\d+)+", said)
            assert number is not None, said
            yield f"{name} {number[0]}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return names[0] if names else platform.machine()
