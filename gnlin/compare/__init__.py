"""Optimisers side by side on real data: ``gnlin compare TASK``.

Reading order, which is also the direction in which data flows: `tasks` (what is trained), `contestants` (by what),
`cost` (the unit of work), `run` (one contestant, setting and seed to one record), `summary` (records to rows), `study`
(which runs, and which of them are done), `report` (rows to a table and a picture), `cli`.

A new task is one entry in `tasks.TASKS`, a new contestant one in `contestants.CONTESTANTS`.
"""
