"""Charts, drawn by matplotlib without a display: axes to draw on, curves, a file of them."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

import numpy as np

from util.labels import COLOURS
from util.outputs import write_bytes

DPI = 100
GRID = "#e1e1e1"
CYCLE = tuple(f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in COLOURS)
DASHES = ("-", "--", ":", "-.")  # of the first seven series, of the next seven …
LEGEND_CHARACTERS = 45  # in a line of the legend


def new_axes(heights: list[int], width: int = 860):
    """Empty axes with a grid, below one another on one figure, so many pixels high and wide."""
    from matplotlib.figure import Figure

    figure = Figure((width / DPI, sum(heights) / DPI), DPI, layout="constrained")
    column = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    for axes in column:
        axes.set_axisbelow(True)
        axes.grid(color=GRID)
        axes.spines[["top", "right"]].set_visible(False)
    return column


def new_chart(title: str, x_label: str, y_label: str, height: int = 460, width: int = 860):
    """Empty axes with titles, alone on their figure."""
    (axes,) = new_axes([height], width)
    axes.set_title(title, loc="left")
    axes.set(xlabel=x_label, ylabel=y_label)
    return axes


def draw_lines(axes, series: dict[str, tuple[list, list]]) -> None:
    """One line per series, `{name: (xs, ys)}`, with a marker on every point. A value that is not
    finite is a gap; one or two points are not joined, since they show no trend.
    """
    for index, (name, (xs, ys)) in enumerate(series.items()):
        again, colour = divmod(index, len(CYCLE))
        finite = np.isfinite(np.asarray(ys, dtype=float))
        axes.plot(
            xs,
            np.where(finite, ys, np.nan),
            color=CYCLE[colour],
            linestyle=DASHES[again % len(DASHES)] if finite.sum() > 2 else "none",
            marker="o",
            markersize=3,
            label=name,
        )
    if all(float(x).is_integer() for xs, _ in series.values() for x in xs):  # epochs
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def line_chart(series: dict[str, tuple[list, list]], title: str, x_label: str, y_label: str):
    """See draw_lines."""
    axes = new_chart(title, x_label, y_label)
    draw_lines(axes, series)
    return axes.figure


def save_chart(path: Path, figure) -> None:
    """Write a chart as PNG, with the legend of its first axes below it."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    if names:
        names = [textwrap.fill(name, LEGEND_CHARACTERS) for name in names]
        figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight")
    write_bytes(path, picture.getvalue())
