"""The progress of a study on the terminal: a bar, and a line for each entry that is complete."""

import concurrent.futures
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from gnlin.compare.entrants.entry import Entry
from gnlin.compare.report.wording import counted
from gnlin.compare.runs.jobs import Job
from gnlin.compare.runs.records import Record
from gnlin.compare.runs.study import Study


def carry_out(study: Study, executor: concurrent.futures.Executor | None, console: Console) -> None:
    """Make all runs of a study under a progress bar. A log has a line for each run instead."""
    label = Column(ratio=1, no_wrap=True)  # it gives way to the others
    progress = Progress(
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", table_column=label),
        console=console,
        transient=True,
        expand=True,
        speed_estimate_period=600,
    )
    with progress:
        listener = _Listener(study, progress, console)
        if not console.is_terminal:
            listener.say(f"{study.total} runs, kept in {study.records.path}")
        for entry, runs in study.carry_out(listener, executor):
            listener.say(_line(entry, runs))


class _Listener:
    """Told as runs go on and end."""

    def __init__(self, study: Study, progress: Progress, console: Console):
        self._study, self._progress, self._console = study, progress, console
        # Runs that were there already take no time. They would spoil the estimate of the time left.
        self._found, self._ended = 0, 0
        self._bar = progress.add_task("compiling", total=study.total)

    def __call__(self, job: Job, done: float | None) -> None:
        self._found += done is None
        self._ended += done == 1.0
        description = f"{job.entry.label}{_chosen(job.entry, job.number)}, seed {job.seed}"
        self._progress.update(
            self._bar,
            description=description,
            total=self._study.total - self._found,
            completed=self._ended + (done or 0.0) % 1.0,
        )
        if done == 1.0 and not self._console.is_terminal:
            number = f"run {self._found + self._ended} of {self._study.total}"
            outcome = _outcome(self._study.records.find(job.blank))
            self.say(f"{number}: {description}: {outcome}")

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


class _Rate(ProgressColumn):
    """How fast runs end."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{60 * speed:.3g}/min")


def _line(entry: Entry, runs: Sequence[Record]) -> str:
    """The outcome of an entry that is complete."""
    if runs[0]["status"] == "failed":
        return f"{entry.label}: {runs[0]['reason']}"
    losses = []
    for run in runs:
        failed = run["status"] == "failed"
        losses.append(run["reason"] if failed else f"{run['curve']['loss'][-1]:.1e}")
    number = _chosen(entry, next(iter(runs[0]["setting"].values())))
    steps = sorted({run["steps"] for run in runs})
    made = counted(steps[-1], "step")
    if len(steps) > 1:
        made = f"{steps[0]}-{made}"
    return f"{entry.label}{number}: final train loss {', '.join(losses)} ({made})"


def _outcome(run: Record | None) -> str:
    """The outcome of one run. A failed run is not found, and is told of with its entry."""
    if run is None:
        return "failed"
    loss = f"train loss {run['curve']['loss'][-1]:.1e}"
    return f"{run['status']}, {loss}, {run['seconds']:.1f} s of training"


def _chosen(entry: Entry, number: float) -> str:
    """The tuned number, unless the user fixed it: then the label has it."""
    name = entry.contestant.tuned
    return "" if name in entry.options else f", {name} {number:g}"
