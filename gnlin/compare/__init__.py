"""Optimisers side by side on real data: ``gnlin compare TASK``, or `run` from Python.

Rooms, in the order in which data flows and imports go:

* `tasks`: which problems are trained?
* `entrants`: who takes part, and how is it driven?
* `runs`: what does a run cost, and what came of it?
* `report`: what do the runs say?
* `api` and `cli`: how does one ask?
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
