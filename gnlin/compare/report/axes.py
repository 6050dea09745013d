"""Axes: their scales, limits and ticks."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter

from gnlin.compare.report.summary import Row
from gnlin.compare.runs.records import TaskFacts

# Percentages that are good ticks, the roundest first.
_ROUND = (
    100, 0, 90, 99, 50, 98, 95, 99.5, 80, 97, 70, 96, 60, 40, 20, 92, 85, 99.8, 98.5, 97.5,
)  # fmt: skip


def work_axis(axes: Axes, label: str, places: Sequence[np.ndarray]) -> None:
    """The horizontal axis of work, seconds or steps: logarithmic, from the first place to the last.

    Args:
        axes: the axes of the figure.
        label: name of the axis.
        places: the ascending places of each line, all above 0.
    """
    first, last = min(each[0] for each in places), max(each[-1] for each in places)
    margin = (last / first) ** 0.05 if last > first else 1.6
    axes.set(xscale="log", xlabel=label, xlim=(first / margin, last * margin))
    axes.tick_params(axis="x", which="minor", labelsize=5.5)  # with names within a decade


def value_axis(
    axes: Axes, name: str, facts: TaskFacts, values: Sequence[float], rows: Sequence[Row]
) -> None:
    """The vertical axis of ``loss`` or ``quality``, with a line at the target or at solved.

    A measure that should be low has a logarithmic axis. A percentage that reaches 90 has one that
    is logarithmic in the rest to 100. Values far worse than those at the start of training do not
    stretch the axis: they are drawn at its edge.
    """
    word, reference = ("target", facts.target) if name == "loss" else ("solved", facts.solved)
    known = np.asarray([reference, *filter(math.isfinite, values)])
    starts = _starts(name, rows)
    low_is_good = name == "loss" or not facts.higher_is_better
    if low_is_good:
        known = known[known <= 3 * max([abs(reference), *starts])]
    low, high = known.min(), known.max()
    if low_is_good and low >= 0 < high:
        _logarithmic(axes, known[known > 0].min(), high)
    elif not low_is_good and facts.quality_name.endswith("%") and 90 <= high <= 100:
        _percentages(axes, low, high)
    else:
        if not low_is_good:  # such as R², which has no least value
            low = max(low, reference - 6 * abs(reference - min(starts, default=reference - 1)))
        margin = 0.06 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)
    _reference(axes, word, reference)
    axes.set_ylabel(plain("training loss" if name == "loss" else f"held-out {facts.quality_name}"))


def metric_axis(axes: Axes, name: str, values: Sequence[float]) -> None:
    """The vertical axis of a metric, logarithmic for positive values that are far apart."""
    low, high = min(values), max(values)
    if 0 < 30 * low < high:
        _logarithmic(axes, low, high)
    else:
        margin = 0.06 * (high - low)
        axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel(plain(name))


def within(axes: Axes, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The values; those that are off the axis are moved to its edge."""
    return np.clip(np.nan_to_num(np.asarray(values, float), nan=math.inf), *axes.get_ylim())


def plain(text: str) -> str:
    """Text in which dollar signs do not begin mathematics."""
    return text.replace("$", r"\$")


def _starts(name: str, rows: Sequence[Row]) -> list[float]:
    """Finite values at the start of the runs."""
    curves = [record["curve"][name] for row in rows for record in row.records]
    return [curve[0] for curve in curves if curve and math.isfinite(curve[0])]


def _logarithmic(axes: Axes, low: float, high: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(low / 1.6, high * 1.6)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _percentages(axes: Axes, low: float, high: float) -> None:
    axes.set_yscale("function", functions=(_shortfall, _per_cent))
    bottom, top = _shortfall(low), _shortfall(high)
    margin = 0.06 * (top - bottom) + 0.02
    low, high = _per_cent(bottom - margin), min(100.0, _per_cent(top + margin))
    axes.set_ylim(low, high)
    ticks = _ticks(low, high)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _shortfall(per_cent: Any) -> Any:
    """Logarithmic in the rest to 100 %; 100 % itself stands where 99.8 % otherwise would."""
    return -np.log10(np.maximum(100.2 - np.asarray(per_cent), 1e-6))


def _per_cent(shortfall: Any) -> Any:
    """The inverse of `_shortfall`."""
    return 100.2 - 10 ** -np.asarray(shortfall)


def _ticks(low: float, high: float) -> list[float]:
    """Round percentages, as many as `_shortfall` has room for."""
    apart = 0.07 * (_shortfall(high) - _shortfall(low))

    def has_room(tick: float) -> bool:
        return all(abs(_shortfall(tick) - _shortfall(other)) >= apart for other in ticks)

    ticks: list[float] = []
    for tick in _ROUND:
        if low <= tick <= high and has_room(tick):
            ticks.append(tick)
    if len(ticks) > 1:
        return sorted(ticks)
    return [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]


def _reference(axes: Axes, word: str, value: float) -> None:
    """A dotted line with its name."""
    axes.axhline(value, color="black", linewidth=0.8, linestyle=(0, (1, 1.5)))
    axes.annotate(
        f"{word} {value:g}",
        (0.01, value),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 2.5),
        textcoords="offset points",
        fontsize=6.5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3},
        zorder=1,
    )
