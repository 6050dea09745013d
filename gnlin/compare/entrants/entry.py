"""Entries of a comparison, from words such as ``il:period=64,inner=adam``."""

import dataclasses
import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from gnlin.compare.entrants.contestant import Contestant, Option, not_negative
from gnlin.compare.entrants.contestants import CONTESTANTS, DEFAULT
from gnlin.compare.entrants.method import Method
from gnlin.compare.tasks.task import Task

# The tuned number, where the user fixes it.
_TUNED = Option(None, not_negative, "a number of at least 0")

# Sweeps: name of an option or of the tuned number ↦ its values, as text.
Sweep = Mapping[str, Sequence[str]]


class UsageError(ValueError):
    """A mistake of the user; the message names the possible values."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A contestant with every option fixed, and the values among which its number is tuned.

    Attributes:
        contestant: the optimiser.
        options: all fixed options, and the tuned number where the user fixed it.
        grid: values of the tuned number; a single one where the user fixed it.
        label: its name in tables and figures, with all options that are not the default.
    """

    contestant: Contestant
    options: Mapping[str, Any]
    grid: tuple[float, ...]
    label: str

    def method(self, task: Task, number: Any) -> Method:
        """The optimiser for a task at a value of the tuned number, which may be traced."""
        return self.contestant.build(task, {**self.options, self.contestant.tuned: number})


def entries_of(
    words: Sequence[str | Contestant | Entry], sweep: Sweep | None = None
) -> list[Entry]:
    """Entries from words.

    A contestant that has the swept options takes part with every combination of their values.

    Args:
        words: ``name`` or ``name:option=value,...`` or the name of a family (``gnlin``, ``optax``,
            ``peers``). `Contestant` and `Entry` records stand for themselves. An empty sequence
            stands for `DEFAULT`. In a sweep it stands for all members of gnlin that have a swept
            option.
        sweep: option ↦ values.

    Raises:
        UsageError: a name, an option or a value is not known; the message suggests the nearest.
    """
    sweep = dict(sweep or {})
    chosen = list(words) or (_default_of_sweep(sweep) if sweep else list(DEFAULT))
    expanded = [member for word in chosen for member in _members(word)]
    entries = [entry for word in expanded for entry in _swept(word, sweep)]
    for name in sweep:
        if not any(_has(_contestant(word), name) for word in expanded):
            known = sorted({option for word in expanded for option in _names(_contestant(word))})
            raise UsageError(
                f"none of the contestants has an option {name!r} to sweep{_nearest(name, known)}"
            )
    unique: dict[str, Entry] = {}
    for entry in entries:
        other = unique.setdefault(entry.label, entry)
        if other.contestant is not entry.contestant or other.options != entry.options:
            raise UsageError(f"two contestants are called {entry.label!r}; give one another name")
    return list(unique.values())


def parse(word: str) -> Entry:
    """An entry from ``name:option=value,...``."""
    name, _, rest = word.partition(":")
    contestant = _known(name)
    return _entry(contestant, _pairs(rest, contestant))


def _entry(contestant: Contestant, said: Mapping[str, str]) -> Entry:
    """An entry whose options are the defaults, but for those in `said`."""
    tuned = contestant.tuned
    forms = {**contestant.options, tuned: _TUNED}
    options = {option: form.default for option, form in contestant.options.items()}
    for option, text in said.items():
        if option not in forms:
            near = _nearest(option, _names(contestant))
            raise UsageError(f"{contestant.name} has no option {option!r}{near}")
        try:
            options[option] = forms[option].parse(text)
        except (ValueError, KeyError):
            message = f"{contestant.name}:{option} must be {forms[option].form}; got {text!r}"
            raise UsageError(message) from None
    grid = (options[tuned],) if tuned in options else contestant.values(options)
    return Entry(contestant, options, grid, _label(contestant, options))


def format_value(value: Any) -> str:
    """A value of an option as text of the command line."""
    if value is None:
        return "never"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)


def _label(contestant: Contestant, options: Mapping[str, Any]) -> str:
    """The name, and the options that are not the default; for `il` the period in any case."""
    forms = contestant.options
    said = [
        f"{name}={format_value(value)}"
        for name, value in options.items()
        if name not in forms or value != forms[name].default
    ]
    if contestant.name == "il" and not any(item.startswith("period=") for item in said):
        said.insert(0, f"period={format_value(options['period'])}")
    return ":".join([contestant.name, ",".join(said)]) if said else contestant.name


def _swept(word: str | Contestant | Entry, sweep: Sweep) -> list[Entry]:
    """Entries of one word, one for each combination of swept values."""
    if isinstance(word, Entry):
        return [word]
    contestant = _contestant(word)
    said = _pairs(word.partition(":")[2], contestant) if isinstance(word, str) else {}
    names = [name for name in sweep if _has(contestant, name) and name not in said]
    entries = []
    for values in itertools.product(*(sweep[name] for name in names)):
        entries.append(_entry(contestant, {**dict(zip(names, values, strict=True)), **said}))
    return entries


def _members(word: str | Contestant | Entry) -> list[str | Contestant | Entry]:
    members = [name for name, contestant in CONTESTANTS.items() if contestant.family == word]
    return [*members] or [word]


def _default_of_sweep(sweep: Sweep) -> list[str]:
    return [
        name
        for name, member in CONTESTANTS.items()
        if member.family == "gnlin" and any(_has(member, n) for n in sweep)
    ]


def _contestant(word: str | Contestant | Entry) -> Contestant:
    if isinstance(word, str):
        return _known(word.partition(":")[0])
    return word.contestant if isinstance(word, Entry) else word


def _known(name: str) -> Contestant:
    if name not in CONTESTANTS:
        families = sorted({contestant.family for contestant in CONTESTANTS.values()})
        if name in families:
            raise UsageError(
                f"{name!r} is a family, which takes no options; give them to its members"
            )
        raise UsageError(f"unknown contestant {name!r}{_nearest(name, [*CONTESTANTS, *families])}")
    return CONTESTANTS[name]


def _names(contestant: Contestant) -> list[str]:
    return [contestant.tuned, *contestant.options]


def _has(contestant: Contestant, option: str) -> bool:
    return option in _names(contestant)


def _pairs(text: str, contestant: Contestant) -> dict[str, str]:
    pairs = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not equals or not value:
            raise UsageError(
                f"{contestant.name}:{text}: write option=value, separated by commas; got {item!r}"
            )
        pairs[name.strip()] = value.strip()
    return pairs


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
