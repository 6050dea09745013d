"""The command line: ``gnlin compare``, ``gnlin report``, ``gnlin tasks``, ``gnlin contestants``."""

import contextlib
import difflib
import errno
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import gnlin
from gnlin.compare.entrants.contestants import CONTESTANTS, DEFAULT
from gnlin.compare.entrants.entry import UsageError, entries_of, format_value
from gnlin.compare.report import page, progress
from gnlin.compare.report.summary import summarise
from gnlin.compare.report.terminal import ResultTable
from gnlin.compare.runs.records import (
    Record,
    Records,
    RecordsError,
    TaskFacts,
    read,
    read_facts,
    write_facts,
)
from gnlin.compare.runs.study import Study, check_entries, facts
from gnlin.compare.runs.workers import executor_of
from gnlin.compare.tasks import TASKS, describe
from gnlin.compare.tasks.task import DataError, Task

INTERRUPTED = 128 + signal.SIGINT

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")

_TASK = typer.Argument(help="The task; `gnlin tasks` lists them.", metavar="TASK")
_CONTESTANTS = typer.Argument(
    help="The contestants: names from `gnlin contestants`, with options as in "
    "`il:period=64,inner=sgd`, or the families `gnlin`, `optax`, `peers`. "
    f"By default {', '.join(DEFAULT)}.",
    metavar="[CONTESTANT]...",
)
_SEEDS = typer.Option(min=1, help="Number of seeds: 0, 1, ...")
_SWEEP = typer.Option(
    help="`option=value,value,...`: an entry for each value. Repeat it to cross options.",
    metavar="SWEEP",
)
_WORK = typer.Option(help="Fraction of the task's budget that each run spends.")
_OUT = typer.Option(help="Directory for the results; by default gnlin-results/TASK.")
_WORKERS = typer.Option(min=1, help="Number of processes that make runs side by side.")
_DASK = typer.Option(help="Address of a Dask scheduler whose workers make the runs.")
_DIRECTORY = typer.Argument(help="Directory with the results of `gnlin compare`.", metavar="DIR")


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Second-order optimisers for JAX: iterative linearisation and damped Gauss-Newton."""
    if version:
        typer.echo(f"gnlin {gnlin.__version__}")
        raise typer.Exit()


@app.command("compare")
def compare_optimisers(
    task: Annotated[str, _TASK],
    contestants: Annotated[list[str] | None, _CONTESTANTS] = None,
    seeds: Annotated[int, _SEEDS] = 3,
    sweep: Annotated[list[str] | None, _SWEEP] = None,
    work: Annotated[float, _WORK] = 1.0,
    out: Annotated[Path | None, _OUT] = None,
    workers: Annotated[int, _WORKERS] = 1,
    dask: Annotated[str | None, _DASK] = None,
) -> None:
    """Train one network with each optimiser and compare them.

    Each contestant is tuned on seed 0 over five values of one number. One rule chooses: the fewest
    gradient-equivalents until the training loss is at the target for good. Where no value gets
    there, the lowest final training loss. The chosen value then runs on the other seeds.

    Every run is kept as soon as it ends. After Ctrl-C or a crash the same command goes on.
    """
    with _in_one_line():
        if not 0 < work < math.inf:
            raise UsageError(f"--work must be positive and finite; got {work:g}")
        if workers > 1:  # the first process would take most of an accelerator's memory at once
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        entries = entries_of(contestants or [], _sweeps(sweep or []))
        problem = _task(task)
        check_entries(problem, entries)
        directory = out or Path("gnlin-results") / task
        records = Records(directory)
        try:
            write_facts(directory, facts(problem))
            budget = work * problem.work
            study = Study(problem, entries, seeds, records, budget, _command(), by_name=True)
            _carry_out(study, directory, workers, dask)
        finally:
            records.close()


@app.command("report")
def make_report(directory: Annotated[Path, _DIRECTORY]) -> None:
    """Make DIR/report.html, figures and CSV files from the runs in DIR, and print the tables."""
    with _in_one_line():
        records, known = _results(directory)
        console = _console()
        for name in known:
            own = [record for record in records if record["task"] == name]
            rows = summarise(own, known)
            nothing = f"{name}: no contestant is complete yet."
            console.print(ResultTable(rows, known[name]) if rows else nothing)
        written = page.write(directory, records, known)
        console.print(f"\nReport: {written}", soft_wrap=True, highlight=False)


@app.command("tasks")
def list_tasks() -> None:
    """List the tasks."""
    _list([(name, describe(name)) for name in TASKS])


@app.command("contestants")
def list_contestants() -> None:
    """List the contestants, with their options and their tuned numbers."""
    rows = []
    for name, contestant in CONTESTANTS.items():
        defaults = {option: form.default for option, form in contestant.options.items()}
        options = [f"{option}={format_value(default)}" for option, default in defaults.items()]
        values = ", ".join(f"{value:g}" for value in contestant.values(defaults))
        text = contestant.summary
        if reason := contestant.reason_absent():
            text += f" Absent: {reason}"
        tuned = f"tuned: {contestant.tuned} = {values}"
        rows.append((name, f"{text}\n{tuned}\noptions: {', '.join(options)}"))
    _list(rows)


# A comparison.


def _carry_out(study: Study, directory: Path, workers: int, dask: str | None) -> None:
    """Make the runs, print the table, and write the page."""
    console, path = _console(), study.records.path
    if study.records.cut_short:
        console.print(
            f"The last line of {path} was cut short and is removed; its run is made again."
        )
    try:
        with executor_of(workers, dask) as executor:
            progress.carry_out(study, executor, console)
    except KeyboardInterrupt:
        _show(study, console)
        kept = f"\nInterrupted. The finished runs are in {path}."
        console.print(kept, soft_wrap=True, highlight=False)
        console.print(f"To go on: {_command()}", soft_wrap=True, highlight=False)
        raise typer.Exit(INTERRUPTED) from None
    _show(study, console)
    written = page.write(directory, *_results(directory))
    console.print(f"\nReport: {written}\nRecords: {path}", soft_wrap=True, highlight=False)


def _show(study: Study, console: Console) -> None:
    """The table of the entries that are complete."""
    task = facts(study.task)
    rows = summarise(study.runs(), {task.name: task})
    if not rows:
        console.print("No contestant is complete yet.")
        return
    console.print()
    console.print(ResultTable(rows, task, study.seeds))


def _results(directory: Path) -> tuple[list[Record], dict[str, TaskFacts]]:
    """The runs in a directory, and the facts of their tasks."""
    records, known = read(directory), read_facts(directory)
    if not records:
        raise RecordsError(f"no run has finished in {directory} yet")
    if unknown := {record["task"] for record in records} - known.keys():
        task = min(unknown)
        raise RecordsError(
            f"{directory} says nothing of the task {task!r}; "
            f"run `gnlin compare {task}` into it again"
        )
    return records, known


# Arguments.


def _task(name: str) -> Task:
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TASKS)}"
        raise UsageError(f"unknown task {name!r}; {hint}")
    return TASKS[name]()


def _sweeps(items: Sequence[str]) -> dict[str, list[str]]:
    sweeps = {}
    for item in items:
        name, equals, values = item.partition("=")
        if not equals or not all(values.split(",")):
            raise UsageError(f"--sweep {item}: write option=value,value,...")
        sweeps.setdefault(name, []).extend(values.split(","))
    return sweeps


def _command() -> str:
    """The command line, as it can be typed again."""
    program = "gnlin" if shutil.which("gnlin") else shlex.quote(sys.argv[0])
    if Path(sys.argv[0]).name == "__main__.py":
        program = f"{shlex.quote(sys.executable)} -m gnlin"
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])


# Output.


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    """Mistakes and missing things end the command with one line and the exit code 2."""
    try:
        yield
    except (UsageError, DataError, RecordsError, OSError) as error:
        remedy = ""
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            remedy = "; the runs are kept: make room, and `gnlin report DIR` makes the page"
        typer.echo(f"gnlin: {error}{remedy}", err=True)
        raise typer.Exit(2) from None


def _list(rows: Sequence[tuple[str, str]]) -> None:
    view = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    view.add_column(no_wrap=True)
    view.add_column(overflow="fold")
    for row in rows:
        view.add_row(*row)
    _console().print(view)


def _console() -> Console:
    """Standard output. A file or a pipe has no width of its own: it gets that of any screen."""
    console = Console()
    return console if console.is_terminal else Console(width=80)
