"""The comparison from Python."""

import concurrent.futures
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gnlin.compare.entrants.contestant import Contestant
from gnlin.compare.entrants.entry import Entry, entries_of, format_value
from gnlin.compare.runs.records import Record, Records, write_facts
from gnlin.compare.runs.study import Study, check_entries, facts
from gnlin.compare.tasks import TASKS
from gnlin.compare.tasks.task import Task


def run(
    task: str | Task,
    contestants: Sequence[str | Contestant | Entry] = (),
    *,
    seeds: int = 3,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    work: float = 1.0,
    out: Path | str | None = None,
    executor: concurrent.futures.Executor | None = None,
) -> list[Record]:
    """Tune each contestant on seed 0, run it at the chosen setting on the others, and return all
    runs.

    Args:
        task: a name from `TASKS`, or a `Task` of your own.
        contestants: names with options such as ``"il:period=64,inner=sgd"``, or `Contestant`
            records of your own; none of them for the command line's defaults.
        seeds: number of seeds, from 0 on.
        sweep: option ↦ values, each of which becomes an entry of its own; several options are
            crossed.
        work: fraction of the task's budget.
        out: directory in which runs are kept as they end, and from which those that are there are
            taken; `None` keeps nothing. ``gnlin report DIR`` makes a page of it. A run is known by
            the names of task and contestant, its options, setting and seed: what has changed
            otherwise wants another name or directory.
        executor: who makes the runs, a `concurrent.futures.Executor` of threads, of loky or of
            Dask; the processes of the standard library cannot be handed a contestant. `None` for
            this process.

    Returns:
        One plain dictionary for each run: ``task``, ``label``, ``options``, ``setting``, ``seed``,
        ``status``, ``reason``, ``steps``, ``seconds``, ``metrics`` (what `gnlin.metrics` says of
        the last state), and ``curve`` with ``step``, ``cost`` (gradient-equivalents), ``seconds``,
        ``loss``, ``quality``, ``network_loss`` and ``network_quality`` at each evaluation.

    Raises:
        ValueError: a task, contestant, option or number is not what it can be; the message says
            what it can be.
        DataError: the task's data is not there.
        RecordsError: `out` cannot be written to, or holds something else.

    Example:
        >>> from gnlin.compare import run
        >>> runs = run("diabetes", ["adam:learning_rate=0.016"], seeds=1, work=0.01)
        >>> runs[0]["label"], runs[0]["status"]
        ('adam:learning_rate=0.016', 'finished')
    """
    if isinstance(task, str) and task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, or a Task; got {task!r}")
    if seeds < 1 or not 0 < work < math.inf:
        raise ValueError(
            f"`seeds` and `work` must be positive and finite; got {seeds!r} and {work!r}"
        )
    problem = TASKS[task]() if isinstance(task, str) else task
    if isinstance(contestants, str):
        raise ValueError(f"`contestants` must be a sequence; write [{contestants!r}]")
    for item in contestants:
        if not isinstance(item, (str, Contestant, Entry)):
            raise ValueError(
                f"`contestants` holds {type(item).__name__}; an Optax optimiser takes part as "
                "optax_contestant(name, optimiser_of_number, grid)"
            )
    for name, values in (sweep or {}).items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ValueError(
                f"`sweep` wants a sequence of values of each option; write {{{name!r}: [{values!r}]}}"
            )
    swept = {
        name: [format_value(value) for value in values] for name, values in (sweep or {}).items()
    }
    entries = entries_of(contestants, swept)
    check_entries(problem, entries)
    records = Records(None if out is None else Path(out))
    try:
        if out is not None:
            write_facts(Path(out), facts(problem))
        study = Study(
            problem,
            entries,
            seeds,
            records,
            work * problem.work,
            "gnlin.compare.run",
            isinstance(task, str),
        )
        for _ in study.carry_out(executor=executor):
            pass
        labels = {entry.label for entry in entries}
        return [
            record
            for record in records.runs
            if record["task"] == problem.name and record["label"] in labels
        ]
    finally:
        records.close()
