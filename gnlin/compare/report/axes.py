"""Vertical axes: their scales, limits and ticks, and what fits between them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter

from gnlin.compare.report.summary import Row, TaskFacts


def value_axis(
    axes: Axes, name: str, facts: TaskFacts, values: Sequence[float], rows: Sequence[Row]
) -> None:
    """Scale and limits for `values`, and a line at the target or at what counts as solved.

    What should be low has a logarithmic axis, and so, in what is missing to 100, has a percentage
    that reaches 90. Values far worse than where training began do not stretch the axis: they are
    drawn at its edge.
    """
    word, reference = ("target", facts.target) if name == "loss" else ("solved", facts.solved)
    known = np.asarray([reference, *filter(math.isfinite, values)])
    begun = [value for row in rows for record in row.records for value in record["curve"][name][:1]]
    starts = list(filter(math.isfinite, begun))
    if low_is_good := name == "loss" or not facts.higher_is_better:
        known = known[known <= 3 * max([abs(reference), *starts])]
    low, high = known.min(), known.max()
    if low_is_good and low >= 0 < high:
        axes.set_yscale("log")
        axes.set_ylim(known[known > 0].min() / 1.6, high * 1.6)
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif not low_is_good and facts.quality_name.endswith("%") and 90 <= high <= 100:
        axes.set_yscale("function", functions=(_shortfall, _per_cent))
        margin = 0.06 * (_shortfall(high) - _shortfall(low)) + 0.02
        low, high = (
            _per_cent(_shortfall(low) - margin),
            min(100.0, _per_cent(_shortfall(high) + margin)),
        )
        axes.set_ylim(low, high)
        axes.set_yticks(ticks := _ticks(low, high), [f"{tick:g}" for tick in ticks])
    else:
        if not low_is_good:  # R², say, which has no least value
            low = max(low, reference - 6 * abs(reference - min(starts, default=reference - 1)))
        margin = 0.06 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)
    axes.axhline(reference, color="black", linewidth=0.8, linestyle=(0, (1, 1.5)))
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3}
    place = {
        "xycoords": axes.get_yaxis_transform(),
        "xytext": (0, 2.5),
        "textcoords": "offset points",
    }
    axes.annotate(
        f"{word} {reference:g}", (0.01, reference), **place, fontsize=6.5, bbox=box, zorder=1
    )
    axes.set_ylabel(plain("training loss" if name == "loss" else f"held-out {facts.quality_name}"))


def metric_axis(axes: Axes, name: str, values: Sequence[float]) -> None:
    """Scale and limits for `values` of a metric: logarithmic where they are positive and far apart."""
    low, high = min(values), max(values)
    if 0 < 30 * low < high:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.6, high * 1.6)
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.06 * (high - low)
        axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel(plain(name))


def _shortfall(per_cent: Any) -> Any:
    """Logarithmic in what is missing to 100 %, which itself stands where 99.8 % otherwise would."""
    return -np.log10(np.maximum(100.2 - np.asarray(per_cent), 1e-6))


def _per_cent(shortfall: Any) -> Any:
    return 100.2 - 10 ** -np.asarray(shortfall)


def _ticks(low: float, high: float) -> list[float]:
    """Round percentages, the roundest first, as many as `_shortfall` has room for."""
    apart = 0.07 * (_shortfall(high) - _shortfall(low))
    ticks: list[float] = []
    for tick in (
        100,
        0,
        90,
        99,
        50,
        98,
        95,
        99.5,
        80,
        97,
        70,
        96,
        60,
        40,
        20,
        92,
        85,
        99.8,
        98.5,
        97.5,
    ):
        if low <= tick <= high and all(
            abs(_shortfall(tick) - _shortfall(other)) >= apart for other in ticks
        ):
            ticks.append(tick)
    between = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    return sorted(ticks) if len(ticks) > 1 else between


def within(axes: Axes, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The values, those that are off the axis at its edge."""
    return np.clip(np.nan_to_num(np.asarray(values, float), nan=math.inf), *axes.get_ylim())


def plain(text: str) -> str:
    """Dollar signs are no mathematics here."""
    return text.replace("$", r"\$")
