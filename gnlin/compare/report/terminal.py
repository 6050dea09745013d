"""Rows to a table on the terminal, in as many columns as the terminal has."""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gnlin.compare.report.summary import Row, Spread
from gnlin.compare.report.wording import (
    breakable,
    brief,
    counted,
    like,
    setting_in_words,
    small,
    trouble,
    whole,
)
from gnlin.compare.runs.records import TaskFacts

_LEGEND = (
    "To loss {target:g}: until the training loss stays at or below it; '2 of 3' runs where not all "
    "get there. Work: in units of one mini-batch gradient, by compiled FLOPs. Seconds: training "
    "steps alone, and compilation. Loss and held-out {quality} are those of the model being "
    "trained, and beside it of the network at the same parameters. Solved: runs that end "
    "{direction} {solved:g}. * best setting at the edge of its grid."
)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """A way to lay the table out; the default is the narrowest.

    Attributes:
        heading_lines: lines of the headings.
        in_one_line: a mean and its deviation stand on one line.
        apart: settings and seconds of compilation have columns of their own.
        counts_beside: numbers of runs and seeds, where some are missing, stand beside a value and
            not below it.
        longest_label: characters of a label from which on it is broken.
        gap: columns of the terminal between those of the table.
    """

    heading_lines: int = 3
    in_one_line: bool = False
    apart: bool = False
    counts_beside: bool = False
    longest_label: float = 20
    gap: int = 1


_WIDEST = _Layout(
    1, in_one_line=True, apart=True, counts_beside=True, longest_label=math.inf, gap=2
)
_COUNTS_BELOW = dataclasses.replace(_WIDEST, heading_lines=2, counts_beside=False)
_SETTING_BELOW = dataclasses.replace(_COUNTS_BELOW, apart=False)
# The first that fits is taken, and the last where none does.
_LAYOUTS = (
    _WIDEST,
    dataclasses.replace(_WIDEST, heading_lines=2),
    _COUNTS_BELOW,
    _SETTING_BELOW,
    dataclasses.replace(_COUNTS_BELOW, longest_label=24),
    dataclasses.replace(_SETTING_BELOW, longest_label=24),
    dataclasses.replace(_SETTING_BELOW, longest_label=20, gap=1),
    _Layout(longest_label=math.inf),
    _Layout(),
)


@dataclasses.dataclass(frozen=True)
class ResultTable:
    """The rows of one task as a table of mean ± standard deviation over seeds.

    Rich prints it in the width of its console. Below the table stand the reasons of the runs that
    diverged or failed.

    Args:
        rows: from `summary.summarise`.
        task: the task they are about.
        seeds: number of seeds asked for; `None` for as many as there are.
    """

    rows: Sequence[Row]
    task: TaskFacts
    seeds: int | None = None

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterable[RenderableType]:
        for layout in _LAYOUTS:
            table = _Drawn(self, layout).table()
            natural = Measurement.get(console, options.update_width(10_000), table).maximum
            if natural <= options.max_width:
                break
        yield table
        for row in self.rows:
            if row.failed or row.diverged:
                yield Padding(Text(f"{row.label}: {trouble(row)}"), (0, 0, 0, 2))


class _Drawn:
    """A table in one layout."""

    def __init__(self, results: ResultTable, layout: _Layout):
        self.rows, self.task, self.layout = results.rows, results.task, layout
        most = max((len(row.records) for row in results.rows), default=0)
        self.seeds = results.seeds or most

    def table(self) -> Table:
        quality = self.task.quality_name.partition(",")[0]
        view = Table(
            title=f"{self.task.name}: mean ± standard deviation over {counted(self.seeds, 'seed')}",
            caption=_LEGEND.format(
                target=self.task.target,
                quality=quality,
                direction="at or above" if self.task.higher_is_better else "at or below",
                solved=self.task.solved,
            ),
            caption_justify="left",
            title_justify="left",
            box=box.HORIZONTALS,
            padding=(0, self.layout.gap - 1, 0, 0),  # beside the box's own column
            pad_edge=False,
        )
        first, *others = self.headings()
        view.add_column(first, overflow="fold")
        for heading in others:
            is_text = heading == "setting"
            view.add_column(heading, justify="left" if is_text else "right", no_wrap=True)
        for row in self.rows:
            view.add_row(*self.cells(row), end_section=not self.layout.counts_beside)
        return view

    def headings(self) -> list[str]:
        """Headings of the columns, in as many lines as the layout has."""
        quality, _, unit = (part.strip() for part in self.task.quality_name.partition(","))
        target = f"{self.task.target:g}"
        if self.layout.heading_lines == 3:
            quality = f"held-out\n{quality}\n{unit}".rstrip()
            ends = ["final\ntrain\nloss", quality, "of the\nnetwork", "solved"]
            to_target = [f"{name}\nto loss\n{target}" for name in ("steps", "work")]
            return ["contestant\nsetting", *ends, *to_target, "seconds\n+ to\ncompile"]
        line = " " if self.layout.heading_lines == 1 else "\n"
        held_out = f"held-out{line}{self.task.quality_name}"
        ends = [f"final train{line}loss", held_out, f"of the{line}network", "solved"]
        names = ["steps", "work", "seconds"] if self.layout.apart else ["steps", "work"]
        to_target = [f"{name} to{line}loss {target}" for name in names]
        if self.layout.apart:
            return ["contestant", "setting", *ends, *to_target, f"seconds to{line}compile"]
        return ["contestant\nsetting", *ends, *to_target, "seconds\n+ to compile"]

    def cells(self, row: Row) -> list[str | Text]:
        """One row, below the headings."""
        has_failed = row.failed == len(row.records)
        absent = "-" if has_failed else "not reached" if self.layout.in_one_line else "not\nreached"
        held_out = like(row.quality.mean)
        numbers = [
            self.spread(row.loss, small, "failed" if row.failed else "diverged"),
            self.spread(row.quality, held_out, "-"),
            self.spread(row.network_quality, held_out, "-"),
            f"{row.solved}/{len(row.records)}",
            self.spread(row.steps, whole, absent),
            self.spread(row.cost, whole, absent),
        ]
        seconds = self.spread(row.seconds, brief, absent)
        compiling = f"{row.compile_seconds:.1f}" if math.isfinite(row.compile_seconds) else ""
        label, setting = self.label(row), self.setting(row)
        if self.layout.apart:
            return [Text(label), Text(setting), *numbers, seconds, compiling or "-"]
        if compiling:
            seconds += f"\n+ {compiling}"
        first = f"{label}\n{setting}" if setting else label
        return [Text(first), *numbers, seconds]

    def label(self, row: Row) -> str:
        """Rich breaks a label at spaces, and within a word where it must."""
        longest = self.layout.longest_label
        label = breakable(row.label, longest)
        if longest == math.inf or not self.layout.in_one_line:
            return label
        return textwrap.fill(label, int(longest), break_on_hyphens=False)

    def setting(self, row: Row) -> str:
        """The chosen setting, and how many seeds there are of those that were asked for."""
        setting = f"{setting_in_words(row.chosen)}{' *' if row.at_edge else ''}"
        if len(row.records) == self.seeds or row.failed:
            return setting
        begun = f"{counted(len(row.records), 'seed')} so far"
        return f"{setting}, {begun}" if self.layout.counts_beside else f"{setting}\n{begun}"

    def spread(self, spread: Spread, show: Callable[[float], str], otherwise: str) -> str:
        """Mean, deviation, and how many runs have a value where not all have one."""
        if not spread.count:
            return otherwise
        text = show(spread.mean)
        if not math.isnan(spread.deviation):
            between = " " if self.layout.in_one_line else "\n"
            text += f"{between}± {show(spread.deviation)}"
        if spread.count < spread.total:
            missing = f"{spread.count} of {spread.total}"
            text += f" ({missing})" if self.layout.counts_beside else f"\n{missing}"
        return text
