"""Rows to figures: curves, sweeps of an option, and the trials that each row was tuned with."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gnlin.compare.report.axes import metric_axis, value_axis, within, work_axis
from gnlin.compare.report.bands import Band, band
from gnlin.compare.report.drawing import (
    MOST_LINES,
    End,
    Style,
    label_ends,
    name_periods,
    option_axis,
    panels,
    plot_means,
    plot_runs,
    style,
)
from gnlin.compare.report.lines import (
    Line,
    as_damping,
    damping_lines,
    moving_metrics,
    sweeps,
    swept,
    thinned,
    tuning_line,
)
from gnlin.compare.report.summary import Row
from gnlin.compare.report.wording import words
from gnlin.compare.runs.records import TaskFacts
from gnlin.compare.runs.tuning import final, finished, tuned

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.usetex": False,
}
_CURVES = (
    ("step", "loss"),
    ("cost", "loss"),
    ("seconds", "loss"),
    ("cost", "quality"),
    ("seconds", "quality"),
)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure and the facts that its caption depends on.

    Attributes:
        name: stem of its files, less the task.
        kind: curve, sweep, state or sensitivity.
        title: the vertical against the horizontal axis.
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


# Curves.


class _Curve(NamedTuple):
    """The band of a row, and the number of the row among those that are drawn."""

    label: str
    number: int
    band: Band


def _curves(rows: Sequence[Row], facts: TaskFacts) -> Iterable[Picture]:
    drawn = thinned(rows, facts.target, MOST_LINES)
    for against, name in _CURVES:
        worst = -math.inf if name == "quality" and facts.higher_is_better else math.inf
        points = 150 if name == "loss" else 50  # small sets of held-out data make restless curves
        curves = []
        for number, row in enumerate(drawn):
            if (found := band(row.records, against, name, worst, points)) is not None:
                curves.append(_Curve(row.label, number, found))
        if not curves:
            continue
        quality = f"held-out {facts.quality_name.partition(',')[0]}"
        measure = "training loss" if name == "loss" else quality
        title = f"{facts.name}: {measure} against {words(against)}"
        figure, (axes,) = panels(1, [curve.label for curve in curves], title)
        medians = [value for curve in curves for value in curve.band.median]
        value_axis(axes, name, facts, medians, rows)
        work_axis(axes, words(against), [curve.band.across for curve in curves])
        label_ends(axes, [_plot_band(axes, curve) for curve in curves])
        left_out = {row.label for row in rows} - {curve.label for curve in curves}
        yield Picture(f"{name}-{against}", "curve", title, figure, against, tuple(sorted(left_out)))


def _plot_band(axes: Axes, curve: _Curve) -> End:
    """The median as a line, and the range as a shade."""
    across, look = curve.band.across, style(curve.number)
    low, median, high = (
        within(axes, values) for values in (curve.band.low, curve.band.median, curve.band.high)
    )
    # In parts of the axes, and never two lines at the same place; a run of one step has one place.
    every = (0.02 * (curve.number % 8), 0.16) if len(median) > 1 else None
    axes.plot(across, median, markevery=every, **look)
    axes.fill_between(across, low, high, color=look["color"], alpha=0.1, linewidth=0)
    return End(curve.label, across[-1], median[-1], look)


# Sweeps.


def _sweeps(rows: Sequence[Row], facts: TaskFacts) -> Iterable[Picture]:
    """K, λ and every other option that has enough values."""
    periods, dampings = sweeps(rows, "period"), damping_lines(rows)
    yield from _periods_and_dampings(periods, dampings, rows, facts)
    shown = {"period": periods, "damping": dampings}
    for option in swept(rows):
        lines = [line for line in sweeps(rows, option) if line not in shown.get(option, ())]
        if lines:
            # A damping that is not constant has a figure of its own.
            name = "damping-first-or-last" if option == "damping" else option
            title = f"{facts.name}: {words(name)}"
            styles = {line.label: style(number) for number, line in enumerate(lines)}
            sweep = _Sweep(lines, styles, lines, option, title)
            yield Picture(name, "sweep", title, _draw_sweep(sweep, rows, facts), option)


def _periods_and_dampings(
    periods: Sequence[Line], dampings: Sequence[Line], rows: Sequence[Row], facts: TaskFacts
) -> Iterable[Picture]:
    """The two figures stand side by side: they share vertical axes and styles."""
    both = [*periods, *dampings]
    styles = {line.label: style(number) for number, line in enumerate(both)}
    mapped, unmapped = [], []
    for line in periods:
        image = as_damping(line)
        if image is None:
            unmapped.append(line.label)
        else:
            label = f"{line.label}, λ = 1/(ηK)"
            styles[label] = styles[line.label]
            mapped.append(dataclasses.replace(image, label=label))
    if periods:
        title = f"{facts.name}: period of the anchor"
        figure = _draw_sweep(_Sweep(periods, styles, both, "period", title), rows, facts)
        yield Picture("period", "sweep", title, figure, "period")
    if dampings:
        title = f"{facts.name}: damping"
        sweep = _Sweep([*dampings, *mapped], styles, both, "damping", title)
        figure = _draw_sweep(sweep, rows, facts)
        is_mapped, not_mapped = bool(mapped), tuple(unmapped)
        yield Picture("damping", "sweep", title, figure, "damping", (), is_mapped, not_mapped)


class _Sweep(NamedTuple):
    """A figure along an option.

    Attributes:
        lines: the lines that are drawn.
        styles: label ↦ style.
        scale: the lines that the vertical axes have room for.
        option: the horizontal axis.
        title: of the figure.
    """

    lines: Sequence[Line]
    styles: Mapping[str, Style]
    scale: Sequence[Line]
    option: str
    title: str


def _draw_sweep(sweep: _Sweep, rows: Sequence[Row], facts: TaskFacts) -> Figure:
    """Final quality above final loss."""
    labels = [line.label for line in sweep.lines]
    figure, (above, below) = panels(2, labels, sweep.title)
    value_axis(above, "quality", facts, _finals(sweep.scale, "quality", "network_quality"), rows)
    ends = []
    for line, places in zip(
        sweep.lines, option_axis(above, sweep.lines, sweep.option), strict=True
    ):
        _plot_network(above, line, places, sweep.styles[line.label])
        ends.append(_plot_line(above, sweep, line, places, "quality"))
    label_ends(above, ends)
    value_axis(below, "loss", facts, _finals(sweep.scale, "loss"), rows)
    all_places = option_axis(below, sweep.lines, sweep.option)
    ends = [
        _plot_line(below, sweep, line, places, "loss")
        for line, places in zip(sweep.lines, all_places, strict=True)
    ]
    label_ends(below, ends)
    below.set_xlabel(words(sweep.option))
    _legend(above)
    return figure


def _finals(lines: Sequence[Line], *names: str) -> list[float]:
    """The last values of all runs."""
    points = [point for line in lines for point in line.points]
    return [value for point in points for name in names for value in point.finals(name)]


def _plot_network(axes: Axes, line: Line, places: Sequence[float], look: Style) -> None:
    """The quality of the network, lightly, where it is not that of the model being trained."""
    if any(point.finals("network_quality") != point.finals("quality") for point in line.points):
        light = {"linewidth": 0.6, "markerfacecolor": "white", "alpha": 0.6}
        plot_means(axes, line, places, "network_quality", {**look, **light})


def _plot_line(axes: Axes, sweep: _Sweep, line: Line, places: Sequence[float], name: str) -> End:
    look = sweep.styles[line.label]
    end = plot_means(axes, line, places, name, look)
    plot_runs(axes, line, places, name, look["color"])
    if line not in sweep.scale:  # it is along K, and stands here at λ
        name_periods(axes, line, name)
    return End(line.label, *end, look)


def _legend(axes: Axes) -> None:
    """The marks of a sweep, above the axes."""
    look = {"color": "black", "markersize": 4}
    keys = {
        "model being trained": Line2D([], [], marker="o", linewidth=1.4, **look),
        "network": Line2D([], [], marker="o", linewidth=0.6, markerfacecolor="white", **look),
        "one run": Line2D([], [], marker=".", linestyle="", **look),
        "diverged or failed": Line2D([], [], marker="x", linestyle="", **look),
    }
    axes.legend(
        list(keys.values()),
        list(keys),
        loc="lower left",
        bbox_to_anchor=(-0.03, 0.98),
        ncols=4,
        frameon=False,
        fontsize=6.5,
        columnspacing=1.2,
        handletextpad=0.4,
    )


# States and trials.


def _states(rows: Sequence[Row], facts: TaskFacts) -> Iterable[Picture]:
    """The metrics of the last state along an option, a panel for each."""
    for option in swept(rows):
        lines = sweeps(rows, option)
        names = moving_metrics(lines)
        if not names:
            continue
        title = f"{facts.name}: state of the optimiser at the end"
        figure, found = panels(len(names), [line.label for line in lines], title, least=1.5)
        for axes, name in zip(found, names, strict=True):
            metric_axis(axes, name, _finals(lines, name))
            ends = []
            all_places = option_axis(axes, lines, option)
            for number, (line, places) in enumerate(zip(lines, all_places, strict=True)):
                look = style(number)
                end = End(line.label, *plot_means(axes, line, places, name, look), look)
                plot_runs(axes, line, places, name, look["color"])
                if math.isfinite(end.y):
                    ends.append(end)
            label_ends(axes, ends)
        found[-1].set_xlabel(words(option))
        yield Picture(f"{option}-state", "state", title, figure, option)


def _sensitivity(rows: Sequence[Row], facts: TaskFacts) -> Iterable[Picture]:
    """The loss of the trials along the tuned number, a figure for each name of it."""
    drawn = thinned(rows, facts.target, MOST_LINES)
    able = [(number, row) for number, row in enumerate(drawn) if sum(map(finished, row.trials)) > 1]
    for name in dict.fromkeys(tuned(row.trials[0])[0] for _, row in able):
        own = [(number, row) for number, row in able if name in row.setting]
        title = f"{facts.name}: training loss against {words(name)}"
        figure, (axes,) = panels(1, [row.label for _, row in own], title)
        lines = [tuning_line(row) for _, row in own]
        value_axis(axes, "loss", facts, _finals(lines, "loss"), rows)
        positive = all(point.value > 0 for line in lines for point in line.points)
        axes.set(xscale="log" if positive else "linear", xlabel=words(name))
        ends = []
        for (number, row), line in zip(own, lines, strict=True):
            look = style(number)
            places = [point.value for point in line.points]
            ends.append(End(row.label, *plot_means(axes, line, places, "loss", look), look))
            plot_runs(axes, line, places, "loss", look["color"])
            _ring(axes, row, name, look["color"])
        label_ends(axes, ends)
        shown = [row for _, row in own]
        left_out = tuple(row.label for row in rows if name in row.setting and row not in shown)
        yield Picture(f"sensitivity-{name}", "sensitivity", title, figure, name, left_out)


def _ring(axes: Axes, row: Row, name: str, colour: str) -> None:
    """A ring around the value that was chosen."""
    chosen = [final(trial, "loss") for trial in row.trials if trial["setting"] == row.setting]
    height = within(axes, chosen)[0]
    axes.plot(row.setting[name], height, "o", color=colour, mfc="none", markersize=9)
