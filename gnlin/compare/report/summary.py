"""Records to numbers: which setting is chosen, what its seeds say, and what a sweep of an option shows."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# One run, as a line of ``records.jsonl`` gives it; null is NaN in its curve.
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TaskFacts:
    """What a report needs to know of a task.

    Attributes:
        name: what the records call it.
        summary: a sentence or two on what is trained.
        target: training loss that steps and work are counted to.
        quality_name: what the held-out data is asked, with its unit: ``accuracy, %``.
        higher_is_better: whether more of it is better.
        solved: value of it from which the task counts as solved.
        data: fingerprint of a task from outside; empty for those of the package.
    """

    name: str
    summary: str
    target: float
    quality_name: str
    higher_is_better: bool
    solved: float
    data: str = ""

    def is_solved(self, value: float) -> bool:
        return value >= self.solved if self.higher_is_better else value <= self.solved


def finished(record: Record) -> bool:
    return record["status"] == "finished"


def final(record: Record, name: str) -> float:
    """The last value of a curve, or a metric of the last state; NaN for a run that diverged or failed."""
    values = record["curve"].get(name, [record.get("metrics", {}).get(name, math.nan)])
    return values[-1] if finished(record) and values else math.nan


def tuned(record: Record) -> tuple[str, float]:
    """Name and value of the run's tuned number; ``("", nan)`` where nothing is tuned."""
    return next(iter(record["setting"].items()), ("", math.nan))


# The rules.


def reached(record: Record, target: float) -> int | None:
    """Index in the curve from which the loss stays at or below `target` until the run ends; `None`
    where it does not.

    A first touch would do for full-batch descent. It says little of a loss that jumps up again, as
    it does when an anchor moves. A run that diverges or fails has reached nothing.
    """
    losses = record["curve"]["loss"] if finished(record) else []
    index = len(losses)
    while index > 0 and losses[index - 1] <= target:  # false for NaN
        index -= 1
    return index if index < len(losses) else None


def choose(trials: Sequence[Record], target: float) -> Record:
    """The best of `trials`, one for each setting, all on one seed.

    The fewest gradient-equivalents to reach the target (for good, see `reached`); where no setting
    reaches it, the lowest final training loss, which also breaks ties. Runs that diverged or failed
    come last. One rule for every contestant; held-out data takes no part.
    """

    def badness(record: Record) -> tuple[float, float, bool]:
        index = reached(record, target)
        loss = final(record, "loss")
        cost = math.inf if index is None else record["curve"]["cost"][index]
        return cost, loss if math.isfinite(loss) else math.inf, record["status"] == "failed"

    return min(trials, key=badness)


# Rows of the table.


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
    """What the table says of one contestant with one set of options."""

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
    solved: int  # runs whose model being trained ends with a quality that counts as solved
    compile_seconds: float
    diverged: int
    failed: int
    reason: str  # why the first of them diverged or failed

    @property
    def chosen(self) -> Mapping[str, float]:
        """What was tuned; nothing where the number was said, or where no run could be made."""
        return (
            {}
            if self.failed == len(self.records) or self.options.keys() >= self.setting.keys()
            else self.setting
        )


@dataclasses.dataclass(frozen=True)
class Incomplete:
    """A group of runs that is not tuned yet."""

    task: str
    contestant: str
    label: str
    options: Mapping[str, Any]
    missing: tuple[float, ...]  # values of the grid without a trial on seed 0


def summarise(records: Sequence[Record], tasks: Mapping[str, TaskFacts]) -> list[Row]:
    """One row for each group (task, contestant, options) whose trials are complete, in order of
    appearance.

    Seeds that are not there yet are left out. Of a run that was done twice the later record counts.
    """
    return [
        _row(group, tasks[group[0]["task"]]) for group in _groups(records) if not _missing(group)
    ]


def incomplete(records: Sequence[Record]) -> list[Incomplete]:
    """The groups that `summarise` leaves out."""
    return [
        Incomplete(first["task"], first["contestant"], first["label"], first["options"], missing)
        for group in _groups(records)
        if (missing := _missing(group)) and (first := group[0])
    ]


def _groups(records: Sequence[Record]) -> list[list[Record]]:
    groups: dict[tuple, dict[tuple, Record]] = {}
    for record in records:
        group = groups.setdefault(
            (record["task"], record["contestant"], _key(record["options"])), {}
        )
        group[_key(record["setting"]), record["seed"]] = record
    return [list(group.values()) for group in groups.values()]


def _key(options: Mapping[str, Any]) -> tuple:
    """Equal for equal options, whatever their order; 1 and 1.0 are equal."""
    hashable = (int, float, str, type(None))
    return tuple(
        (name, v if isinstance(v := options[name], hashable) else repr(v))
        for name in sorted(options)
    )


def _missing(group: Sequence[Record]) -> tuple[float, ...]:
    tried = {tuned(record)[1] for record in group if record["seed"] == 0}
    if not tried:
        return tuple(group[0]["grid"]) or (math.nan,)
    return tuple(value for value in group[-1]["grid"] if value not in tried)


def _row(group: Sequence[Record], task: TaskFacts) -> Row:
    newest = group[-1]["grid"]  # other values of an older grid take no part
    trials = [r for r in group if r["seed"] == 0 and (tuned(r)[1] in newest or not newest)]
    trials.sort(key=lambda record: tuned(record)[1])
    chosen = choose(trials, task.target)
    records = sorted(
        (r for r in group if r["setting"] == chosen["setting"]), key=lambda record: record["seed"]
    )
    unfinished = [record for record in records if not finished(record)]

    def over(name: str) -> Spread:
        return Spread.over([final(record, name) for record in records])

    def at_target(name: str) -> Spread:
        indices = [reached(record, task.target) for record in records]
        pairs = zip(records, indices, strict=True)
        return Spread.over(
            [None if index is None else record["curve"][name][index] for record, index in pairs]
        )

    return Row(
        task=task.name,
        contestant=chosen["contestant"],
        label=chosen["label"],
        options=chosen["options"],
        setting=chosen["setting"],
        at_edge=_at_edge(chosen, trials),
        records=tuple(records),
        trials=tuple(trials),
        loss=over("loss"),
        quality=over("quality"),
        network_quality=over("network_quality"),
        steps=at_target("step"),
        cost=at_target("cost"),
        seconds=at_target("seconds"),
        solved=sum(task.is_solved(final(record, "quality")) for record in records),
        # Runs of a group may share one compilation, which the first of them then pays for.
        compile_seconds=max(
            (s for r in group if math.isfinite(s := r["compile_seconds"])), default=math.nan
        ),
        diverged=sum(record["status"] == "diverged" for record in records),
        failed=sum(record["status"] == "failed" for record in records),
        reason=next((record["reason"] for record in unfinished if record["reason"]), ""),
    )


def _at_edge(chosen: Record, trials: Sequence[Record]) -> bool:
    """Whether the best trial is the first or last, and better than the one beside it."""
    if not finished(chosen) or len(trials) == 1:
        return False
    beside = trials[1] if chosen is trials[0] else trials[-2] if chosen is trials[-1] else chosen
    return beside["curve"]["loss"] != chosen["curve"]["loss"]


# Curves and sweeps.


@dataclasses.dataclass(frozen=True)
class Band:
    """Median and range over runs, all arrays of one length."""

    across: np.ndarray
    low: np.ndarray
    median: np.ndarray
    high: np.ndarray


def band(
    records: Sequence[Record], against: str, name: str, worst: float, points: int
) -> Band | None:
    """Median and range of the curves `name` of several runs, each interpolated linearly to the same
    places.

    The places are evaluations of the run with the median end, at most `points` of them, evenly on a
    logarithmic axis. After a run has diverged or failed it counts as `worst`; one that has finished
    keeps its last value. `None` where nothing was recorded.
    """
    curves = [record["curve"] for record in records]
    ends = sorted(
        (curve[against][-1], number) for number, curve in enumerate(curves) if curve["step"]
    )
    if not ends:
        return None
    across = np.asarray(curves[ends[len(ends) // 2][1]][against], float)
    across = across[across > 0]
    if not len(across):
        return None
    across = across[np.unique(np.geomspace(1, len(across), points).astype(int)) - 1]
    values = []
    for record, curve in zip(records, curves, strict=True):
        known = np.isfinite(np.asarray(curve[name], float))
        length = len(known) if known.all() else int(np.argmin(known))
        if length == 0:
            values.append(np.full_like(across, worst))
            continue
        places = np.asarray(curve[against][:length], float)
        value = np.interp(across, places, curve[name][:length])
        if length < len(known) or not finished(record):
            value[across > places[-1]] = worst
        values.append(value)
    stack = np.stack(values)
    return Band(across, stack.min(axis=0), np.median(stack, axis=0), stack.max(axis=0))


@dataclasses.dataclass(frozen=True)
class Point:
    """Runs at one value of a number; ``math.inf`` stands for never."""

    value: float
    setting: Mapping[str, float]
    records: tuple[Record, ...]

    def finals(self, name: str) -> list[float]:
        """Last values of the runs that finished."""
        return [value for record in self.records if math.isfinite(value := final(record, name))]


@dataclasses.dataclass(frozen=True)
class Line:
    """A contestant along one number, its other options fixed."""

    label: str
    options: Mapping[str, Any]  # all but the number
    points: tuple[Point, ...]  # by value


def sweeps(rows: Sequence[Row], option: str, least: int = 3) -> list[Line]:
    """One line for each contestant, and each choice of its other options, that has `least` values
    of `option` or more.

    A ``period`` of `None` is ``math.inf``; other values that are no numbers are left out.
    """
    families: dict[tuple, list[tuple[float, Row]]] = {}
    for row in rows:
        value = (
            math.inf
            if option == "period" and row.options.get(option, 0) is None
            else row.options.get(option)
        )
        if isinstance(value, int | float) and not isinstance(value, bool):
            families.setdefault((row.contestant, _key(_without(row.options, option))), []).append(
                (float(value), row)
            )
    lines = []
    for family in families.values():
        if len(family) >= least:
            first = family[0][1]
            points = sorted(
                (Point(v, row.setting, row.records) for v, row in family),
                key=lambda point: point.value,
            )
            lines.append(
                Line(
                    _label_without(first.label, option),
                    _without(first.options, option),
                    tuple(points),
                )
            )
    return lines


def swept(rows: Sequence[Row]) -> list[str]:
    """Options of which some contestant has enough values for a line."""
    return [
        option
        for option in dict.fromkeys(name for row in rows for name in row.options)
        if sweeps(rows, option)
    ]


def moving_metrics(lines: Sequence[Line]) -> list[str]:
    """Metrics of the last state that are not the same all along each of the lines; ages but say when the run ended."""
    ways = [
        [record for point in line.points for record in point.records if finished(record)]
        for line in lines
    ]
    names = dict.fromkeys(
        name for records in ways for record in records for name in record.get("metrics", {})
    )
    return [
        name
        for name in names
        if not name.endswith("/age")
        and any(
            len({value for r in records if math.isfinite(value := final(r, name))}) > 1
            for records in ways
        )
    ]


def tuning_line(row: Row) -> Line:
    """The trials on seed 0 along the tuned number."""
    points = (Point(tuned(trial)[1], trial["setting"], (trial,)) for trial in row.trials)
    return Line(row.label, row.options, tuple(points))


def damping_lines(rows: Sequence[Row]) -> list[Line]:
    """Lines along a λ that is constant: sweeps of an option ``damping``, and the trials of
    contestants that tune it.

    A λ that is only the first or the last of a run has no place among them.
    """
    rows = [row for row in rows if row.options.get("control") == "constant"]
    by_trials = [
        tuning_line(row) for row in rows if "damping" in row.setting and len(row.trials) >= 3
    ]
    return sweeps(rows, "damping") + by_trials


def as_damping(line: Line) -> Line | None:
    """A line along K put at λ = 1/(ηK), in the order of K; η is the learning rate chosen at that K,
    over 1 − momentum.

    `None` for inner optimisers other than gradient descent, whose steps have no such λ. Never (K =
    ∞, λ = 0) is left out, for an axis of λ is logarithmic.
    """
    if line.options.get("inner") != "sgd":
        return None
    points = []
    for point in line.points:
        rate, rest = (
            {**line.options, **point.setting}.get("learning_rate", 0),
            1 - (line.options.get("momentum") or 0),
        )
        if point.value < math.inf and rate > 0 and rest > 0:
            points.append(dataclasses.replace(point, value=rest / (rate * point.value)))
    return dataclasses.replace(line, points=tuple(points)) if points else None


def thinned(rows: Sequence[Row], target: float, most: int) -> list[Row]:
    """At most `most` rows: where there are more, of each sweep the default, the best on seed 0, and
    the ends.

    The ends go too where that is not enough.
    """
    kept = list(rows)
    for spared in (1, 0):
        for option in swept(rows):
            for line in sweeps(kept, option) if len(kept) > most else ():
                best = choose([point.records[0] for point in line.points], target)
                inner = [
                    id(p.records)
                    for p in line.points[spared : -spared or None]
                    if p.records[0] is not best
                ]
                kept = [
                    row
                    for row in kept
                    if row.label == row.contestant or id(row.records) not in inner
                ]
    return kept[:most]


def _label_without(label: str, option: str) -> str:
    """``il:inner=sgd`` for ``il:inner=sgd,period=4``."""
    name, _, said = label.partition(":")
    kept = [part for part in said.split(",") if part and not part.startswith(f"{option}=")]
    return f"{name}:{','.join(kept)}" if kept else name


def _without(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}
