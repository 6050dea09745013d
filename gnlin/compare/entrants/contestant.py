"""The definition of a contestant: an optimiser, its options, and the one number that is tuned."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import optax

from gnlin.compare.entrants.method import Method, from_optax
from gnlin.compare.tasks.task import Task

Options = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Option:
    """A choice that a contestant offers beside the tuned number.

    Attributes:
        default: its value where the user names none.
        parse: text ↦ value; raises ValueError.
        form: the values it takes, for messages.
    """

    default: Any
    parse: Callable[[str], Any]
    form: str


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One optimiser of the comparison.

    Attributes:
        name: its name on the command line and in the records.
        summary: a line that describes it.
        build: (task, options) ↦ method. The options hold the tuned number too, which may be a
            traced scalar, so that one compilation serves the grid.
        tuned: name of the tuned number.
        grid: its values, one trial each; or options ↦ values, where they depend on them.
        options: the other options, by name.
        reason_absent: one line on why it cannot run here, with the remedy; `None` where it can.
        reason_unfit: one line on why it cannot run on a task; `None` where it can.
        family: ``gnlin``, ``optax`` or ``peers``.
    """

    name: str
    summary: str
    build: Callable[[Task, Options], Method]
    tuned: str = "learning_rate"
    grid: tuple[float, ...] | Callable[[Options], tuple[float, ...]] = ()
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    reason_absent: Callable[[], str | None] = lambda: None
    reason_unfit: Callable[[Task], str | None] = lambda task: None
    family: str = "optax"

    def values(self, options: Options) -> tuple[float, ...]:
        """Values of the tuned number, of which one is chosen."""
        return self.grid(options) if callable(self.grid) else self.grid


def optax_contestant(
    name: str,
    make: Callable[[Any], optax.GradientTransformation],
    grid: tuple[float, ...],
    *,
    tuned="learning_rate",
) -> Contestant:
    """A contestant from any Optax transformation.

    Args:
        name: its name on the command line and in the records.
        make: tuned number ↦ transformation; the number may be traced. For a transformation that
            needs the objective use `Contestant` itself.
        grid: values of the tuned number, one trial each.
        tuned: name of the number.

    Example:
        >>> import optax
        >>> from gnlin.compare import optax_contestant
        >>> optax_contestant("lion", optax.lion, (1e-4, 4e-4, 1.6e-3, 6.4e-3, 2.56e-2)).name
        'lion'
    """

    def build(task: Task, options: Options) -> Method:
        return from_optax(task.objective, make(options[tuned]))

    return Contestant(
        name,
        f"{name}, from outside.",
        build,
        tuned,
        tuple(float(value) for value in grid),
        {"batch": batch()},
        family="outside",
    )


# Forms of options.


def integer(default: int) -> Option:
    return Option(default, _positive_integer, "a whole number of at least 1")


def number(default: float) -> Option:
    return Option(default, finite, "a number")


def positive(default: float) -> Option:
    def parse(text):
        if not finite(text) > 0:
            raise ValueError(text)
        return float(text)

    return Option(default, parse, "a number above 0")


def switch(default: bool) -> Option:
    return Option(default, lambda text: {"yes": True, "no": False}[text], "yes or no")


def one_of(default: str, *others: str) -> Option:
    words = (default, *others)
    return Option(default, lambda text: words[words.index(text)], f"one of {', '.join(words)}")


def period(default: int | None) -> Option:
    def parse(text):
        return None if text == "never" else _positive_integer(text)

    return Option(default, parse, "a whole number of at least 1, or never")


def batch(default: str = "mini") -> Option:
    def parse(text):
        return text if text in ("mini", "full") else _positive_integer(text)

    return Option(default, parse, "mini (the task's), full, or a number of examples")


def _positive_integer(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def not_negative(text: str) -> float:
    if finite(text) < 0:
        raise ValueError(text)
    return float(text)


def finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(text)
    return float(text)
