"""Work to a training loss on four problems: `gnlin.gauss_newton` beside first order and other
libraries.

python examples/reference_problems.py                      # gn, sgd, muon and lbfgs; a few minutes
python examples/reference_problems.py gn kfac somax-sgn    # any names of `gnlin contestants`
python examples/reference_problems.py --quick              # half a minute: one problem, little work

The unit is one gradient of the batch that the problem trains on. Everyone has five trials on seed
0, and the best goes on to seeds 1 and 2; the figure is the median of three seeds, and a dash where
that did not get there. Runs are kept in gnlin-results/reference, and the same command goes on where
it was.
"""

import argparse
import dataclasses
import statistics

from gnlin.compare import Task, run
from gnlin.compare.tasks import TASKS

BUDGET = 400  # gradients
CONTESTANTS = ("gn", "sgd", "muon", "lbfgs")


def problem(
    name: str, batch_size: int | None, targets: tuple[float, ...]
) -> tuple[Task, tuple[float, ...]]:
    label = f"{name}-{batch_size or 'full'}"
    task = dataclasses.replace(
        TASKS[name](), name=label, batch_size=batch_size, work=BUDGET, target=targets[-1]
    )
    return task, targets


def problems():
    """The tasks, and the losses that work is counted to; the setting is chosen for the last."""
    return [
        problem("diabetes", None, (0.1, 0.01, 0.001)),
        problem("digits", None, (0.1, 0.01, 0.001)),
        problem("digits", 256, (0.1, 0.01, 0.001)),
        problem("digits-autoencoder", None, (0.5, 0.4, 0.3)),
    ]


def work_to(record: dict, target: float) -> float:
    """Gradients until an evaluation first found the loss at or below the target."""
    curve = record["curve"]
    reached = (
        cost
        for cost, loss in zip(curve["cost"], curve["loss"], strict=True)
        if loss is not None and loss <= target
    )
    return next(reached, float("inf"))


def figures(records: list[dict], label: str, targets: tuple[float, ...], seeds: int) -> list[str]:
    """Median over the seeds at the setting that all of them ran at."""
    settings: dict[str, list[dict]] = {}
    for record in (record for record in records if record["label"] == label):
        settings.setdefault(str(record["setting"]), []).append(record)
    chosen = next((runs for runs in settings.values() if len(runs) == seeds), [])
    if not chosen or any(run["status"] != "finished" for run in chosen):
        return [str(next(iter(settings.values()))[0]["status"]) if settings else "–"] * len(targets)
    medians = [
        statistics.median(work_to(record, target) for record in chosen) for target in targets
    ]
    return ["–" if median == float("inf") else f"{median:.0f}" for median in medians]


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
            print(
                f"| {task.name} | {target:g} |",
                " | ".join(column[row] for column in columns),
                "|",
                flush=True,
            )


if __name__ == "__main__":
    main()
