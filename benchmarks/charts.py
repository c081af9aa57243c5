"""Draw charts: `python -m benchmarks.charts DIRECTORY`, with the series as JSON on standard input.

It runs in the peers' virtual environment, which has matplotlib. The same figures give the same
bytes.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl  # type: ignore[import-not-found]
from matplotlib.figure import Figure  # type: ignore[import-not-found]

FEW = 10  # up to this many x values, each gets a marker and a tick

mpl.rcParams |= {
    "svg.fonttype": "none",  # write text as text, not as outlines
    "svg.hashsalt": "afterward",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def main() -> None:
    """Draw the series on standard input, and write a file for each chart."""
    charts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for series in json.load(sys.stdin):
        charts[series["chart"]].append(series)
    for title, lines in charts.items():
        draw(title, lines, Path(sys.argv[1]) / f"{file_name(title)}.svg")


def file_name(title: str) -> str:
    """Convert a title to a file name: `Time of a claim` becomes `time-of-a-claim`."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def draw(title: str, lines: list[dict[str, Any]], path: Path) -> None:
    """Draw a chart. The y axis begins at 0, so that small differences look small."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    places = sorted({x for line in lines for x in line["x"]})
    marker = "." if len(places) <= FEW else ""
    for line in lines:
        axes.plot(line["x"], line["y"], label=line["name"], marker=marker, clip_on=False)
    axes.set(title=title, xlabel=lines[0]["x_label"], ylabel=lines[0]["y_label"])
    heights = [y for line in lines for y in line["y"]]
    axes.set_ylim(min(0, *heights), 1.1 * max(heights))
    if len(places) <= FEW:
        # The x values are 0 and powers of ten, so a symlog scale spaces them evenly.
        axes.set_xscale("symlog", linthresh=min(x for x in places if x > 0))
        axes.set_xticks(places, minor=False)
        axes.set_xticks([], minor=True)
    axes.set_xlim(places[0], places[-1])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda number, _: f"{number:,.10g}")
    if len(lines) > 1:
        axes.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
