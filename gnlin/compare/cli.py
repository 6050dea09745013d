"""The command line: ``gnlin compare TASK``."""

import datetime
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import gnlin
from gnlin.compare import report
from gnlin.compare.contestants import CONTESTANTS, Contestant, Setting
from gnlin.compare.study import RECORDS, Records, Study
from gnlin.compare.summary import summarise
from gnlin.compare.tasks import TASKS, Task

PICTURE = "curves.png"
DEFAULT_SEEDS = 3
INTERRUPTED = 128 + signal.SIGINT

_TASK_NAMES = ", ".join(TASKS)
_CONTESTANT_NAMES = ", ".join(contestant.name for contestant in CONTESTANTS)

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Second-order optimisers for JAX: iterative linearisation and damped Gauss-Newton."""
    if version:
        typer.echo(f"gnlin {gnlin.__version__}")
        raise typer.Exit()


@app.command()
def compare(
    task: Annotated[str, typer.Argument(help=f"What to train: {_TASK_NAMES}.", metavar="TASK")],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... to run.")] = DEFAULT_SEEDS,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Run this contestant and no other; repeatable. {_CONTESTANT_NAMES}.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for the results; by default ./gnlin-results/TASK-TIME.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Directory of an interrupted run: do what is missing.")] = None,
) -> None:
    """Train one network with each optimiser and set them side by side.

    Each contestant is tuned on seed 0 over four settings by one rule: the fewest gradient-equivalents until the
    training loss is at the target for good, or, where no setting gets there, the lowest final training loss. The
    chosen setting then runs on the other seeds.

    Prints a table and writes every run (records.jsonl) and the curves (curves.png). Ctrl-C keeps the finished runs.
    """
    chosen = _contestants(only or [])
    problem = _task(task)
    directory = _directory(task, out, resume)
    try:
        records = Records(directory)
    except OSError as error:
        raise typer.BadParameter(f"cannot write to {directory}: {error}", param_hint="--out") from None
    console = _console()
    try:
        _run(problem, chosen, seeds, records, console)
    except KeyboardInterrupt:
        _show(problem, chosen, seeds, records, console)
        console.print(f"\nInterrupted. {len(records.finished)} finished runs are in {records.path}.", soft_wrap=True)
        console.print(f"To go on: {_command(task, seeds, only or [], directory)}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    _show(problem, chosen, seeds, records, console)


def _run(task: Task, contestants: Sequence[Contestant], seeds: int, records: Records, console: Console) -> None:
    """Do all runs under a progress bar; say so when a contestant is complete."""
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:

        def listen(contestant: Contestant, setting: Setting, seed: int, done: float) -> None:
            description = f"{contestant.name}, {report.describe(setting)}, seed {seed}"
            progress.update(bar, description=description, completed=done)

        study = Study(task, contestants, seeds, records, listen)
        bar = progress.add_task("compiling", total=study.total)
        for contestant, runs in study.carry_out():
            losses = ", ".join(f"{run['curve']['loss'][-1]:.1e}" for run in runs)
            setting = report.describe(runs[0]["setting"])
            console.print(f"{contestant.name}, {setting}: final train loss {losses}", highlight=False, soft_wrap=True)


def _show(task: Task, contestants: Sequence[Contestant], seeds: int, records: Records, console: Console) -> None:
    """Table and picture of what is finished."""
    runs = [record for record in records.finished if record["task"] == task.name and record["seed"] < seeds]
    rows = summarise(runs, contestants, task.target)
    if not rows:
        console.print("No contestant is complete yet.")
        return
    console.print()
    console.print(report.table(rows, task, seeds))
    picture = records.path.with_name(PICTURE)
    report.picture(rows, task, picture)
    console.print(f"\nCurves: {picture}\nRecords: {records.path}", soft_wrap=True, highlight=False)


def _task(name: str) -> Task:
    if name not in TASKS:
        raise typer.BadParameter(f"unknown task {name!r}; known: {_TASK_NAMES}", param_hint="TASK")
    return TASKS[name]()


def _contestants(only: Sequence[str]) -> list[Contestant]:
    known = {contestant.name: contestant for contestant in CONTESTANTS}
    for name in only:
        if name not in known:
            raise typer.BadParameter(f"unknown contestant {name!r}; known: {_CONTESTANT_NAMES}", param_hint="--only")
    return [contestant for contestant in CONTESTANTS if not only or contestant.name in only]


def _directory(task: str, out: Path | None, resume: Path | None) -> Path:
    if resume is not None:
        if out is not None:
            raise typer.BadParameter("give either --out or --resume", param_hint="--out")
        if not (resume / RECORDS).exists():
            raise typer.BadParameter(f"no {RECORDS} in {resume}", param_hint="--resume")
        return resume
    directory = out or Path("gnlin-results") / f"{task}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if (directory / RECORDS).exists():
        raise typer.BadParameter(f"{directory} holds records already; use --resume {directory}", param_hint="--out")
    return directory


def _console() -> Console:
    """Standard output; a file or a pipe has no width of its own, so it gets one that holds the table on any screen."""
    console = Console()
    return console if console.is_terminal else Console(width=80)


def _command(task: str, seeds: int, only: Sequence[str], directory: Path) -> str:
    """The command line that resumes, beginning as this one did."""
    program = "gnlin" if shutil.which("gnlin") else shlex.quote(sys.argv[0])
    if Path(sys.argv[0]).name == "__main__.py":
        program = f"{shlex.quote(sys.executable)} -m gnlin"
    options = [f"--seeds {seeds}"] if seeds != DEFAULT_SEEDS else []
    options += [f"--only {name}" for name in only]
    return " ".join([program, "compare", task, *options, "--resume", shlex.quote(str(directory))])
