"""Which runs a comparison consists of, in what order, and by whom they are made.

Each entry is tuned on seed 0, and the chosen setting then runs on the other seeds: a plan that asks
for jobs, is handed their records and asks for more. One process carries out the plans one after
another; an executor has the jobs of all plans at once. Any `concurrent.futures.Executor` will do,
of local processes or of a cluster, that shares memory or pickles as cloudpickle does: options hold
functions.
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import platform
import sys
import sysconfig
import traceback
import uuid
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import loky
import numpy as np

import gnlin
from gnlin.compare.entrants.contestants import CONTESTANTS
from gnlin.compare.entrants.entry import Entry, UsageError
from gnlin.compare.report.summary import TaskFacts, choose
from gnlin.compare.runs.cost import gradient_flops
from gnlin.compare.runs.records import CURVES, SCHEMA, Record, Records, RecordsError
from gnlin.compare.runs.trial import Program
from gnlin.compare.tasks import TASKS, describe
from gnlin.compare.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Job:
    """One run that is to be made. A task of the package travels between processes as its name."""

    task: str | Task
    entry: Entry
    number: float
    seed: int
    work: float
    command: str
    study: str = ""  # tells the studies apart that bring tasks or contestants of their own

    @property
    def blank(self) -> Record:
        """The record of the run before anything is known of it."""
        entry = self.entry
        return {
            "schema": SCHEMA,
            "task": self.task if isinstance(self.task, str) else self.task.name,
            "contestant": entry.contestant.name,
            "label": entry.label,
            "about": entry.contestant.summary,
            "options": dict(entry.options),
            "setting": {entry.contestant.tuned: self.number},
            "grid": list(entry.grid),
            "seed": self.seed,
            "status": "failed",
            "reason": "",
            "work": self.work,
            "steps": 0,
            "seconds": 0.0,
            "compile_seconds": 0.0,
            "cost_per_step": 0.0,
            "curve": {name: [] for name in CURVES},
            "environment": environment(),
            "command": self.command,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


# Told as runs go on and end: the job, and the fraction of it that is done; `None` of one that was
# there already.
Listener = Callable[[Job, float | None], None]


@dataclasses.dataclass
class Study:
    """All runs of one comparison.

    Attributes:
        task: what is trained.
        entries: who takes part.
        seeds: number of seeds, from 0 on.
        records: the runs made so far; those are not repeated.
        work: budget of a run in gradient-equivalents.
        command: what to note in the records.
        by_name: whether workers may load the task by its name; otherwise it travels to them whole.
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
    _not_needed: int = dataclasses.field(
        default=0, init=False, repr=False
    )  # other seeds of what failed

    @property
    def total(self) -> int:
        """Number of runs that are made or found, as far as is known."""
        return self._planned - self._not_needed

    @functools.cached_property
    def _planned(self) -> int:
        return sum(
            1 if _reason_not_to(entry, self.task) else len(entry.grid) + self.seeds - 1
            for entry in self.entries
        )

    def carry_out(
        self,
        listener: Listener = lambda job, done: None,
        executor: concurrent.futures.Executor | None = None,
    ) -> Iterator[tuple[Entry, list[Record]]]:
        """Make all runs that are missing; yields each entry, and its runs at the chosen setting,
        when it is complete.

        A run that fails is a record with its reason and not an exception. With an `executor` its
        workers make the runs, and the records are still written here.
        """
        self._check_budget()
        if executor is None:
            yield from self._one_after_another(listener)
            return
        try:
            yield from self._all_at_once(listener, executor)
        except (concurrent.futures.BrokenExecutor, concurrent.futures.CancelledError):
            raise RecordsError(
                "a worker process died, perhaps for want of memory; what is finished is kept: "
                "run the same command again, with fewer workers"
            ) from None

    def _plan(self, entry: Entry) -> Generator[list[Job], list[Record], list[Record]]:
        if unfit := _reason_not_to(entry, self.task):
            entry = dataclasses.replace(entry, grid=entry.grid[:1])  # one record tells the reason
        task = self.task.name if self.by_name else self.task
        job = functools.partial(
            Job, task, entry, work=self.work, command=self.command, study=self._token
        )
        trials = yield [job(number=number, seed=0) for number in entry.grid]
        best = choose(trials, self.task.target)
        if best["status"] == "failed":
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
                try:
                    jobs = plan.send([self._finished(job, listener) for job in jobs])
                except StopIteration as end:
                    yield entry, end.value
                    break

    def _finished(self, job: Job, listener: Listener) -> Record:
        record = self.records.find(job.blank)
        if record is not None:
            listener(job, None)
            return record
        listener(job, 0.0)
        record = make(dataclasses.replace(job, task=self.task), functools.partial(listener, job))
        self.records.add(record)
        listener(job, 1.0)
        return record

    def _all_at_once(self, listener: Listener, executor) -> Iterator[tuple[Entry, list[Record]]]:
        waiting: dict[concurrent.futures.Future, tuple[Any, Job, int]] = {}
        state: dict[int, list[Record | None]] = {}
        plans = [(number, entry, self._plan(entry)) for number, entry in enumerate(self.entries)]

        def ask(plan, jobs):
            """Submit what is missing of `jobs`; whether all of it was there."""
            state[plan[0]] = [None] * len(jobs)
            for place, job in enumerate(jobs):
                record = self.records.find(job.blank)
                if record is None:
                    waiting[executor.submit(make, job)] = (plan, job, place)
                else:
                    state[plan[0]][place] = record
                    listener(job, None)

        def advance(plan) -> list[Record] | None:
            """Ask on as long as nothing is missing; the records of a plan that is complete."""
            while all(record is not None for record in state[plan[0]]):
                try:
                    ask(plan, plan[2].send(state[plan[0]]))
                except StopIteration as end:
                    return end.value
            return None

        try:
            for plan in plans:
                ask(plan, next(plan[2]))
            for plan in plans:
                if (records := advance(plan)) is not None:
                    yield plan[1], records
            while waiting:
                done, _ = concurrent.futures.wait(
                    waiting, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    plan, job, place = waiting[future]
                    record = _result(future, job)
                    self.records.add(record)
                    del waiting[future]
                    state[plan[0]][place] = record
                    listener(job, 1.0)
                    if (records := advance(plan)) is not None:
                        yield plan[1], records
        finally:  # also of what breaks off: what has ended is kept, and what has not begun is not
            ended = [future for future in waiting if future.done() and not _broken(future)]
            if not isinstance(
                executor, loky.ProcessPoolExecutor
            ):  # that one trips over what is cancelled
                for future in waiting:
                    future.cancel()
            for future in ended:
                self.records.add(_result(future, waiting[future][1]))

    def _check_budget(self) -> None:
        other = {run["work"] for run in self.records.runs if run["task"] == self.task.name} - {
            self.work
        }
        if other:
            raise RecordsError(
                f"{self.records.path} holds runs of {self.task.name} with --work {other.pop() / self.task.work:g}, "
                f"not {self.work / self.task.work:g}; take another --out"
            )


def make(job: Job, on_progress: Callable[[float], None] = lambda fraction: None) -> Record:
    """Make a run; whatever goes wrong in it is the record's reason."""
    record = job.blank
    try:
        task = _load(job.task) if isinstance(job.task, str) else job.task
        if reason := _reason_not_to(job.entry, task):
            return {**record, "reason": reason}
        with task.precision():
            return {**record, **_program(_key(job, task)).run(job.number, job.seed, on_progress)}
    except Exception as error:  # a contestant may fail in any way; the others go on
        return {**record, "reason": _one_line(error)}


def _reason_not_to(entry: Entry, task: Task) -> str | None:
    """Why the entry cannot run here or on the task, if it cannot."""
    size = entry.options.get("batch")
    if isinstance(size, int) and (task.batch_size is None or size > task.train_size):
        return f"task {task.name!r} has no batches of {size}; leave out batch={size}"
    try:
        with task.precision():
            return entry.contestant.reason_absent() or entry.contestant.reason_unfit(task)
    except Exception as error:  # its author's mistake is a reason, too
        return _one_line(error)


def check_entries(task: Task, entries: Sequence[Entry]) -> None:
    """Build every optimiser once, so that options which its library refuses are told before
    anything runs.

    Raises:
        UsageError: with the label of the entry, and what the library says.
    """
    for entry in entries:
        if not entry.grid:
            raise UsageError(f"the contestant {entry.label!r} has no value in its grid")
        if _reason_not_to(entry, task) is None:
            try:
                with task.precision():
                    entry.method(task, entry.grid[0])
            except (TypeError, ValueError) as error:
                raise UsageError(f"{entry.label}: {' '.join(str(error).split())}") from error
            except Exception:  # nothing that was said: its runs will tell
                continue


def facts(task: Task) -> TaskFacts:
    """What the report says of a task."""
    quality = task.quality
    known = task.name in TASKS
    summary, data = (describe(task.name), "") if known else ("", _fingerprint(task))
    return TaskFacts(
        task.name,
        summary,
        task.target,
        quality.name,
        quality.higher_is_better,
        quality.solved,
        data,
    )


def _fingerprint(task: Task) -> str:
    """Of the data and the shapes: other ones are another task, whatever its name."""
    with task.precision():
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((task.train, task.held_out))]
        shapes = str(
            (
                jax.eval_shape(task.init, jax.random.key(0)),
                [leaf.shape for leaf in leaves],
                task.batch_size,
            )
        )
    return f"{zlib.crc32(b''.join([shapes.encode(), *(leaf.tobytes() for leaf in leaves)])):08x}"


def environment() -> dict[str, Any]:
    """What a record must say to be compared with another machine's."""
    return {
        "gnlin": gnlin.__version__,
        "python": platform.python_version(),
        **_versions(),
        "platform": f"{sys.platform}-{platform.machine()}",
        "device": jax.devices()[0].device_kind,
        "cpus": loky.cpu_count(),
    }


@functools.cache
def _versions() -> dict[str, str]:
    """Of what computes, and of the peers that are installed."""
    installed = {}
    for name in (
        "jax",
        "jaxlib",
        "numpy",
        "optax",
        "jaxopt",
        "optimistix",
        "lineax",
        "python-somax",
        "kfac-jax",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """What a compiled program is kept under: names, those from outside with their study, and what they stand for."""

    task_name: str
    contestant: str
    options: str
    work: float
    task: Task = dataclasses.field(compare=False)
    entry: Entry = dataclasses.field(compare=False)


def _key(job: Job, task: Task) -> _Compiled:
    contestant = job.entry.contestant
    known = CONTESTANTS.get(contestant.name)
    return _Compiled(
        task_name=job.task if isinstance(job.task, str) else f"{job.study} {task.name}",
        contestant=contestant.name
        if known and known.build is contestant.build
        else f"{job.study} {contestant.name}",
        options=repr(sorted(job.entry.options.items())),
        work=job.work,
        task=task,
        entry=job.entry,
    )


@functools.lru_cache(maxsize=8)  # a worker is handed the runs of several entries in turn
def _program(key: _Compiled) -> Program:
    task, unit = _measured(dataclasses.replace(key, contestant="", options=""))
    return Program(task, key.entry, key.work, unit)


@functools.lru_cache(maxsize=2)
def _measured(key: _Compiled) -> tuple[Task, float]:
    """The task with its data on the device, once for all programs, and the FLOPs of its unit of work."""
    train, held_out = jax.tree.map(jnp.asarray, (key.task.train, key.task.held_out))
    return dataclasses.replace(key.task, train=train, held_out=held_out), gradient_flops(key.task)


@functools.lru_cache(maxsize=1)
def _load(name: str) -> Task:
    return TASKS[name]()


def _broken(future: concurrent.futures.Future) -> bool:
    return future.cancelled() or isinstance(future.exception(), concurrent.futures.BrokenExecutor)


def _result(future: concurrent.futures.Future, job: Job) -> Record:
    try:
        return future.result()
    except (concurrent.futures.BrokenExecutor, concurrent.futures.CancelledError):
        raise
    except Exception as error:  # what did not travel to the worker, or back
        return {**job.blank, "reason": _one_line(error)}


def _one_line(error: Exception) -> str:
    """What went wrong; also where, in code that is neither this package's nor an installed one."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    outside = [
        frame for frame in traceback.extract_tb(error.__traceback__) if _is_outside(frame.filename)
    ]
    return f"{text} ({outside[-1].filename}, line {outside[-1].lineno})" if outside else text


def _is_outside(file: str) -> bool:
    installed = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    return not file.startswith(("<", str(Path(gnlin.__file__).parent), *installed))
