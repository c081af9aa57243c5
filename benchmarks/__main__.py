"""Run the measures and compare with rivals: `python -m benchmarks [P1 P4 …] [--quick]`.

Without names, all measures run in turn. Each line of the table is printed at once. `--write` writes
the table and the charts into docs/performance.md.
"""

import argparse
import importlib
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from benchmarks import report
from benchmarks.harness import Result, Series

Measure = Callable[[bool], Iterator[Result | Series]]


def main() -> None:
    """Run the measures. If a measure fails, the others still run, and the exit code is 1."""
    modules = find_modules()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=", ".join(modules))
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and fewer tasks")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md")
    asked = parser.parse_args()
    if unknown := [name for name in asked.measures if name not in modules]:
        parser.error(f"no such measure: {', '.join(unknown)}")
    if asked.quick and asked.write:
        parser.error("--write needs a full run: leave --quick out")
    allow_many_connections()
    lines: list[str] = []
    series: list[Series] = []
    failed: list[str] = []
    print(report.HEAD, flush=True)
    for name in asked.measures or modules:
        try:
            for found in load(modules[name])(asked.quick):
                if isinstance(found, Series):
                    series.append(found)
                else:
                    lines.append(report.line(found))
                    print(lines[-1], flush=True)
        except Exception:  # noqa: BLE001 -- a failed measure must not waste the hour of the others
            failed.append(name)
            traceback.print_exc()
    print(f"\n{report.machine()}")
    if asked.write:
        report.write(lines, series)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def find_modules() -> dict[str, str]:
    """Return the module of each measure by its name: P1b is in p1b_….py."""
    stems = [path.stem for path in Path(__file__).parent.glob("p[0-9]*_*.py")]
    names = {stem.partition("_")[0].replace("p", "P", 1): stem for stem in stems}
    return dict(sorted(names.items(), key=lambda item: report.sort_key(item[0])))


def load(module: str) -> Measure:
    """Import the module of a measure, and return its `measure` function."""
    return cast(Measure, importlib.import_module(f"benchmarks.{module}").measure)


def allow_many_connections() -> None:
    """Raise the limit of open files for all child processes, as the service does for itself."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    main()
