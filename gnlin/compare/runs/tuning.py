"""The rules of tuning: which of several trials is the best."""

import math
from collections.abc import Sequence

from gnlin.compare.runs.records import Record


def finished(record: Record) -> bool:
    """Whether the run neither diverged nor failed."""
    return record["status"] == "finished"


def final(record: Record, name: str) -> float:
    """The last value of a curve, or a metric of the last state.

    NaN for a run that did not finish.
    """
    metric = record.get("metrics", {}).get(name, math.nan)
    values = record["curve"].get(name, [metric])
    return values[-1] if finished(record) and values else math.nan


def tuned(record: Record) -> tuple[str, float]:
    """Name and value of the run's tuned number; ``("", nan)`` where nothing is tuned."""
    return next(iter(record["setting"].items()), ("", math.nan))


def reached(record: Record, target: float) -> int | None:
    """Index in the curve from which the loss stays at or below `target` until the run ends.

    `None` where there is no such index. A first touch would do for full-batch descent. It says
    little of a loss that jumps up again, as it does when an anchor moves. A run that diverges or
    fails has reached nothing.
    """
    losses = record["curve"]["loss"] if finished(record) else []
    index = len(losses)
    while index > 0 and losses[index - 1] <= target:  # false for NaN
        index -= 1
    return index if index < len(losses) else None


def choose(trials: Sequence[Record], target: float) -> Record:
    """The best of `trials`, one for each setting, all on one seed.

    The best needs the fewest gradient-equivalents to reach the target (for good, see `reached`).
    Where no setting reaches it, the best has the lowest final training loss, which also breaks
    ties. Runs that diverged or failed come last. One rule holds for every contestant. Held-out data
    takes no part.
    """

    def badness(record: Record) -> tuple[float, float, bool]:
        index = reached(record, target)
        cost = math.inf if index is None else record["curve"]["cost"][index]
        loss = final(record, "loss")
        return cost, loss if math.isfinite(loss) else math.inf, record["status"] == "failed"

    return min(trials, key=badness)
