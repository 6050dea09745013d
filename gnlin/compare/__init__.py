"""Optimisers side by side on real data: ``gnlin compare TASK``, or `run` from Python.

Reading order, which is also the direction in which data flows: `task` and `tasks` (what is
trained), `method` (how an optimiser is driven), `cost` and `meter` (the unit of work), `contestant`
(what takes part), `optimisers`, `peers` and `contestants` (who can), `entry` (who does), `trial`
(one entry, setting and seed to one record), `summary` (records to rows), `records` (where they are
kept), `study` (which runs, and by whom), `axes`, `figures` and `report` (rows to pictures, tables
and a page), `api` and `cli` (how one asks).
"""

from gnlin.compare.api import run
from gnlin.compare.entrants.contestant import Contestant, Option, optax_contestant
from gnlin.compare.entrants.contestants import CONTESTANTS
from gnlin.compare.entrants.entry import Entry, entries_of
from gnlin.compare.entrants.method import Method, from_optax
from gnlin.compare.tasks import TASKS
from gnlin.compare.tasks.task import DataError, Quality, Task

__all__ = [
    "CONTESTANTS",
    "TASKS",
    "Contestant",
    "DataError",
    "Entry",
    "Method",
    "Option",
    "Quality",
    "Task",
    "entries_of",
    "from_optax",
    "optax_contestant",
    "run",
]
