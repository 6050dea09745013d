"""Rows to figures: curves, sweeps of an option, and the trials that each row was tuned with."""

import dataclasses
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.ticker import NullLocator

from gnlin.compare.report.axes import metric_axis, plain, value_axis, within
from gnlin.compare.report.summary import (
    Line,
    Row,
    TaskFacts,
    as_damping,
    band,
    damping_lines,
    final,
    finished,
    moving_metrics,
    sweeps,
    swept,
    thinned,
    tuned,
    tuning_line,
)

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.usetex": False,
}
MOST_LINES = 16  # more cannot be told apart without colour
# Okabe and Ito's palette, which colour-blind readers can tell apart; grey for its yellow, too pale
# for a line on white.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#777777")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.2, 1.2, 1.2)))
_MARKERS = "os^Dv*PX<>pd"  # then the first of them again, hollow
_NAMES = {
    "step": "steps",
    "cost": "gradient-equivalents",
    "seconds": "seconds of training steps",
    "damping": "damping λ",
    "damping-first-or-last": "first or last damping λ",
    "period": "K, the steps for which an anchor is kept",
}
_CURVES = (
    ("step", "loss"),
    ("cost", "loss"),
    ("seconds", "loss"),
    ("cost", "quality"),
    ("seconds", "quality"),
)
_LABEL_SIZE = 7.0  # points
_LINE_HEIGHT = 1.25 * _LABEL_SIZE
_WIDTH = 5.6  # inches


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure and what its caption depends on.

    Attributes:
        name: stem of its files, less the task.
        kind: curve, sweep, state or sensitivity.
        title: what is drawn against what.
        against: the horizontal axis: a part of the curve, an option, or the tuned number.
        left_out: labels of rows that are not drawn.
        mapped: whether points along K stand on the axis of λ as well.
        unmapped: labels of lines along K that have no place on it.
    """

    name: str
    kind: str
    title: str
    figure: Figure
    against: str
    left_out: tuple[str, ...] = ()
    mapped: bool = False
    unmapped: tuple[str, ...] = ()


def pictures(rows: Sequence[Row], facts: TaskFacts) -> list[Picture]:
    """All figures of one task, from its rows."""
    if not rows:
        return []
    with matplotlib.rc_context(_STYLE):
        return [
            *_curves(rows, facts),
            *_sweeps(rows, facts),
            *_states(rows, facts),
            *_sensitivity(rows, facts),
        ]


# Four kinds of figures.


def _curves(rows: Sequence[Row], facts: TaskFacts) -> Iterable[Picture]:
    drawn = thinned(rows, facts.target, MOST_LINES)
    for against, name in _CURVES:
        worst = -math.inf if name == "quality" and facts.higher_is_better else math.inf
        what = (
            "training loss"
            if name == "loss"
            else f"held-out {facts.quality_name.partition(',')[0]}"
        )
        points = 150 if name == "loss" else 50  # small sets of held-out data make restless curves
        bands = [
            (row, found)
            for row in drawn
            if (found := band(row.records, against, name, worst, points))
        ]
        if not bands:
            continue
        title = f"{facts.name}: {what} against {_NAMES[against]}"
        figure, (axes,) = _panels(1, [row.label for row, _ in bands], title)
        value_axis(axes, name, facts, [value for _, found in bands for value in found.median], rows)
        axes.set(xscale="log", xlabel=_NAMES[against])
        axes.tick_params(
            axis="x", which="minor", labelsize=5.5
        )  # named where there is hardly a decade
        ends = []
        for row, found in bands:
            style = _style(number := drawn.index(row))
            low, median, high = (
                within(axes, values) for values in (found.low, found.median, found.high)
            )
            # In parts of the axes, and never two lines at the same place; a run of one step has one
            # place.
            every = (0.02 * (number % 8), 0.16) if len(median) > 1 else None
            axes.plot(found.across, median, markevery=every, **style)
            axes.fill_between(found.across, low, high, color=style["color"], alpha=0.1, linewidth=0)
            ends.append((row.label, found.across[-1], median[-1], style))
        _label_ends(axes, ends)
        left_out = {row.label for row in rows} - {row.label for row, _ in bands}
        yield Picture(f"{name}-{against}", "curve", title, figure, against, tuple(sorted(left_out)))


def _sweeps(rows: Sequence[Row], facts: TaskFacts) -> Iterable[Picture]:
    periods, dampings = sweeps(rows, "period"), damping_lines(rows)
    on_damping = [as_damping(line) for line in periods]
    mapped = [
        dataclasses.replace(line, label=f"{line.label}, λ = 1/(ηK)") for line in on_damping if line
    ]
    unmapped = tuple(
        line.label for line, image in zip(periods, on_damping, strict=True) if image is None
    )
    # The two figures stand side by side: they share vertical axes and styles.
    both = [*periods, *dampings]
    styles = {line.label: _style(number) for number, line in enumerate(both)}
    styles |= {f"{line.label}, λ = 1/(ηK)": styles[line.label] for line in periods}
    if periods:
        title = f"{facts.name}: period of the anchor"
        yield Picture(
            "period",
            "sweep",
            title,
            _sweep(periods, styles, both, facts, rows, "period", title),
            "period",
        )
    if dampings:
        title = f"{facts.name}: damping"
        figure = _sweep([*dampings, *mapped], styles, both, facts, rows, "damping", title)
        yield Picture(
            "damping", "sweep", title, figure, "damping", mapped=bool(mapped), unmapped=unmapped
        )
    for option in swept(rows):
        above = {"period": periods, "damping": dampings}.get(option, ())
        if lines := [line for line in sweeps(rows, option) if line not in above]:
            # A damping that is not constant has a figure of its own.
            name = "damping-first-or-last" if option == "damping" else option
            title, looks = (
                f"{facts.name}: {words(name)}",
                {line.label: _style(n) for n, line in enumerate(lines)},
            )
            yield Picture(
                name,
                "sweep",
                title,
                _sweep(lines, looks, lines, facts, rows, option, title),
                option,
            )


def _sweep(
    lines: Sequence[Line],
    styles: Mapping[str, Mapping[str, Any]],
    scale: Sequence[Line],
    facts: TaskFacts,
    rows: Sequence[Row],
    option: str,
    title: str,
) -> Figure:
    """Final quality above final loss; the vertical axes have room for all of `scale`."""
    figure, panels = _panels(2, [line.label for line in lines], title)
    for axes, names in zip(panels, (("network_quality", "quality"), ("loss",)), strict=True):
        finals = [
            value
            for line in scale
            for point in line.points
            for name in names
            for value in point.finals(name)
        ]
        value_axis(axes, names[-1], facts, finals, rows)
        ends = []
        for line, places in zip(lines, _along(axes, lines, option), strict=True):
            if names[0] != names[-1] and any(
                p.finals(names[0]) != p.finals(names[-1]) for p in line.points
            ):
                look = {"linewidth": 0.6, "markerfacecolor": "white", "alpha": 0.6}
                _plot_means(axes, line, places, names[0], {**styles[line.label], **look})
            end = _plot_means(axes, line, places, names[-1], styles[line.label])
            ends.append((line.label, *end, styles[line.label]))
            _plot_runs(axes, line, places, names[-1], styles[line.label]["color"])
            if line not in scale:
                _name_periods(axes, line, names[-1])
        _label_ends(axes, ends)
    panels[-1].set_xlabel(words(option))
    look = {"color": "black", "markersize": 4}
    keys = {
        "model being trained": Line2D([], [], marker="o", linewidth=1.4, **look),
        "network": Line2D([], [], marker="o", linewidth=0.6, markerfacecolor="white", **look),
        "one run": Line2D([], [], marker=".", linestyle="", **look),
        "diverged or failed": Line2D([], [], marker="x", linestyle="", **look),
    }
    looks = {"frameon": False, "fontsize": 6.5, "columnspacing": 1.2, "handletextpad": 0.4}
    panels[0].legend(
        list(keys.values()),
        list(keys),
        loc="lower left",
        bbox_to_anchor=(-0.03, 0.98),
        ncols=4,
        **looks,
    )
    return figure


def _states(rows: Sequence[Row], facts: TaskFacts) -> Iterable[Picture]:
    """What the optimiser's last state says along an option, a panel for each metric."""
    for option in swept(rows):
        lines = sweeps(rows, option)
        if not (names := moving_metrics(lines)):
            continue
        title = f"{facts.name}: state of the optimiser at the end"
        figure, panels = _panels(len(names), [line.label for line in lines], title, least=1.5)
        for axes, name in zip(panels, names, strict=True):
            metric_axis(
                axes,
                name,
                [value for line in lines for point in line.points for value in point.finals(name)],
            )
            ends = []
            for number, (line, places) in enumerate(
                zip(lines, _along(axes, lines, option), strict=True)
            ):
                style = _style(number)
                ends.append((line.label, *_plot_means(axes, line, places, name, style), style))
                _plot_runs(axes, line, places, name, style["color"])
            _label_ends(axes, [end for end in ends if math.isfinite(end[2])])
        panels[-1].set_xlabel(words(option))
        yield Picture(f"{option}-state", "state", title, figure, option)


def _sensitivity(rows: Sequence[Row], facts: TaskFacts) -> Iterable[Picture]:
    drawn = thinned(rows, facts.target, MOST_LINES)
    able = [row for row in drawn if sum(map(finished, row.trials)) > 1]
    for name in dict.fromkeys(tuned(row.trials[0])[0] for row in able):
        own = [row for row in able if name in row.setting]
        title = f"{facts.name}: training loss against {words(name)}"
        figure, (axes,) = _panels(1, [row.label for row in own], title)
        lines = [tuning_line(row) for row in own]
        finals = [
            value for line in lines for point in line.points for value in point.finals("loss")
        ]
        value_axis(axes, "loss", facts, finals, rows)
        positive = all(point.value > 0 for line in lines for point in line.points)
        axes.set(xscale="log" if positive else "linear", xlabel=words(name))
        ends = []
        for row, line in zip(own, lines, strict=True):
            style, places = _style(drawn.index(row)), [point.value for point in line.points]
            ends.append((row.label, *_plot_means(axes, line, places, "loss", style), style))
            _plot_runs(axes, line, places, "loss", style["color"])
            chosen = [
                final(trial, "loss") for trial in row.trials if trial["setting"] == row.setting
            ]
            axes.plot(
                row.setting[name],
                within(axes, chosen)[0],
                "o",
                color=style["color"],
                mfc="none",
                markersize=9,
            )
        _label_ends(axes, ends)
        left_out = tuple(row.label for row in rows if name in row.setting and row not in own)
        yield Picture(f"sensitivity-{name}", "sensitivity", title, figure, name, left_out)


# What they are drawn with.


def _style(number: int) -> dict[str, Any]:
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


def words(name: str) -> str:
    """What tables and axes call an option."""
    return _NAMES.get(name, name.replace("_", " "))


def breakable(label: str) -> str:
    """A long label with room for a break after each colon and comma."""
    return label if len(label) <= 24 else label.replace(":", ": ").replace(",", ", ")


def _wrapped(label: str) -> str:
    """Lines of 24 characters at most."""
    return textwrap.fill(breakable(label), 24, break_on_hyphens=False)


def _panels(
    count: int, labels: Sequence[str], title: str, least: float = 2.5
) -> tuple[Figure, list[Axes]]:
    """Panels one above the other, at least so many inches high, with room on the right for `labels`."""
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
    panels = list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
    for axes in panels:
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, panels


def _along(axes: Axes, lines: Sequence[Line], option: str) -> list[list[float]]:
    """The horizontal axis of an option, once the vertical one has its limits: where the points of each line stand."""
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
    nudges = [apart ** (number - (len(lines) - 1) / 2) for number in range(len(lines))]
    places = [
        [nudge * min(p.value, never) for p in line.points]
        for nudge, line in zip(nudges, lines, strict=True)
    ]
    if values[-1] == math.inf:
        _break(axes, math.sqrt(finite[-1] * never))
    return places


def _plot_means(
    axes: Axes, line: Line, places: Sequence[float], name: str, style: Mapping[str, Any]
) -> tuple[float, float]:
    """The means along a line, dotted on the way to never; the point furthest to the right."""
    known = [
        (place, point)
        for place, point in zip(places, line.points, strict=True)
        if point.finals(name)
    ]
    if not known:
        return places[-1], math.nan
    across = [place for place, _ in known]
    means = within(axes, [np.mean(point.finals(name)) for _, point in known])
    cut = sum(point.value < math.inf for _, point in known)
    for part in (slice(cut), slice(cut, None)):
        axes.plot(across[part], means[part], **style)
    if 0 < cut < len(known):
        axes.plot(
            across[cut - 1 :], means[cut - 1 :], **{**style, "linestyle": (0, (1, 3)), "marker": ""}
        )
    return max(zip(across, means, strict=True))


def _plot_runs(axes: Axes, line: Line, places: Sequence[float], name: str, colour: str) -> None:
    """Each run as a dot, with bars of one deviation; a cross at the worse edge where some did not finish."""
    bad_edge = {"transform": axes.get_xaxis_transform(), "clip_on": False, "markersize": 5}
    for place, point in zip(places, line.points, strict=True):
        values = np.asarray(point.finals(name))
        if len(values) > 1:
            mean, deviation = values.mean(), values.std(ddof=1)
            # On a logarithmic axis a bar that reaches zero has no end.
            least = (
                max(mean - deviation, values.min())
                if axes.get_yscale() == "log"
                else mean - deviation
            )
            axes.plot(
                [place] * 2,
                within(axes, [least, mean + deviation]),
                "_-",
                color=colour,
                linewidth=0.8,
            )
            axes.plot(
                [place] * len(values),
                within(axes, values),
                ".",
                color=colour,
                markersize=3.5,
                alpha=0.8,
            )
        if len(values) < len(point.records):
            axes.plot(
                place, 1.0 if axes.get_yscale() == "log" else 0.0, "x", color=colour, **bad_edge
            )


def _name_periods(axes: Axes, line: Line, name: str) -> None:
    """K beside each point of a line that stands on the axis of λ."""
    means = [
        (point, *within(axes, [np.mean(point.finals(name))]))
        for point in line.points
        if point.finals(name)
    ]
    for point, mean in means:
        # Below where a point of about the same λ stands above.
        below = any(other > mean and 0.8 < near.value / point.value < 1.25 for near, other in means)
        aside = {"xytext": (0, -10 if below else 5), "textcoords": "offset points", "ha": "center"}
        text = f"K={point.records[0]['options']['period']}"
        axes.annotate(text, (point.value, mean), **aside, fontsize=6, color="#333333")


def _break(axes: Axes, place: float) -> None:
    """Two strokes through the horizontal axis."""
    strokes = Path([(-1, -1), (-0.2, 1), (0.2, -1), (1, 1)], [Path.MOVETO, Path.LINETO] * 2)
    look: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 5}
    axes.plot(place, 0, "s", color="white", markersize=4, **look)
    axes.plot(
        place,
        0,
        marker=strokes,
        color="black",
        fillstyle="none",
        markersize=7,
        markeredgewidth=0.8,
        **look,
    )


def _label_ends(axes: Axes, ends: Sequence[tuple[str, float, float, Mapping[str, Any]]]) -> None:
    """Each line's name beside its end, with a sample of it, moved up or down as far as the others make it."""
    ends = [(_wrapped(label), x, float(within(axes, [y])[0]), style) for label, x, y, style in ends]
    ends = sorted(ends, key=lambda end: end[2])
    inch = (
        axes.figure.dpi / axes.bbox.width,
        axes.figure.dpi / axes.bbox.height,
    )  # in parts of the axes
    sizes = np.array([(label.count("\n") + 1) * _LINE_HEIGHT * inch[1] / 72 for label, *_ in ends])
    to_axes = axes.transScale + axes.transLimits
    places = spread_out(np.array([to_axes.transform((x, y))[1] for _, x, y, _ in ends]), sizes)
    leader = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}
    look: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
    for (label, x, y, style), place in zip(ends, places, strict=True):
        axes.annotate(
            "", (x, y), (1 + 0.06 * inch[0], place), textcoords="axes fraction", arrowprops=leader
        )
        axes.plot(
            1 + np.array([0.07, 0.19, 0.31]) * inch[0], [place] * 3, markevery=[1], **look, **style
        )
        axes.text(
            1 + 0.37 * inch[0],
            place,
            plain(label),
            va="center",
            fontsize=_LABEL_SIZE,
            linespacing=1.0,
            **look,
        )


def spread_out(wanted: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Places in [0, 1] nearest to `wanted` (ascending) at which things of these sizes do not
    overlap.

    Less what must lie between them, the places are to ascend: pooling neighbours that do not gives
    the least squares.
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
