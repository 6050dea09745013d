"""Curves of several runs as one: their median and their range."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gnlin.compare.runs.records import Record
from gnlin.compare.runs.tuning import finished

# A curve begins at this fraction of its end, if not later. A logarithmic axis would give most of
# its length to an evaluation at nearly no work, such as the first of an optimiser whose state costs
# a little.
_LEAST = 1e-4


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
    """Median and range of the curves `name` of several runs.

    Each curve is interpolated linearly to the same places. These are evaluations of the run with
    the median end, evenly on a logarithmic axis. They begin with the first evaluation after a step.
    After a run has diverged or failed it counts as `worst`. A run that has finished keeps its last
    value.

    Args:
        records: the runs.
        against: ``step``, ``cost`` or ``seconds``.
        name: ``loss`` or ``quality``.
        worst: the worst value of that.
        points: the most places.

    Returns:
        The band; `None` where no run made a step.
    """
    across = _places(records, against, points)
    if across is None:
        return None
    curves = np.stack([_interpolated(record, against, name, across, worst) for record in records])
    return Band(across, curves.min(axis=0), np.median(curves, axis=0), curves.max(axis=0))


def _places(records: Sequence[Record], against: str, points: int) -> np.ndarray | None:
    """Places on a logarithmic axis of work, seconds or steps."""
    curves = [record["curve"] for record in records]
    worked = [curve for curve in curves if curve["step"] and curve["step"][-1] > 0]
    if not worked:
        return None
    by_end = sorted(worked, key=lambda curve: curve[against][-1])
    median = by_end[len(by_end) // 2]
    across = np.asarray(median[against], float)
    is_work = (np.asarray(median["step"]) > 0) & (across > 0) & (across >= _LEAST * across[-1])
    across = across[is_work]
    if not len(across):
        return None
    chosen = np.unique(np.geomspace(1, len(across), points).astype(int)) - 1
    return across[chosen]


def _interpolated(
    record: Record, against: str, name: str, across: np.ndarray, worst: float
) -> np.ndarray:
    """A curve at the places `across`, `worst` from where it is not finite or the run fails."""
    curve = record["curve"]
    known = np.isfinite(np.asarray(curve[name], float))
    length = len(known) if known.all() else int(np.argmin(known))
    if length == 0:
        return np.full_like(across, worst)
    places = np.asarray(curve[against][:length], float)
    values = np.interp(across, places, curve[name][:length])
    if length < len(known) or not finished(record):
        values[across > places[-1]] = worst
    return values
