"""The comparison from Python."""

import concurrent.futures
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gnlin.compare.entrants.contestant import Contestant
from gnlin.compare.entrants.entry import Entry, Sweep, entries_of, format_value
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
    """All runs of a comparison.

    Each contestant is tuned on seed 0 and runs at the chosen setting on the other seeds.

    Args:
        task: a name from `TASKS`, or a `Task` of your own.
        contestants: names with options such as ``"il:period=64,inner=sgd"``, or `Contestant`
            records of your own. An empty sequence stands for the defaults of the command line.
        seeds: number of seeds, from 0 on.
        sweep: option ↦ values. Each value becomes an entry of its own; several options are crossed.
        work: fraction of the task's budget.
        out: directory in which runs are kept as they end. Runs that are there are not repeated.
            `None` keeps nothing. ``gnlin report DIR`` makes a page of it. A run is known by the
            names of task and contestant, its options, setting and seed. If anything else changes,
            take another name or directory.
        executor: makes the runs: a `concurrent.futures.Executor` of threads, of loky or of Dask.
            The processes of the standard library cannot be handed a contestant. `None` for this
            process.

    Returns:
        One plain dictionary for each run. Its keys are ``task``, ``label``, ``options``,
        ``setting``, ``seed``, ``status``, ``reason``, ``steps``, ``seconds``, ``metrics``
        (`gnlin.metrics` of the last state) and ``curve``. The curve has ``step``, ``cost``
        (gradient-equivalents), ``seconds``, ``loss``, ``quality``, ``network_loss`` and
        ``network_quality`` at each evaluation.

    Raises:
        ValueError: a task, contestant, option or number is not possible; the message names the
            possible ones.
        DataError: the task's data is missing.
        RecordsError: `out` cannot be written to, or has other files in it.

    Example:
        >>> from gnlin.compare import run
        >>> runs = run("diabetes", ["adam:learning_rate=0.016"], seeds=1, work=0.01)
        >>> runs[0]["label"], runs[0]["status"]
        ('adam:learning_rate=0.016', 'finished')
    """
    _check_arguments(task, contestants, seeds, work)
    by_name = isinstance(task, str)
    problem = TASKS[task]() if isinstance(task, str) else task
    entries = entries_of(contestants, _as_text(sweep or {}))
    check_entries(problem, entries)
    records = Records(None if out is None else Path(out))
    try:
        if out is not None:
            write_facts(Path(out), facts(problem))
        budget = work * problem.work
        study = Study(problem, entries, seeds, records, budget, "gnlin.compare.run", by_name)
        for _ in study.carry_out(executor=executor):
            pass
        return study.runs()
    finally:
        records.close()


def _check_arguments(task: Any, contestants: Any, seeds: int, work: float) -> None:
    if isinstance(task, str) and task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, or a Task; got {task!r}")
    if seeds < 1 or not 0 < work < math.inf:
        raise ValueError(
            f"`seeds` and `work` must be positive and finite; got {seeds!r} and {work!r}"
        )
    if isinstance(contestants, str):
        raise ValueError(f"`contestants` must be a sequence; write [{contestants!r}]")
    for item in contestants:
        if not isinstance(item, str | Contestant | Entry):
            raise ValueError(
                f"`contestants` holds {type(item).__name__}; an Optax optimiser takes part as "
                "optax_contestant(name, optimiser_of_number, grid)"
            )


def _as_text(sweep: Mapping[str, Sequence[Any]]) -> Sweep:
    """The values of a sweep as the command line takes them."""
    texts = {}
    for name, values in sweep.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ValueError(
                "`sweep` wants a sequence of values of each option; "
                f"write {{{name!r}: [{values!r}]}}"
            )
        texts[name] = [format_value(value) for value in values]
    return texts
