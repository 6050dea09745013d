"""Count the steps to a fixed training loss as the batch grows: who makes use of a large batch?

    python examples/batch_sizes.py                          # chars, 16 to all examples: long
    python examples/batch_sizes.py soap gn@3 --batches 64 256 --seeds 1
    python examples/batch_sizes.py --quick                  # digits, two batches: two minutes

It draws the figure of Abreu et al., The Potential of Second-Order Optimization for LLMs, arXiv
2510.09378, in small: steps against the number of examples in a batch. Contestants are those of
`gnlin contestants`, with five trials each on seed 0. The best one goes on to the other seeds. A run
ends when the loss over all training examples has reached the target.

A run has the work of --epochs passes over the training examples, and of --least gradients at least.
NAME@8 has eight times as much, because the figure counts steps, and these have dearer ones.

Runs are kept as they end, in --out. The same command goes on where it was. After each contestant
the table steps.md and the figure steps.svg are written anew there.
"""

import argparse
import dataclasses
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

# The threads of LAPACK, which SOAP and Gauss-Newton call, wait for each other on a busy machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import matplotlib
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from gnlin.compare import Task
from gnlin.compare.entrants.entry import Entry, entries_of
from gnlin.compare.report.drawing import End, label_ends, panels, style
from gnlin.compare.runs.records import Record, Records, RecordsError, write_facts
from gnlin.compare.runs.study import Study, check_entries, facts
from gnlin.compare.runs.tuning import reached
from gnlin.compare.runs.workers import executor_of
from gnlin.compare.tasks import TASKS
from gnlin.compare.tasks.task import DataError

CONTESTANTS = (
    "adam",
    "muon",
    "soap",
    "gn@3",
    "prox-linear:inner=muon,line_search=yes@12",
    "gn-cg@8",
)
BATCHES = ("16", "64", "256", "1024", "all")


class Point(NamedTuple):
    """The runs of a contestant at one batch size, at the setting that was chosen."""

    label: str
    batch: int
    setting: dict[str, float]
    steps: list[float]  # of each seed, infinite where the target was not reached
    cost: float  # gradients a step, median


def with_batches(task: Task, size: str, options: argparse.Namespace) -> Task:
    """The task with batches of that size, and runs that stop at the target."""
    train = jax.tree.map(lambda leaf: leaf[: options.examples], task.train)
    count = len(jax.tree.leaves(train)[0])
    examples = count if size == "all" else int(size)
    return dataclasses.replace(
        task,
        name=f"{task.name}-batch-{examples}",
        train=train,
        batch_size=None if examples == count else examples,
        work=max(options.least, options.epochs * count / examples),
        target=task.target if options.target is None else options.target,
        stops=True,
    )


def steps_to(record: Record, target: float) -> float:
    """Steps to the target, between two evaluations on a line in the logarithm of the loss."""
    index = reached(record, target)
    if index is None:
        return float("inf")
    steps, losses = record["curve"]["step"], record["curve"]["loss"]
    if index == 0:
        return 0.0
    falling = np.log([losses[index], losses[index - 1]])
    return float(np.interp(np.log(target), falling, [steps[index], steps[index - 1]]))


def runs_of(
    task: Task, entry: Entry, times: float, options: argparse.Namespace, executor
) -> list[Record]:
    """The runs of a contestant at the chosen setting. Those that are missing are made."""
    folder = options.out / task.name / f"{entry.label.replace(':', '-')}"
    records = Records(folder)
    began = time.perf_counter()

    def report(job, done):
        if done == 1.0:
            seconds = time.perf_counter() - began
            print(f"# {task.name} {entry.label}: {job.number:g}, seed {job.seed}", end=", ")
            print(f"after {seconds:.0f} s", flush=True)

    try:
        write_facts(folder, facts(task))
        command = "examples/batch_sizes.py"
        study = Study(task, [entry], options.seeds, records, times * task.work, command)
        ((_, chosen),) = study.carry_out(report, executor)
        return chosen
    finally:
        records.close()


def point(task: Task, entry: Entry, chosen: list[Record]) -> Point:
    for record in chosen:
        if record["status"] == "failed":
            print(f"# {task.name} {entry.label}: {record['reason']}", flush=True)
    return Point(
        entry.label,
        task.batch_size or task.train_size,
        chosen[0]["setting"],
        [steps_to(record, task.target) for record in chosen],
        statistics.median(record.get("cost_per_step", float("nan")) for record in chosen),
    )


def table(points: list[Point]) -> str:
    """A row for each contestant and batch: the setting, and steps as the median of the seeds."""
    lines = ["| contestant | batch | setting | steps | of the seeds | gradients a step |"]
    lines.append("|---|---:|---:|---:|---|---:|")
    for each in points:
        names = ", ".join(f"{value:g}" for value in each.setting.values())
        seeds = ", ".join(_steps(value) for value in each.steps)
        middle = _steps(statistics.median(each.steps))
        row = [each.label, str(each.batch), names, middle, seeds, f"{each.cost:.1f}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _steps(value: float) -> str:
    return f"{value:.0f}" if np.isfinite(value) else "–"


def draw(points: list[Point], title: str, path: Path) -> None:
    """Draw medians as lines, seeds as dots, on logarithmic axes."""
    labels = list(dict.fromkeys(each.label for each in points))
    known = [each for each in points if np.isfinite(statistics.median(each.steps))]
    if not known:
        return
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False}):
        figure, (axes,) = panels(1, labels, title)
        batches = sorted({each.batch for each in points})
        axes.set(xscale="log", yscale="log", xlabel="examples in a batch", ylabel="steps")
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.spines["right"].set_visible(False)
        every = [max(value, 1.0) for each in known for value in each.steps if np.isfinite(value)]
        axes.set_xlim(batches[0] / 1.3, batches[-1] * 1.3)
        axes.set_ylim(min(every) / 1.5, max(every) * 1.5)
        ends = []
        for number, label in enumerate(labels):
            own = sorted((each.batch, each.steps) for each in points if each.label == label)
            look = style(number)
            across = [batch for batch, _ in own]
            # The line has a gap where the target was not reached.
            middle = [max(statistics.median(steps), 1.0) for _, steps in own]
            medians = [steps if np.isfinite(steps) else float("nan") for steps in middle]
            if not np.isfinite(medians).any():
                continue
            axes.plot(across, medians, **look)
            for batch, steps in own:
                axes.plot([batch] * len(steps), steps, ".", color=look["color"], markersize=3)
            last = max(place for place, steps in enumerate(medians) if np.isfinite(steps))
            ends.append(End(label, across[last], medians[last], look))
        label_ends(axes, ends)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contestants", nargs="*", default=CONTESTANTS, metavar="NAME[@TIMES]")
    parser.add_argument("--task", default="chars", choices=TASKS)
    parser.add_argument("--batches", nargs="+", default=BATCHES, help="numbers of examples, or all")
    parser.add_argument("--examples", type=int, help="train on the first so many; default: all")
    parser.add_argument("--target", type=float, help="training loss; default: the task's")
    parser.add_argument("--epochs", type=float, default=12, help="work of a run, in passes")
    parser.add_argument("--least", type=float, default=400, help="... and in gradients, at least")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="processes that make runs")
    parser.add_argument("--out", type=Path, default=Path("gnlin-results/batch-sizes"))
    parser.add_argument("--quick", action="store_true", help="digits, two batches, one seed")
    options = parser.parse_args()
    if options.quick:
        options.task, options.batches, options.examples = "digits", ("32", "all"), 256
        options.target, options.epochs, options.least, options.seeds = 0.1, 4, 40, 1
    return options


def main() -> None:
    options = parsed()
    try:
        compare(options)
    except (ValueError, RecordsError, DataError) as error:
        raise SystemExit(f"batch_sizes.py: {error}") from error


def compare(options: argparse.Namespace) -> None:
    task, points = TASKS[options.task](), []
    title = f"{options.task}: steps to a training loss of {options.target or task.target:g}"
    with executor_of(options.workers, None) as executor:
        for size in options.batches:
            problem = with_batches(task, size, options)
            for word in options.contestants:
                name, _, times = word.partition("@")
                (entry,) = entries_of([name])
                check_entries(problem, [entry])
                chosen = runs_of(problem, entry, float(times or 1), options, executor)
                points.append(point(problem, entry, chosen))
                (options.out / "steps.md").write_text(table(points) + "\n", encoding="utf-8")
                draw(points, title, options.out / "steps.svg")
    print(table(points))


if __name__ == "__main__":
    main()
