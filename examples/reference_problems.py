"""Measure the work to a training loss on four problems: `gnlin.gauss_newton` and others.

    python examples/reference_problems.py                      # gn, sgd, muon, lbfgs: minutes
    python examples/reference_problems.py gn kfac somax-sgn    # any of `gnlin contestants`
    python examples/reference_problems.py --quick              # half a minute

The unit is one gradient of the batch that the problem trains on. Every contestant has five trials
on seed 0, and the best setting goes on to seeds 1 and 2. The figure is the median of three seeds.
A dash means that the median run did not get there. Runs stay in gnlin-results/reference, and the
same command goes on where it was.
"""

import argparse
import dataclasses
import statistics

from gnlin.compare import Task, run
from gnlin.compare.tasks import TASKS

BUDGET = 400  # gradients
CONTESTANTS = ("gn", "sgd", "muon", "lbfgs")


Problem = tuple[Task, tuple[float, ...]]  # and the losses that work is counted to


def problem(name: str, batch_size: int | None, targets: tuple[float, ...]) -> Problem:
    label = f"{name}-{batch_size or 'full'}"
    task = dataclasses.replace(
        TASKS[name](), name=label, batch_size=batch_size, work=BUDGET, target=targets[-1]
    )
    return task, targets


def problems() -> list[Problem]:
    """List the problems. The setting is chosen for the last of the losses."""
    return [
        problem("diabetes", None, (0.1, 0.01, 0.001)),
        problem("digits", None, (0.1, 0.01, 0.001)),
        problem("digits", 256, (0.1, 0.01, 0.001)),
        problem("digits-autoencoder", None, (0.5, 0.4, 0.3)),
    ]


def work_to(record: dict, target: float) -> float:
    """Count the gradients until an evaluation first found the loss at or below the target."""
    curve = record["curve"]
    for cost, loss in zip(curve["cost"], curve["loss"], strict=True):
        if loss is not None and loss <= target:
            return cost
    return float("inf")


def figures(records: list[dict], label: str, targets: tuple[float, ...], seeds: int) -> list[str]:
    """Take the median over the seeds, at the setting that all of them ran at."""
    settings: dict[str, list[dict]] = {}
    for record in records:
        if record["label"] == label:
            settings.setdefault(str(record["setting"]), []).append(record)
    chosen = next((runs for runs in settings.values() if len(runs) == seeds), [])
    if not chosen or any(run["status"] != "finished" for run in chosen):
        status = str(next(iter(settings.values()))[0]["status"]) if settings else "–"
        return [status] * len(targets)
    found = []
    for target in targets:
        median = statistics.median(work_to(record, target) for record in chosen)
        found.append("–" if median == float("inf") else f"{median:.0f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contestants", nargs="*", default=CONTESTANTS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    seeds, chosen = (2, problems()[:1]) if options.quick else (3, problems())
    print("| problem | loss |", " | ".join(options.contestants), "|")
    print("|---|---|" + "---|" * len(options.contestants))
    for task, targets in chosen:
        records = run(
            task,
            options.contestants,
            seeds=seeds,
            work=0.1 if options.quick else 1.0,
            out=f"gnlin-results/reference/{task.name}",
        )
        columns = [figures(records, label, targets, seeds) for label in options.contestants]
        for row, target in enumerate(targets):
            cells = " | ".join(column[row] for column in columns)
            print(f"| {task.name} | {target:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
