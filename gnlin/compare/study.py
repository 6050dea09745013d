"""Which runs a comparison consists of, which of them are done, and where they are kept."""

import dataclasses
import functools
import json
import math
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

import gnlin
from gnlin.compare.contestants import Contestant, Setting
from gnlin.compare.cost import gradient_flops
from gnlin.compare.run import Program, Record, steps_of
from gnlin.compare.summary import choose
from gnlin.compare.tasks import Task

RECORDS = "records.jsonl"

# Told as a run goes on: contestant, setting, seed, and runs done in all, the fraction of this one included.
Listener = Callable[[Contestant, Setting, int, float], None]


class Records:
    """The finished runs of one directory, a JSON object on each line of ``records.jsonl``.

    A run is written as soon as it ends, so an interrupted study loses the run in progress and no other. A line that was
    cut short by a crash is passed over, and its run is done again.
    """

    def __init__(self, directory: Path):
        self.path = directory / RECORDS
        directory.mkdir(parents=True, exist_ok=True)
        self.path.touch()  # what shows, from the first second on, that a study can be resumed here
        self.finished: list[Record] = list(_read(self.path))

    def find(self, task: Task, contestant: Contestant, setting: Setting, seed: int) -> Record | None:
        """The finished run of these, if it took as many steps as it would take now."""
        wanted = (task.name, contestant.name, dict(setting), seed, steps_of(task, contestant))
        for record in self.finished:
            if tuple(record[key] for key in ("task", "contestant", "setting", "seed", "steps")) == wanted:
                return record
        return None

    def add(self, record: Record) -> None:
        """Keep a run, on disk before anything else happens."""
        line = json.dumps(_without_nan({**record, **environment()}), allow_nan=False)
        cut_short = not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut_short else "") + line + "\n")
            file.flush()
        self.finished.append(record)


@dataclasses.dataclass
class Study:
    """All runs of one comparison.

    Attributes:
        task: what is trained.
        contestants: who takes part.
        seeds: number of seeds, from 0 on.
        records: the finished runs; those are not repeated.
        listener: hears of progress.
        completed: runs done so far.
    """

    task: Task
    contestants: Sequence[Contestant]
    seeds: int
    records: Records
    listener: Listener = lambda *_: None
    completed: int = 0

    @property
    def total(self) -> int:
        """Number of runs that are made or found."""
        return sum(len(contestant.grid) + self.seeds - 1 for contestant in self.contestants)

    def carry_out(self) -> Iterator[tuple[Contestant, list[Record]]]:
        """Tune each contestant on seed 0, run the chosen setting on the other seeds, and yield it when it is complete.

        The trial of the chosen setting is its run on seed 0. A contestant that has all its runs is not compiled.
        """
        unit_flops = functools.cache(lambda: gradient_flops(self.task))
        for contestant in self.contestants:
            program = functools.cache(functools.partial(_compile, self.task, contestant, unit_flops))
            trials = [self._finish(contestant, program, setting, 0) for setting in contestant.grid]
            best = choose(trials, self.task.target)
            others = [self._finish(contestant, program, best["setting"], seed) for seed in range(1, self.seeds)]
            yield contestant, [best, *others]

    def _finish(self, contestant: Contestant, program: Callable[[], Program], setting: Setting, seed: int) -> Record:
        def report(fraction: float) -> None:
            self.listener(contestant, setting, seed, self.completed + fraction)

        report(0.0)
        record = self.records.find(self.task, contestant, setting, seed)
        if record is None:
            record = program().run(setting, seed, report)
            self.records.add(record)
        self.completed += 1
        return record


def _compile(task: Task, contestant: Contestant, unit_flops: Callable[[], float]) -> Program:
    return Program(task, contestant, unit_flops())


def environment() -> dict[str, Any]:
    """What a record must say to be compared with another machine's."""
    return {
        "gnlin": gnlin.__version__,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform}-{platform.machine()}",
        "device": jax.devices()[0].device_kind,
    }


def _read(path: Path) -> Iterator[Record]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        for name in ("loss", "accuracy"):
            record["curve"][name] = [math.nan if value is None else value for value in record["curve"][name]]
        yield record


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
