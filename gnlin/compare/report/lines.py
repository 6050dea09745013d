"""Rows to lines: the results of a contestant along one number."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gnlin.compare.report.summary import Row, options_key
from gnlin.compare.runs.records import Record
from gnlin.compare.runs.tuning import choose, final, finished, tuned


@dataclasses.dataclass(frozen=True)
class Point:
    """Runs at one value of a number; ``math.inf`` stands for never."""

    value: float
    setting: Mapping[str, float]
    records: tuple[Record, ...]

    def finals(self, name: str) -> list[float]:
        """Last values of the runs that finished."""
        values = [final(record, name) for record in self.records]
        return [value for value in values if math.isfinite(value)]


@dataclasses.dataclass(frozen=True)
class Line:
    """A contestant along one number, its other options fixed."""

    label: str
    options: Mapping[str, Any]  # all but the number
    points: tuple[Point, ...]  # by value


def sweeps(rows: Sequence[Row], option: str, least: int = 3) -> list[Line]:
    """One line for each contestant and each choice of its other options.

    A line needs `least` values of `option`. A ``period`` of `None` is ``math.inf``. Other values
    that are no numbers are left out.
    """
    families: dict[tuple, list[tuple[float, Row]]] = {}
    for row in rows:
        value = row.options.get(option)
        if option == "period" and option in row.options and value is None:
            value = math.inf
        if isinstance(value, int | float) and not isinstance(value, bool):
            key = row.contestant, options_key(_without(row.options, option))
            families.setdefault(key, []).append((float(value), row))
    return [_line(family, option) for family in families.values() if len(family) >= least]


def _line(family: Sequence[tuple[float, Row]], option: str) -> Line:
    points = [Point(value, row.setting, row.records) for value, row in family]
    points.sort(key=lambda point: point.value)
    first = family[0][1]
    label, options = _label_without(first.label, option), _without(first.options, option)
    return Line(label, options, tuple(points))


def swept(rows: Sequence[Row]) -> list[str]:
    """Options of which some contestant has enough values for a line."""
    names = dict.fromkeys(name for row in rows for name in row.options)
    return [option for option in names if sweeps(rows, option)]


def moving_metrics(lines: Sequence[Line]) -> list[str]:
    """Metrics of the last state that vary along one of the lines.

    Ages are left out: they tell only when the run ended.
    """
    runs_of_lines = []
    for line in lines:
        runs = [record for point in line.points for record in point.records]
        runs_of_lines.append([record for record in runs if finished(record)])
    names = dict.fromkeys(
        name for runs in runs_of_lines for record in runs for name in record.get("metrics", {})
    )

    def moves(name: str, runs: Sequence[Record]) -> bool:
        values = {final(record, name) for record in runs}
        return len({value for value in values if math.isfinite(value)}) > 1

    return [
        name
        for name in names
        if not name.endswith("/age") and any(moves(name, runs) for runs in runs_of_lines)
    ]


def tuning_line(row: Row) -> Line:
    """The trials on seed 0 along the tuned number."""
    points = [Point(tuned(trial)[1], trial["setting"], (trial,)) for trial in row.trials]
    return Line(row.label, row.options, tuple(points))


def damping_lines(rows: Sequence[Row]) -> list[Line]:
    """Lines along a λ that is constant.

    These are sweeps of an option ``damping``, and the trials of contestants that tune it. A λ that
    is only the first or the last of a run has no place among them.
    """
    constant = [row for row in rows if row.options.get("control") == "constant"]
    by_trials = [
        tuning_line(row) for row in constant if "damping" in row.setting and len(row.trials) >= 3
    ]
    return sweeps(constant, "damping") + by_trials


def as_damping(line: Line) -> Line | None:
    """A line along K put at λ = 1/(ηK), in the order of K.

    η is the learning rate chosen at that K, over 1 − momentum. Never (K = ∞, λ = 0) is left out,
    for an axis of λ is logarithmic.

    Returns:
        The line; `None` for inner optimisers other than gradient descent, whose steps have no such
        λ.
    """
    if line.options.get("inner") != "sgd":
        return None
    points = []
    for point in line.points:
        rate = {**line.options, **point.setting}.get("learning_rate", 0)
        rest = 1 - (line.options.get("momentum") or 0)
        if point.value < math.inf and rate > 0 and rest > 0:
            points.append(dataclasses.replace(point, value=rest / (rate * point.value)))
    return dataclasses.replace(line, points=tuple(points)) if points else None


def thinned(rows: Sequence[Row], target: float, most: int) -> list[Row]:
    """At most `most` rows.

    Where there are more, each sweep keeps its default, the best on seed 0, and the ends. Where that
    is not enough, the ends go, too.
    """
    kept = list(rows)
    for ends in (1, 0):  # points at each end of a line that are spared
        for option in swept(rows):
            lines = sweeps(kept, option) if len(kept) > most else []
            for line in lines:
                dropped = _inner_points(line, ends, target)
                kept = [
                    row
                    for row in kept
                    if row.label == row.contestant or id(row.records) not in dropped
                ]
    return kept[:most]


def _inner_points(line: Line, ends: int, target: float) -> set[int]:
    """Identities of the runs of a line, without those of its ends and of its best point."""
    best = choose([point.records[0] for point in line.points], target)
    inner = line.points[ends : len(line.points) - ends]
    return {id(point.records) for point in inner if point.records[0] is not best}


def _label_without(label: str, option: str) -> str:
    """``il:inner=sgd`` for ``il:inner=sgd,period=4``."""
    name, _, said = label.partition(":")
    kept = [part for part in said.split(",") if part and not part.startswith(f"{option}=")]
    return f"{name}:{','.join(kept)}" if kept else name


def _without(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}
