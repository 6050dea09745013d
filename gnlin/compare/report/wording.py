"""Numbers, names and counts as tables and figures write them."""

import math
import re
from collections.abc import Callable, Mapping

from gnlin.compare.report.summary import Row

_NAMES = {
    "step": "steps",
    "cost": "gradient-equivalents",
    "seconds": "seconds of training steps",
    "damping": "damping λ",
    "damping-first-or-last": "first or last damping λ",
    "period": "K, the steps for which an anchor is kept",
}


def words(name: str) -> str:
    """The name of an option or of an axis in words."""
    return _NAMES.get(name, name.replace("_", " "))


def setting_in_words(setting: Mapping[str, float]) -> str:
    """``lr 0.01``."""
    parts = []
    for name, value in setting.items():
        parts.append(f"{'lr' if name == 'learning_rate' else words(name)} {value:g}")
    return ", ".join(parts)


def breakable(label: str, longest: float) -> str:
    """A label of more than `longest` characters gets a space after each colon and comma."""
    return label if len(label) <= longest else label.replace(":", ": ").replace(",", ", ")


def counted(number: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def trouble(row: Row) -> str:
    """How many runs of a row diverged and failed, and why the first did."""
    parts = []
    if row.diverged:
        parts.append(f"{row.diverged} diverged")
    if row.failed:
        parts.append(f"{row.failed} failed")
    counts = f"of {counted(len(row.records), 'run')} {' and '.join(parts)}"
    return f"{counts}: {row.reason}" if row.reason else counts


def whole(value: float) -> str:
    """``1235``."""
    return f"{value:.0f}"


def small(value: float) -> str:
    """``5.7e-5``."""
    return re.sub(r"e([+-])0+(?=\d)", r"e\1", f"{value:.1e}").replace("e+", "e")


def brief(seconds: float) -> str:
    """``12.3``, ``0.031``."""
    return f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2g}"


def like(mean: float) -> Callable[[float], str]:
    """A format with as many places as three digits of `mean` have."""
    if not math.isfinite(mean) or mean == 0:
        return "{:.3g}".format
    places = 2 - math.floor(math.log10(abs(mean)))
    return f"{{:.{min(max(places, 1), 4)}f}}".format if -2 < places < 5 else small
