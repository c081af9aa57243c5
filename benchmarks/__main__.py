"""The measures, side by side: `python -m benchmarks [tutorial | postgres]`.

tutorial    P1: what a promise costs a request, against the tutorial's bare route (the default)
postgres    P10: the queue on PostgreSQL, against the one on SQLite and against other queues there
"""

import argparse

from benchmarks.postgres import main as postgres
from benchmarks.tutorial import main as tutorial


def main() -> None:
    """Run one of the measures."""
    measures = {"tutorial": tutorial, "postgres": postgres}
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("measure", nargs="?", choices=measures, default="tutorial")
    measures[parser.parse_args().measure]()


if __name__ == "__main__":
    main()
