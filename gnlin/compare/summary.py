"""Records to rows: which setting is chosen, and what its seeds say."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from gnlin.compare.contestants import Contestant, Setting
from gnlin.compare.run import Record


def reached(record: Record, target: float) -> int | None:
    """Index in the curve from which the loss stays at or below `target` until the run ends; `None` where it does not.

    A first touch would do for full-batch descent. It says little of a loss that jumps up again, as it does when an
    anchor moves.
    """
    losses = record["curve"]["loss"]
    index = len(losses)
    while index > 0 and losses[index - 1] <= target:  # false for NaN
        index -= 1
    return index if index < len(losses) else None


def choose(trials: Sequence[Record], target: float) -> Record:
    """The best of `trials`, one for each setting, all on one seed.

    The fewest gradient-equivalents to reach the target (for good, see `reached`); where no setting reaches it, the
    lowest final training loss, which also breaks ties. One rule for every contestant; held-out data takes no part.
    """

    def badness(record: Record) -> tuple[float, float]:
        index = reached(record, target)
        final = record["curve"]["loss"][-1]
        cost = math.inf if index is None else record["curve"]["cost"][index]
        return cost, final if math.isfinite(final) else math.inf

    return min(trials, key=badness)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over the seeds that have a value, `count` of `total`."""

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
    """What the table says of one contestant."""

    contestant: Contestant
    setting: Setting
    at_edge: bool  # the chosen setting is the first or last of the grid
    records: tuple[Record, ...]  # one for each seed, at that setting
    loss: Spread
    accuracy: Spread
    steps: Spread  # to the target
    cost: Spread  # to the target
    seconds: Spread
    compile_seconds: float


def summarise(records: Sequence[Record], contestants: Sequence[Contestant], target: float) -> list[Row]:
    """One row for each contestant whose trials are complete; seeds that are not there yet are left out."""
    rows = []
    for contestant in contestants:
        own = [record for record in records if record["contestant"] == contestant.name]
        trials = [record for record in own if record["seed"] == 0]
        if all(any(trial["setting"] == dict(setting) for trial in trials) for setting in contestant.grid):
            setting = choose(trials, target)["setting"]
            chosen = sorted((r for r in own if r["setting"] == setting), key=lambda record: record["seed"])
            rows.append(_row(contestant, chosen, target))
    return rows


def _row(contestant: Contestant, records: Sequence[Record], target: float) -> Row:
    def at_target(name: str) -> Spread:
        indices = [reached(record, target) for record in records]
        pairs = zip(records, indices, strict=True)
        return Spread.over([None if index is None else record["curve"][name][index] for record, index in pairs])

    setting = records[0]["setting"]
    return Row(
        contestant=contestant,
        setting=setting,
        at_edge=setting in (dict(contestant.grid[0]), dict(contestant.grid[-1])),
        records=tuple(records),
        loss=Spread.over([record["curve"]["loss"][-1] for record in records]),
        accuracy=Spread.over([record["curve"]["accuracy"][-1] for record in records]),
        steps=at_target("step"),
        cost=at_target("cost"),
        seconds=Spread.over([record["seconds"] for record in records]),
        compile_seconds=records[0]["compile_seconds"],
    )
