"""Charts as SVG, drawn on the server by pure functions."""

from collections.abc import Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 240, 56  # of the drawing; the style sheet stretches it to the width of its card
GAP = 1  # between two bars


def bars(values: Sequence[int], *, title: str, status: str = "") -> Markup:
    """Return a bar chart of one value for each minute, the present minute last.

    `title` names the chart for screen readers, which read a summary instead of the bars. `status`
    is the class of the chart: a status of tasks, whose colour the bars get.

    With 60 values each bar has 4 units of the width, of which the bar itself takes 3. The highest
    bar has the whole height, which a line marks. A value above 0 is at least one unit high, so that
    a single failure is seen beside a minute with 1,000.
    """
    step = WIDTH / max(1, len(values))
    highest = max(values, default=0)
    drawn = "".join(
        f"M{position * step:g} {HEIGHT}v-{_height(value, highest):g}h{step - GAP:g}V{HEIGHT}z"
        for position, value in enumerate(values)
        if value > 0
    )
    top = Markup('<line class="top" x1="0" y1="0" x2="{}" y2="0"/>').format(WIDTH)
    return Markup(
        '<svg class="chart {status}" role="img" viewBox="0 0 {width} {height}" '
        'preserveAspectRatio="none"><title>{title}</title><desc>{summary}</desc>{top}'
        '<line x1="0" y1="{height}" x2="{width}" y2="{height}"/><path d="{drawn}"/></svg>'
    ).format(
        status=status,
        width=WIDTH,
        height=HEIGHT,
        title=title,
        summary=summary(values),
        top=top if highest else "",
        drawn=drawn,
    )


def _height(value: int, highest: int) -> float:
    return max(1.0, round(value / highest * HEIGHT, 1))


def summary(values: Sequence[int]) -> str:
    """Return a chart in words: "12 now, at most 40 a minute, 300 in the last 60 minutes"."""
    if not values:
        return "No values."
    return (
        f"{values[-1]:,} now, at most {max(values):,} a minute, "
        f"{sum(values):,} in the last {len(values)} minutes"
    )
