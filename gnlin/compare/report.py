"""Rows to a table and a picture."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich import box
from rich.table import Table

from gnlin.compare.contestants import CONTESTANTS, Setting
from gnlin.compare.summary import Row, Spread
from gnlin.compare.tasks import Task

# Okabe and Ito's palette, which colour-blind readers can tell apart; grey for its yellow, too pale for a line on white.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#999999", "#CC79A7")
_LEGEND = (
    "To loss {target:g}: until the full training loss stays at or below it; '2 of 3' seeds where not all get there. "
    "Gradients: work in units of one mini-batch gradient, by compiled FLOPs. Seconds: training steps alone. "
    "Loss and accuracy are those of the model being trained. * best setting at the edge of its grid."
)
# A loss below this is zero as far as float32 logits can tell.
_SMALLEST_LOSS = 1e-8


def describe(setting: Setting) -> str:
    """``lr 0.01``."""
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def table(rows: Sequence[Row], task: Task, seeds: int) -> Table:
    """The comparison as a table of mean ± standard deviation over seeds.

    Args:
        rows: from `summary.summarise`.
        task: the task they are about.
        seeds: number of seeds asked for.

    Returns:
        A rich table that fits into 80 columns.
    """
    view = Table(
        title=f"{task.name}: mean ± standard deviation over {_seeds(seeds)}",
        caption=_LEGEND.format(target=task.target),
        caption_justify="left",
        title_justify="left",
        box=box.HORIZONTALS,
        pad_edge=False,
    )
    view.add_column("contestant\nsetting", no_wrap=True)
    for heading in (
        "final\ntrain\nloss",
        "held-out\naccuracy\n%",
        f"steps\nto loss\n{task.target:g}",
        f"gradients\nto loss\n{task.target:g}",
        "seconds\n+ compile",
    ):
        view.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        unfinished = f"\n{_seeds(len(row.records))} so far" if len(row.records) < seeds else ""
        view.add_row(
            f"{row.contestant.name}\n{describe(row.setting)}{' *' if row.at_edge else ''}{unfinished}",
            _cell(row.loss, "{:.1e}".format, "diverged"),
            _cell(row.accuracy, lambda value: f"{100 * value:.1f}"),
            _cell(row.steps, "{:.0f}".format),
            _cell(row.cost, "{:.0f}".format),
            f"{row.seconds.mean:.1f}{_deviation(row.seconds, '{:.1f}'.format)}\n+ {row.compile_seconds:.1f}",
            end_section=True,
        )
    return view


def _cell(spread: Spread, show: Callable[[float], str], otherwise: str = "not\nreached") -> str:
    if not spread.count:
        return f"{otherwise}\n0 of {spread.total}"
    missing = "" if spread.count == spread.total else f"\n{spread.count} of {spread.total}"
    return f"{show(spread.mean)}\n{_deviation(spread, show)}{missing}"


def _deviation(spread: Spread, show: Callable[[float], str]) -> str:
    return "" if math.isnan(spread.deviation) else f" ± {show(spread.deviation)}"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count != 1 else ''}"


def picture(rows: Sequence[Row], task: Task, path: Path) -> None:
    """Training loss against steps and against gradient-equivalents, written to `path` as a PNG.

    Lines are medians over seeds and bands reach from the least to the greatest; all axes are logarithmic.
    """
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    against_steps, against_cost = figure.subplots(1, 2, sharey=True)
    for row in rows:
        _draw(against_steps, row, "step")
        _draw(against_cost, row, "cost")
    for axes, label in ((against_steps, "steps"), (against_cost, "gradient-equivalents (compiled FLOPs)")):
        axes.axhline(task.target, color="black", linewidth=0.8, linestyle=":", label=f"target {task.target:g}")
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(top=20)
        axes.grid(True, which="major", alpha=0.25)
    against_steps.set_ylabel("full training loss of the model being trained")
    handles, labels = against_steps.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    seeds = max((len(row.records) for row in rows), default=0)
    figure.suptitle(f"{task.name}: median and range over {_seeds(seeds)}; dashed: full batch")
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, row: Row, against: str) -> None:
    number = [contestant.name for contestant in CONTESTANTS].index(row.contestant.name)
    steps, losses = _aligned(row, "loss")
    across = steps if against == "step" else _aligned(row, against)[1].mean(axis=0)
    # Divergence, an infinite loss, stands at the top of the picture; the start is off a logarithmic axis.
    bounded = np.clip(np.nan_to_num(losses, nan=np.inf), _SMALLEST_LOSS, 1e9)[:, 1:]
    colour = _COLOURS[number % len(_COLOURS)]
    style = {"linestyle": "--" if row.contestant.batch == "full" else "-", "linewidth": 1.6}
    axes.plot(across[1:], np.median(bounded, axis=0), color=colour, label=row.contestant.title, **style)
    axes.fill_between(across[1:], bounded.min(axis=0), bounded.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def _aligned(row: Row, name: str) -> tuple[np.ndarray, np.ndarray]:
    """``(steps (E,), values (seeds, E))``; after a run has diverged its loss is NaN and its work stands still."""
    curves = [record["curve"] for record in row.records]
    steps = np.asarray(max((curve["step"] for curve in curves), key=len))
    padded = []
    for curve in curves:
        filler = math.nan if name == "loss" else curve[name][-1]
        padded.append(np.pad(curve[name], (0, len(steps) - len(curve[name])), constant_values=filler))
    return steps, np.stack(padded)
