"""One run that is to be made, here or by a worker.

A job must share memory with its worker, or pickle as cloudpickle does: options hold functions. A
worker compiles a program once and keeps it for the other jobs that need it.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import platform
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import loky

import gnlin
from gnlin.compare.entrants.contestants import CONTESTANTS
from gnlin.compare.entrants.entry import Entry
from gnlin.compare.runs.cost import gradient_flops
from gnlin.compare.runs.records import CURVES, SCHEMA, Record
from gnlin.compare.runs.trial import Program
from gnlin.compare.tasks import TASKS
from gnlin.compare.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Job:
    """One run that is to be made.

    Attributes:
        task: the task, or the name of one of the package, by which it travels between processes.
        entry: the optimiser.
        number: value of the tuned number.
        seed: seed of parameters, batches and keys.
        work: budget in gradient-equivalents.
        command: a note for the record.
        study: tells apart the studies that bring tasks or contestants of their own.
    """

    task: str | Task
    entry: Entry
    number: float
    seed: int
    work: float
    command: str
    study: str = ""

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


def make(job: Job, on_progress: Callable[[float], None] = lambda fraction: None) -> Record:
    """Make a run. An error in it becomes the record's reason."""
    record = job.blank
    try:
        task = _load(job.task) if isinstance(job.task, str) else job.task
        if reason := reason_not_to(job.entry, task):
            return {**record, "reason": reason}
        with task.precision():
            program = _program(_key(job, task))
            return {**record, **program.run(job.number, job.seed, on_progress)}
    except Exception as error:  # a contestant may fail in any way; the others go on
        return {**record, "reason": in_one_line(error)}


def reason_not_to(entry: Entry, task: Task) -> str | None:
    """Why the entry cannot run here or on the task, if it cannot."""
    size = entry.options.get("batch")
    if isinstance(size, int) and (task.batch_size is None or size > task.train_size):
        return f"task {task.name!r} has no batches of {size}; leave out batch={size}"
    try:
        with task.precision():
            return entry.contestant.reason_absent() or entry.contestant.reason_unfit(task)
    except Exception as error:  # a mistake of the contestant's author is a reason, too
        return in_one_line(error)


# The environment of a run.


def environment() -> dict[str, Any]:
    """Versions and machine, which a record needs to be compared with others."""
    return {
        "gnlin": gnlin.__version__,
        "python": platform.python_version(),
        **_versions(),
        "platform": f"{sys.platform}-{platform.machine()}",
        "device": jax.devices()[0].device_kind,
        "cpus": loky.cpu_count(),
    }


_LIBRARIES = ("jax", "jaxlib", "numpy", "optax")
_PEERS = ("jaxopt", "optimistix", "lineax", "python-somax", "kfac-jax")


@functools.cache
def _versions() -> dict[str, str]:
    """Those of the libraries that are installed."""
    installed = {}
    for name in (*_LIBRARIES, *_PEERS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


# Compiled programs.


@dataclasses.dataclass(frozen=True)
class _Key:
    """The key of a compiled program: names, and the objects that they stand for.

    Only the names are compared. A task or a contestant from outside has its study in its name.
    """

    task_name: str
    contestant: str
    options: str
    work: float
    task: Task = dataclasses.field(compare=False)
    entry: Entry = dataclasses.field(compare=False)


def _key(job: Job, task: Task) -> _Key:
    contestant = job.entry.contestant
    known = CONTESTANTS.get(contestant.name)
    is_known = known is not None and known.build is contestant.build
    return _Key(
        task_name=job.task if isinstance(job.task, str) else f"{job.study} {task.name}",
        contestant=contestant.name if is_known else f"{job.study} {contestant.name}",
        options=repr(sorted(job.entry.options.items())),
        work=job.work,
        task=task,
        entry=job.entry,
    )


@functools.lru_cache(maxsize=8)  # a worker is handed the runs of several entries in turn
def _program(key: _Key) -> Program:
    # The task does not depend on the entry: programs of several entries share it.
    task, unit = _on_device(dataclasses.replace(key, contestant="", options=""))
    return Program(task, key.entry, key.work, unit)


@functools.lru_cache(maxsize=2)
def _on_device(key: _Key) -> tuple[Task, float]:
    """The task with its data on the device, and the FLOPs of its unit of work."""
    train, held_out = jax.tree.map(jnp.asarray, (key.task.train, key.task.held_out))
    return dataclasses.replace(key.task, train=train, held_out=held_out), gradient_flops(key.task)


@functools.lru_cache(maxsize=1)
def _load(name: str) -> Task:
    return TASKS[name]()


# Errors as reasons.


def in_one_line(error: Exception) -> str:
    """The error, and its place where that is outside this package and all installed ones."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if _is_outside(frame.filename)]
    return f"{text} ({outside[-1].filename}, line {outside[-1].lineno})" if outside else text


def _is_outside(file: str) -> bool:
    installed = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    return not file.startswith(("<", str(Path(gnlin.__file__).parent), *installed))
