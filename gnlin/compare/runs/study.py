"""All runs of a comparison: which are made, in what order, and by whom.

Each entry is tuned on seed 0. The chosen setting then runs on the other seeds. So the later jobs of
an entry depend on the records of its earlier ones. A *plan* is a generator of these jobs. It yields
a list of jobs, is sent their records, and yields more jobs. In the end it returns the records of
the chosen setting.

One process carries out the plans one after another. An executor has the jobs of all plans at once.
Any `concurrent.futures.Executor` will do, of local processes or of a cluster.
"""

import concurrent.futures
import dataclasses
import functools
import uuid
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence

import jax
import loky
import numpy as np

from gnlin.compare.entrants.entry import Entry, UsageError
from gnlin.compare.runs.jobs import Job, in_one_line, make, reason_not_to
from gnlin.compare.runs.records import Record, Records, RecordsError, TaskFacts
from gnlin.compare.runs.tuning import choose
from gnlin.compare.tasks import TASKS, describe
from gnlin.compare.tasks.task import Task

# Called as runs go on and end, with the job and the fraction of it that is done. The fraction is
# `None` for a run that was there already.
Listener = Callable[[Job, float | None], None]

# Yields jobs, is sent their records, and returns the records of the chosen setting.
Plan = Generator[list[Job], list[Record], list[Record]]


@dataclasses.dataclass
class Study:
    """All runs of one comparison.

    Attributes:
        task: the task.
        entries: those who take part.
        seeds: number of seeds, from 0 on.
        records: the runs made so far; those are not repeated.
        work: budget of a run in gradient-equivalents.
        command: a note for the records.
        by_name: whether workers may load the task by its name. Otherwise it travels to them whole.
    """

    task: Task
    entries: Sequence[Entry]
    seeds: int
    records: Records
    work: float
    command: str = ""
    by_name: bool = False
    _token: str = dataclasses.field(
        default_factory=lambda: uuid.uuid4().hex, init=False, repr=False
    )
    # Runs that were planned on the other seeds of an entry that has failed.
    _not_needed: int = dataclasses.field(default=0, init=False, repr=False)

    @property
    def total(self) -> int:
        """Number of runs that are made or found, as far as is known."""
        return self._planned - self._not_needed

    @functools.cached_property
    def _planned(self) -> int:
        return sum(
            1 if reason_not_to(entry, self.task) else len(entry.grid) + self.seeds - 1
            for entry in self.entries
        )

    def runs(self) -> list[Record]:
        """The runs that are there, those of other tasks and entries left out."""
        labels = {entry.label for entry in self.entries}
        return [
            record
            for record in self.records.runs
            if record["task"] == self.task.name and record["label"] in labels
        ]

    def carry_out(
        self,
        listener: Listener = lambda job, done: None,
        executor: concurrent.futures.Executor | None = None,
    ) -> Iterator[tuple[Entry, list[Record]]]:
        """Make all runs that are missing.

        Yields each entry when it is complete, with its runs at the chosen setting. A run that fails
        is a record with its reason and not an exception. With an `executor` its workers make the
        runs, and the records are still written here.
        """
        self._check_budget()
        if executor is None:
            yield from self._one_after_another(listener)
            return
        try:
            yield from self._all_at_once(listener, executor)
        except (concurrent.futures.BrokenExecutor, concurrent.futures.CancelledError):
            raise RecordsError(
                "a worker process died, perhaps for want of memory; finished runs are kept: "
                "run the same command again, with fewer workers"
            ) from None

    def _plan(self, entry: Entry) -> Plan:
        """The jobs of one entry: a trial for each value of the grid, then the other seeds."""
        unfit = reason_not_to(entry, self.task)
        if unfit:
            entry = dataclasses.replace(entry, grid=entry.grid[:1])  # one record tells the reason
        task = self.task.name if self.by_name else self.task
        job = functools.partial(
            Job, task, entry, work=self.work, command=self.command, study=self._token
        )
        trials = yield [job(number=number, seed=0) for number in entry.grid]
        best = choose(trials, self.task.target)
        if best["status"] == "failed":  # then all trials have failed, and other seeds would, too
            self._not_needed += 0 if unfit else self.seeds - 1
            return [best]
        number = best["setting"][entry.contestant.tuned]
        others = yield [job(number=number, seed=seed) for seed in range(1, self.seeds)]
        return [best, *others]

    def _one_after_another(self, listener: Listener) -> Iterator[tuple[Entry, list[Record]]]:
        for entry in self.entries:
            plan = self._plan(entry)
            jobs = next(plan)
            while True:
                records = [self._finished(job, listener) for job in jobs]
                try:
                    jobs = plan.send(records)
                except StopIteration as end:
                    yield entry, end.value
                    break

    def _finished(self, job: Job, listener: Listener) -> Record:
        """The record of a job, which is made if it is not there."""
        record = self.records.find(job.blank)
        if record is not None:
            listener(job, None)
            return record
        listener(job, 0.0)
        record = make(dataclasses.replace(job, task=self.task), functools.partial(listener, job))
        self.records.add(record)
        listener(job, 1.0)
        return record

    def _all_at_once(
        self, listener: Listener, executor: concurrent.futures.Executor
    ) -> Iterator[tuple[Entry, list[Record]]]:
        dispatcher = _Dispatcher(self.records, listener, executor)
        waiting = [_Waiting(entry, self._plan(entry)) for entry in self.entries]
        try:
            for each in waiting:  # all plans ask first, so that no worker is idle
                dispatcher.ask(each, next(each.plan))
            for each in waiting:
                if (records := dispatcher.advance(each)) is not None:
                    yield each.entry, records
            for each in dispatcher.collect():
                if (records := dispatcher.advance(each)) is not None:
                    yield each.entry, records
        finally:
            dispatcher.stop()

    def _check_budget(self) -> None:
        found = {run["work"] for run in self.records.runs if run["task"] == self.task.name}
        if other := found - {self.work}:
            raise RecordsError(
                f"{self.records.path} holds runs of {self.task.name} "
                f"with --work {other.pop() / self.task.work:g}, "
                f"not {self.work / self.task.work:g}; take another --out"
            )


# The jobs of many plans at once.


@dataclasses.dataclass(eq=False)
class _Waiting:
    """A plan that waits for records.

    Attributes:
        entry: the entry it is about.
        plan: the plan.
        records: those of the jobs that it yielded last; `None` where one is missing.
    """

    entry: Entry
    plan: Plan
    records: list[Record | None] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, eq=False)
class _Submitted:
    """A job that an executor has, and the place in a plan where its record goes."""

    job: Job
    owner: _Waiting
    place: int


class _Dispatcher:
    """Hands the jobs of plans to an executor, and their records back to the plans."""

    def __init__(self, records: Records, listener: Listener, executor: concurrent.futures.Executor):
        self._records, self._listener, self._executor = records, listener, executor
        self._submitted: dict[concurrent.futures.Future, _Submitted] = {}

    def ask(self, waiting: _Waiting, jobs: Sequence[Job]) -> None:
        """Find the records of these jobs; submit the jobs whose record is missing."""
        waiting.records = [None] * len(jobs)
        for place, job in enumerate(jobs):
            record = self._records.find(job.blank)
            if record is None:
                future = self._executor.submit(make, job)
                self._submitted[future] = _Submitted(job, waiting, place)
            else:
                waiting.records[place] = record
                self._listener(job, None)

    def advance(self, waiting: _Waiting) -> list[Record] | None:
        """Go on with a plan until it misses a record; its result where it is complete."""
        while None not in waiting.records:
            records = [record for record in waiting.records if record is not None]
            try:
                self.ask(waiting, waiting.plan.send(records))
            except StopIteration as end:
                return end.value
        return None

    def collect(self) -> Iterator[_Waiting]:
        """Wait for the jobs that were submitted; yields the plan of each job that has ended."""
        first = concurrent.futures.FIRST_COMPLETED
        while self._submitted:
            done, _ = concurrent.futures.wait(self._submitted, return_when=first)
            for future in done:
                submitted = self._submitted[future]
                record = _result(future, submitted.job)
                self._records.add(record)
                # From here on it is not for `stop` to keep.
                del self._submitted[future]
                submitted.owner.records[submitted.place] = record
                self._listener(submitted.job, 1.0)
                yield submitted.owner

    def stop(self) -> None:
        """Keep the runs that have ended, and cancel those that have not begun.

        There are such runs only where the study breaks off.
        """
        ended = [f for f in self._submitted if f.done() and not _is_broken(f)]
        if not isinstance(self._executor, loky.ProcessPoolExecutor):  # it trips over cancelled jobs
            for future in self._submitted:
                future.cancel()
        for future in ended:
            self._records.add(_result(future, self._submitted[future].job))


def _is_broken(future: concurrent.futures.Future) -> bool:
    return future.cancelled() or isinstance(future.exception(), concurrent.futures.BrokenExecutor)


def _result(future: concurrent.futures.Future, job: Job) -> Record:
    try:
        return future.result()
    except (concurrent.futures.BrokenExecutor, concurrent.futures.CancelledError):
        raise
    except Exception as error:  # the job did not travel to the worker, or the record not back
        return {**job.blank, "reason": in_one_line(error)}


# Before anything runs.


def check_entries(task: Task, entries: Sequence[Entry]) -> None:
    """Build every optimiser once, to tell of the options that its library refuses.

    Raises:
        UsageError: with the label of the entry, and the message of the library.
    """
    for entry in entries:
        if not entry.grid:
            raise UsageError(f"the contestant {entry.label!r} has no value in its grid")
        if reason_not_to(entry, task) is None:
            try:
                with task.precision():
                    entry.method(task, entry.grid[0])
            except (TypeError, ValueError) as error:
                raise UsageError(f"{entry.label}: {' '.join(str(error).split())}") from error
            except Exception:  # not about options: the runs will tell
                continue


def facts(task: Task) -> TaskFacts:
    """The properties of a task that a report needs."""
    known = task.name in TASKS
    return TaskFacts(
        name=task.name,
        summary=describe(task.name) if known else "",
        target=task.target,
        quality_name=task.quality.name,
        higher_is_better=task.quality.higher_is_better,
        solved=task.quality.solved,
        data="" if known else _fingerprint(task),
    )


def _fingerprint(task: Task) -> str:
    """Of the data and the shapes. A task with others is another task, even of the same name."""
    with task.precision():
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((task.train, task.held_out))]
        sizes = [leaf.shape for leaf in leaves]
        shapes = str((task.params_shapes(), sizes, task.batch_size))
    content = b"".join([shapes.encode(), *(leaf.tobytes() for leaf in leaves)])
    return f"{zlib.crc32(content):08x}"
