"""What does a run cost, and what came of it? `trial` makes one run, `study` all of a comparison.

In the order of their imports:

* `cost` and `meter`: work, counted in a program and while it runs;
* `records` and `tuning`: the store of runs, and the rule that chooses among them;
* `evaluation`, `trial`: the measures of a model, and one run;
* `jobs`, `study`, `workers`: a run made anywhere, the plan of all runs, and who makes them.
"""
