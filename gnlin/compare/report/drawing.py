"""Panels, styles, lines and labels of figures."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.ticker import NullLocator

from gnlin.compare.report.axes import plain, within
from gnlin.compare.report.lines import Line
from gnlin.compare.report.wording import breakable

Style = Mapping[str, Any]

MOST_LINES = 16  # more cannot be told apart without colour
# Okabe and Ito's palette, which colour-blind readers can tell apart. Grey replaces its yellow,
# which is too pale for a line on white.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#777777")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.2, 1.2, 1.2)))
_MARKERS = "os^Dv*PX<>pd"  # then the first of them again, hollow
_LABEL_SIZE = 7.0  # points
_LINE_HEIGHT = 1.25 * _LABEL_SIZE
_LABEL_LENGTH = 24  # characters
_WIDTH = 5.6  # inches


class End(NamedTuple):
    """The right end of a line, beside which its name stands."""

    label: str
    x: float
    y: float
    style: Style


def style(number: int) -> dict[str, Any]:
    """Colour, dashes and marker; the marker alone tells `MOST_LINES` lines apart."""
    number, colour = number % MOST_LINES, _COLOURS[number % len(_COLOURS)]
    return {
        "color": colour,
        "linestyle": _DASHES[(number + number // len(_COLOURS)) % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markerfacecolor": colour if number < len(_MARKERS) else "white",
        "linewidth": 1.3,
        "markersize": 4,
    }


def panels(
    count: int, labels: Sequence[str], title: str, least: float = 2.5
) -> tuple[Figure, list[Axes]]:
    """A figure of panels one above the other, with room on the right for `labels`.

    Args:
        count: number of panels.
        labels: names of the lines.
        title: of the figure.
        least: least height of one of several panels, in inches.
    """
    lines = [line for label in labels for line in _wrapped(label).splitlines()] or [""]
    right = 0.5 + max(map(len, lines)) * 0.6 * _LABEL_SIZE / 72
    height = max(3.3 if count == 1 else least, len(lines) * _LINE_HEIGHT / 72 + 0.2)
    above, below, between = 0.4 if count == 1 else 0.55, 0.45, 0.35
    total = count * height + (count - 1) * between + above + below
    figure = Figure(figsize=(_WIDTH, total))
    figure.subplots_adjust(
        0.7 / _WIDTH, below / total, 1 - right / _WIDTH, 1 - above / total, hspace=between / height
    )
    figure.text(0.01, 1 - 0.25 / total, plain(title), fontsize=9, fontweight="bold")
    found = list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
    for axes in found:
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, found


def option_axis(axes: Axes, lines: Sequence[Line], option: str) -> list[list[float]]:
    """The horizontal axis of an option, once the vertical one has its limits.

    Returns:
        The places of the points of each line.
    """
    values = sorted({point.value for line in lines for point in line.points})
    finite = [value for value in values if value < math.inf]
    never = 8 * max(finite, default=1.0)
    axes.set_xscale("log" if values[0] > 0 else "linear")
    if len(values) < 10:
        names = ["never" if value == math.inf else f"{value:g}" for value in values]
        axes.set_xticks([min(value, never) for value in values], names)
        axes.xaxis.set_minor_locator(NullLocator())
    # Lines that share their values stand a little apart.
    apart = 1.05 if option != "damping" and values[0] > 0 else 1.0
    places = []
    for number, line in enumerate(lines):
        nudge = apart ** (number - (len(lines) - 1) / 2)
        places.append([nudge * min(point.value, never) for point in line.points])
    if values[-1] == math.inf:
        _break(axes, math.sqrt(finite[-1] * never))
    return places


def plot_means(
    axes: Axes, line: Line, places: Sequence[float], name: str, look: Style
) -> tuple[float, float]:
    """The means along a line, dotted on the way to never.

    Returns:
        The point furthest to the right.
    """
    known = [
        (place, point)
        for place, point in zip(places, line.points, strict=True)
        if point.finals(name)
    ]
    if not known:
        return places[-1], math.nan
    across = [place for place, _ in known]
    means = within(axes, [float(np.mean(point.finals(name))) for _, point in known])
    cut = sum(point.value < math.inf for _, point in known)
    for part in (slice(cut), slice(cut, None)):
        axes.plot(across[part], means[part], **look)
    if 0 < cut < len(known):
        dotted = {**look, "linestyle": (0, (1, 3)), "marker": ""}
        axes.plot(across[cut - 1 :], means[cut - 1 :], **dotted)
    return max(zip(across, means, strict=True))


def plot_runs(axes: Axes, line: Line, places: Sequence[float], name: str, colour: str) -> None:
    """Each run as a dot, with bars of one deviation.

    A cross at the worse edge says that some runs did not finish.
    """
    is_log = axes.get_yscale() == "log"
    for place, point in zip(places, line.points, strict=True):
        values = np.asarray(point.finals(name))
        if len(values) > 1:
            mean, deviation = values.mean(), values.std(ddof=1)
            # On a logarithmic axis a bar that reaches zero has no end.
            least = max(mean - deviation, values.min()) if is_log else mean - deviation
            bar = within(axes, [least, mean + deviation])
            axes.plot([place] * 2, bar, "_-", color=colour, linewidth=0.8)
            dots = [place] * len(values), within(axes, values)
            axes.plot(*dots, ".", color=colour, markersize=3.5, alpha=0.8)
        if len(values) < len(point.records):
            edge = {"transform": axes.get_xaxis_transform(), "clip_on": False, "markersize": 5}
            axes.plot(place, 1.0 if is_log else 0.0, "x", color=colour, **edge)


def name_periods(axes: Axes, line: Line, name: str) -> None:
    """K beside each point of a line that stands on the axis of λ."""
    means = []
    for point in line.points:
        if values := point.finals(name):
            means.append((point, *within(axes, [float(np.mean(values))])))
    for point, mean in means:
        # Below, where a point of about the same λ stands above.
        below = any(other > mean and 0.8 < near.value / point.value < 1.25 for near, other in means)
        axes.annotate(
            f"K={point.records[0]['options']['period']}",
            (point.value, mean),
            xytext=(0, -10 if below else 5),
            textcoords="offset points",
            ha="center",
            fontsize=6,
            color="#333333",
        )


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Each line's name beside its end, with a sample of the line.

    Names are moved up or down where others need the room.
    """
    placed = []
    for end in ends:
        y = float(within(axes, [end.y])[0])
        placed.append(end._replace(label=_wrapped(end.label), y=y))
    placed.sort(key=lambda end: end.y)
    # An inch in parts of the axes.
    inch = axes.figure.dpi / axes.bbox.width, axes.figure.dpi / axes.bbox.height
    lines = np.array([end.label.count("\n") + 1 for end in placed])
    to_axes = axes.transScale + axes.transLimits
    wanted = np.array([to_axes.transform((end.x, end.y))[1] for end in placed])
    places = spread_out(wanted, lines * _LINE_HEIGHT * inch[1] / 72)
    leader = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}
    outside: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
    text: dict[str, Any] = {"va": "center", "fontsize": _LABEL_SIZE, "linespacing": 1.0}
    for end, place in zip(placed, places, strict=True):
        start = (1 + 0.06 * inch[0], place)
        axes.annotate("", (end.x, end.y), start, textcoords="axes fraction", arrowprops=leader)
        sample = 1 + np.array([0.07, 0.19, 0.31]) * inch[0], [place] * 3
        axes.plot(*sample, markevery=[1], **outside, **end.style)
        axes.text(1 + 0.37 * inch[0], place, plain(end.label), **text, **outside)


def spread_out(wanted: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The places in [0, 1] nearest to `wanted` at which things of these sizes do not overlap.

    This is isotonic regression: less the distances that must lie between them, the places ascend.
    Pooling neighbours that do not ascend gives the least squares.

    Args:
        wanted: places in ascending order.
        sizes: the sizes, in the same order.
    """
    between = np.concatenate([[0], np.cumsum((sizes[1:] + sizes[:-1]) / 2)])
    pools: list[list[float]] = []
    for value in wanted - between:
        pools.append([value])
        while len(pools) > 1 and np.mean(pools[-2]) >= np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    free = np.concatenate([np.full(len(pool), np.mean(pool)) for pool in pools])
    lowest = sizes[0] / 2
    return np.clip(free, lowest, max(lowest, 1 - sizes[-1] / 2 - between[-1])) + between


def _wrapped(label: str) -> str:
    """A label in lines of a bounded length."""
    label = breakable(label, _LABEL_LENGTH)
    return textwrap.fill(label, _LABEL_LENGTH, break_on_hyphens=False)


def _break(axes: Axes, place: float) -> None:
    """Two strokes through the horizontal axis."""
    strokes = Path([(-1, -1), (-0.2, 1), (0.2, -1), (1, 1)], [Path.MOVETO, Path.LINETO] * 2)
    look: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 5}
    axes.plot(place, 0, "s", color="white", markersize=4, **look)
    marker = {"marker": strokes, "markersize": 7, "markeredgewidth": 0.8, "fillstyle": "none"}
    axes.plot(place, 0, color="black", **marker, **look)
