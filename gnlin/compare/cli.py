"""The command line: ``gnlin compare TASK``, ``gnlin report DIR``, ``gnlin tasks``, ``gnlin contestants``."""

import concurrent.futures
import contextlib
import difflib
import errno
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import loky
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as ProgressTask
from rich.table import Column, Table
from rich.text import Text

import gnlin
from gnlin.compare.entrants.contestants import CONTESTANTS, DEFAULT
from gnlin.compare.entrants.entry import Entry, UsageError, entries_of, format_value
from gnlin.compare.report import page as report
from gnlin.compare.report import summary
from gnlin.compare.runs.records import Record, Records, RecordsError, read, read_facts, write_facts
from gnlin.compare.runs.study import Job, Study, check_entries, facts
from gnlin.compare.tasks import TASKS, describe
from gnlin.compare.tasks.task import DataError, Task

INTERRUPTED = 128 + signal.SIGINT

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Second-order optimisers for JAX: iterative linearisation and damped Gauss-Newton."""
    if version:
        typer.echo(f"gnlin {gnlin.__version__}")
        raise typer.Exit()


@app.command()
def compare(
    task: Annotated[
        str, typer.Argument(help="What to train; `gnlin tasks` lists them.", metavar="TASK")
    ],
    contestants: Annotated[
        list[str] | None,
        typer.Argument(
            help="Who takes part: names from `gnlin contestants`, with options as in `il:period=64,inner=sgd`, or the "
            f"families `gnlin`, `optax`, `peers`. By default {', '.join(DEFAULT)}.",
            metavar="[CONTESTANT]...",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... to run.")] = 3,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="`option=value,value,...`: an entry for each value; repeat it to cross options.",
            metavar="SWEEP",
        ),
    ] = None,
    work: Annotated[
        float, typer.Option(help="Fraction of the task's budget that each run spends.")
    ] = 1.0,
    out: Annotated[
        Path | None, typer.Option(help="Directory for the results; by default gnlin-results/TASK.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that make runs side by side.")] = 1,
    dask: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler whose workers make the runs.")
    ] = None,
) -> None:
    """Train one network with each optimiser and set them side by side.

    Each contestant is tuned on seed 0 over five values of one number by one rule: the fewest
    gradient-equivalents until the training loss is at the target for good, or, where no value gets
    there, the lowest final training loss. The chosen value then runs on the other seeds.

    Every run is kept as soon as it ends. After Ctrl-C, or anything worse, the same command goes on
    where it was.
    """
    with _in_one_line():
        if not 0 < work < math.inf:
            raise UsageError(f"--work must be positive and finite; got {work:g}")
        if (
            workers > 1
        ):  # a process that took most of an accelerator's memory at once would leave none for the others
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        entries = entries_of(contestants or [], _sweeps(sweep or []))
        problem = _task(task)
        check_entries(problem, entries)
        directory = out or Path("gnlin-results") / task
        records = Records(directory)
        console = _console()
        study = Study(
            problem, entries, seeds, records, work * problem.work, _command(), by_name=True
        )
        write_facts(directory, facts(problem))
        if records.cut_short:
            console.print(
                f"The last line of {records.path} was cut short and is removed; its run is made again."
            )
        try:
            with _executor(workers, dask) as executor:
                _run(study, executor, console)
        except KeyboardInterrupt:
            _show(study, directory, console)
            console.print(
                f"\nInterrupted. The finished runs are in {records.path}.",
                soft_wrap=True,
                highlight=False,
            )
            console.print(f"To go on: {_command()}", soft_wrap=True, highlight=False)
            raise typer.Exit(INTERRUPTED) from None
        finally:
            records.close()
        _show(study, directory, console)
        page = report.write(directory, *_results(directory))
        console.print(f"\nReport: {page}\nRecords: {records.path}", soft_wrap=True, highlight=False)


@app.command("report")
def make_report(
    directory: Annotated[
        Path, typer.Argument(help="Directory with the results of `gnlin compare`.", metavar="DIR")
    ],
) -> None:
    """Make DIR/report.html, figures and CSV files from the runs in DIR, and print the tables."""
    with _in_one_line():
        records, known = _results(directory)
        console = _console()
        for name in known:
            rows = summary.summarise(
                [record for record in records if record["task"] == name], known
            )
            console.print(
                report.terminal(rows, known[name])
                if rows
                else f"{name}: no contestant is complete yet."
            )
        page = report.write(directory, records, known)
        console.print(f"\nReport: {page}", soft_wrap=True, highlight=False)


@app.command()
def tasks() -> None:
    """List what can be trained."""
    _list([(name, describe(name)) for name in TASKS])


@app.command("contestants")
def list_contestants() -> None:
    """List who can take part, with their options and what is tuned."""
    rows = []
    for name, contestant in CONTESTANTS.items():
        defaults = {option: form.default for option, form in contestant.options.items()}
        options = [f"{option}={format_value(default)}" for option, default in defaults.items()]
        values = ", ".join(f"{value:g}" for value in contestant.values(defaults))
        reason = contestant.reason_absent()
        text = contestant.summary if reason is None else f"{contestant.summary} Absent: {reason}"
        rows.append(
            (name, f"{text}\ntuned: {contestant.tuned} = {values}\noptions: {', '.join(options)}")
        )
    _list(rows)


def _run(study: Study, executor: concurrent.futures.Executor | None, console: Console) -> None:
    """Make all runs under a progress bar; say so when an entry is complete."""
    columns = (
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn(
            "{task.description}", table_column=Column(ratio=1, no_wrap=True)
        ),  # it gives way to the others
    )
    with Progress(
        *columns, console=console, transient=True, expand=True, speed_estimate_period=600
    ) as progress:
        found, ended = 0, 0
        bar = progress.add_task("compiling", total=study.total)

        def listen(job: Job, done: float | None) -> None:
            """Runs that were there already take no time, so they would spoil the estimate of what is left."""
            nonlocal found, ended
            found += done is None
            ended += done == 1.0
            description = f"{job.entry.label}{_chosen(job.entry, job.number)}, seed {job.seed}"
            total = study.total - found
            progress.update(
                bar, description=description, total=total, completed=ended + (done or 0.0) % 1.0
            )
            if done == 1.0 and not console.is_terminal:  # a log has no bar
                say(
                    f"run {found + ended} of {study.total}: {description}: {_outcome(study.records.find(job.blank))}"
                )

        def say(text: str) -> None:
            console.print(text, highlight=False, soft_wrap=True, markup=False)

        if not console.is_terminal:
            say(f"{study.total} runs, kept in {study.records.path}")

        for entry, runs in study.carry_out(listen, executor):
            say(_line(entry, runs))


class _Rate(ProgressColumn):
    """How fast runs end."""

    def render(self, task: ProgressTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{60 * speed:.3g}/min")


def _line(entry: Entry, runs: Sequence[dict]) -> str:
    if runs[0]["status"] == "failed":
        return f"{entry.label}: {runs[0]['reason']}"
    losses = ", ".join(
        f"{run['curve']['loss'][-1]:.1e}" if run["status"] != "failed" else run["reason"]
        for run in runs
    )
    steps = sorted({run["steps"] for run in runs})
    number = _chosen(entry, next(iter(runs[0]["setting"].values())))
    made = "-".join(str(count) for count in dict.fromkeys((steps[0], steps[-1])))
    return f"{entry.label}{number}: final train loss {losses} ({made} step{'s' if steps[-1] != 1 else ''})"


def _outcome(run: Record | None) -> str:
    """Of one run; failed ones are not found, and are told of with their entry."""
    if run is None:
        return "failed"
    return f"{run['status']}, train loss {run['curve']['loss'][-1]:.1e}, {run['seconds']:.1f} s of training"


def _chosen(entry: Entry, number: float) -> str:
    """The tuned number, unless it was said: then the label has it."""
    name = entry.contestant.tuned
    return "" if name in entry.options else f", {name} {number:g}"


def _show(study: Study, directory: Path, console: Console) -> None:
    """The table of what is complete."""
    labels = {entry.label for entry in study.entries}
    runs = [
        run
        for run in study.records.runs
        if run["task"] == study.task.name and run["label"] in labels
    ]
    rows = summary.summarise(runs, {study.task.name: facts(study.task)})
    if not rows:
        console.print("No contestant is complete yet.")
        return
    console.print()
    console.print(report.terminal(rows, facts(study.task), study.seeds))


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


@contextlib.contextmanager
def _executor(workers: int, dask: str | None) -> Iterator[concurrent.futures.Executor | None]:
    if dask is not None:
        try:
            from distributed import Client
        except ModuleNotFoundError:
            raise UsageError("--dask needs the extra cluster: pip install distributed") from None
        try:
            client = Client(dask)
        except (ValueError, OSError) as error:
            raise UsageError(f"--dask {dask}: no scheduler answers there ({error})") from None
        with client:
            yield client.get_executor(pure=False)
    elif workers > 1:
        # Workers of several threads each would get in each other's way; those of LAPACK's wait for
        # each other spinning.
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
        threads = {
            "XLA_FLAGS": flags,
            **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")},
        }
        executor = loky.ProcessPoolExecutor(
            workers, initializer=_follow, initargs=(os.getpid(),), env=threads
        )
        try:
            yield executor
        finally:
            executor.shutdown(kill_workers=True)
    else:
        yield None


def _follow(parent: int) -> None:
    """In a worker: Ctrl-C is for the process that keeps the records, and with that one it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _results(directory: Path) -> tuple[list[Record], dict[str, summary.TaskFacts]]:
    """The runs in a directory, and what their tasks are."""
    records, known = read(directory), read_facts(directory)
    if not records:
        raise RecordsError(f"no run has finished in {directory} yet")
    if unknown := {record["task"] for record in records} - known.keys():
        task = min(unknown)
        raise RecordsError(
            f"{directory} says nothing of the task {task!r}; run `gnlin compare {task}` into it again"
        )
    return records, known


def _task(name: str) -> Task:
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1, 0.5)
        raise UsageError(
            f"unknown task {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(TASKS)}")
        )
    return TASKS[name]()


def _sweeps(items: Sequence[str]) -> dict[str, list[str]]:
    sweeps = {}
    for item in items:
        name, equals, values = item.partition("=")
        if not equals or not all(values.split(",")):
            raise UsageError(f"--sweep {item}: write option=value,value,...")
        sweeps.setdefault(name, []).extend(values.split(","))
    return sweeps


def _list(rows: Sequence[tuple[str, str]]) -> None:
    view = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    view.add_column(no_wrap=True)
    view.add_column(overflow="fold")
    for row in rows:
        view.add_row(*row)
    _console().print(view)


def _console() -> Console:
    """Standard output; a file or a pipe has no width of its own, so it gets one that holds the table on any screen."""
    console = Console()
    return console if console.is_terminal else Console(width=80)


def _command() -> str:
    """The command line, as it can be typed again."""
    program = "gnlin" if shutil.which("gnlin") else shlex.quote(sys.argv[0])
    if Path(sys.argv[0]).name == "__main__.py":
        program = f"{shlex.quote(sys.executable)} -m gnlin"
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])
