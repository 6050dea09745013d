"""Records to rows: the chosen setting of each contestant, and the numbers of its seeds."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gnlin.compare.runs.records import Record, TaskFacts
from gnlin.compare.runs.tuning import choose, final, finished, reached, tuned


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over the runs that have a value, `count` of `total`."""

    mean: float
    deviation: float
    count: int
    total: int

    @classmethod
    def over(cls, values: Sequence[float | None]) -> "Spread":
        known = [value for value in values if value is not None and math.isfinite(value)]
        mean = statistics.fmean(known) if known else math.nan
        deviation = statistics.stdev(known) if len(known) > 1 else math.nan
        return cls(mean, deviation, len(known), len(values))


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant with one set of options, as the table shows it."""

    task: str
    contestant: str
    label: str
    options: Mapping[str, Any]
    setting: Mapping[str, float]  # the chosen one
    at_edge: bool  # it is the first or last of the grid
    records: tuple[Record, ...]  # one for each seed, at that setting
    trials: tuple[Record, ...]  # on seed 0, one for each setting, by the tuned number
    loss: Spread
    quality: Spread  # of the model being trained
    network_quality: Spread  # of the network at the same parameters
    steps: Spread  # to the target
    cost: Spread  # to the target
    seconds: Spread  # to the target
    solved: int  # runs that end with a quality of the model being trained that counts as solved
    compile_seconds: float
    diverged: int
    failed: int
    reason: str  # why the first of them diverged or failed

    @property
    def chosen(self) -> Mapping[str, float]:
        """The tuned number; nothing where the user fixed it, or where no run could be made."""
        is_fixed = self.options.keys() >= self.setting.keys()
        return {} if is_fixed or self.failed == len(self.records) else self.setting


@dataclasses.dataclass(frozen=True)
class Incomplete:
    """A group of runs that is not tuned yet."""

    task: str
    contestant: str
    label: str
    options: Mapping[str, Any]
    missing: tuple[float, ...]  # values of the grid without a trial on seed 0


def summarise(records: Sequence[Record], tasks: Mapping[str, TaskFacts]) -> list[Row]:
    """One row for each group of runs with the same task, contestant and options.

    A group whose trials are not complete has no row. Seeds that are not there yet are left out. A
    run that was made again replaces the earlier one.

    Args:
        records: runs of any number of tasks.
        tasks: the facts of these tasks, by name.

    Returns:
        Rows in the order in which their groups appear.
    """
    return [
        _row(group, tasks[group[0]["task"]]) for group in _groups(records) if not _missing(group)
    ]


def incomplete(records: Sequence[Record]) -> list[Incomplete]:
    """The groups that `summarise` leaves out."""
    found = []
    for group in _groups(records):
        if missing := _missing(group):
            first = group[0]
            names = first["task"], first["contestant"], first["label"]
            found.append(Incomplete(*names, first["options"], missing))
    return found


def options_key(options: Mapping[str, Any]) -> tuple:
    """Equal for equal options, whatever their order; 1 and 1.0 are equal."""
    items = []
    for name in sorted(options):
        value = options[name]
        items.append((name, value if isinstance(value, int | float | str | None) else repr(value)))
    return tuple(items)


def _groups(records: Sequence[Record]) -> list[list[Record]]:
    """Runs with the same task, contestant and options."""
    groups: dict[tuple, dict[tuple, Record]] = {}
    for record in records:
        key = record["task"], record["contestant"], options_key(record["options"])
        run = options_key(record["setting"]), record["seed"]
        groups.setdefault(key, {})[run] = record
    return [list(group.values()) for group in groups.values()]


def _missing(group: Sequence[Record]) -> tuple[float, ...]:
    """Values of the grid that have no trial."""
    tried = {tuned(record)[1] for record in group if record["seed"] == 0}
    if not tried:
        return tuple(group[0]["grid"]) or (math.nan,)
    return tuple(value for value in group[-1]["grid"] if value not in tried)


def _row(group: Sequence[Record], task: TaskFacts) -> Row:
    newest = group[-1]["grid"]  # other values of an older grid take no part
    trials = [r for r in group if r["seed"] == 0 and (tuned(r)[1] in newest or not newest)]
    trials.sort(key=lambda record: tuned(record)[1])
    chosen = choose(trials, task.target)
    records = [record for record in group if record["setting"] == chosen["setting"]]
    records.sort(key=lambda record: record["seed"])

    def at_end(name: str) -> Spread:
        return Spread.over([final(record, name) for record in records])

    def at_target(name: str) -> Spread:
        values = []
        for record in records:
            index = reached(record, task.target)
            values.append(None if index is None else record["curve"][name][index])
        return Spread.over(values)

    def count(status: str) -> int:
        return sum(record["status"] == status for record in records)

    compiling = [r["compile_seconds"] for r in group if math.isfinite(r["compile_seconds"])]
    reasons = [r["reason"] for r in records if r["reason"] and not finished(r)]
    return Row(
        task=task.name,
        contestant=chosen["contestant"],
        label=chosen["label"],
        options=chosen["options"],
        setting=chosen["setting"],
        at_edge=_at_edge(chosen, trials),
        records=tuple(records),
        trials=tuple(trials),
        loss=at_end("loss"),
        quality=at_end("quality"),
        network_quality=at_end("network_quality"),
        steps=at_target("step"),
        cost=at_target("cost"),
        seconds=at_target("seconds"),
        solved=sum(task.is_solved(final(record, "quality")) for record in records),
        # Runs of a group may share one compilation, which the first of them then pays for.
        compile_seconds=max(compiling, default=math.nan),
        diverged=count("diverged"),
        failed=count("failed"),
        reason=reasons[0] if reasons else "",
    )


def _at_edge(chosen: Record, trials: Sequence[Record]) -> bool:
    """Whether the best trial is the first or last, and better than the one beside it."""
    if not finished(chosen) or len(trials) == 1:
        return False
    if chosen is trials[0]:
        beside = trials[1]
    elif chosen is trials[-1]:
        beside = trials[-2]
    else:
        return False
    return beside["curve"]["loss"] != chosen["curve"]["loss"]
