"""Two maps of iterative linearisation: how far features move, and which layers have to learn them.

    python examples/feature_learning.py digits-cnn       # or sparse-parity; some minutes
    python examples/feature_learning.py digits --quick

The first table has a row for each period K of the anchor. It says how far the kernel of the trained
model has moved since the start, on 64 held-out examples, and how good the model is. The second has
a row for each choice of layers. Those marked 0 are linearised at the start for good. Those marked 1
follow their true gradient.

Runs are kept in two directories in gnlin-results/. A run that was stopped goes on where it was.
``gnlin report`` makes pages with figures of them.
"""

import argparse
import functools
import itertools
import statistics

import jax
import optax

import gnlin
from gnlin.compare import Contestant, Option, from_optax, run
from gnlin.compare.entrants.contestant import batch, period
from gnlin.compare.report.summary import summarise
from gnlin.compare.runs.study import facts
from gnlin.compare.tasks import TASKS

RATES = (0.001, 0.004, 0.016)
PERIODS = (1, 2, 4, 16, 64, 256, 1024, None)


def drifting(task, options, every):
    """Iterative linearisation of Adam whose kernel is measured every so many steps."""
    probe = jax.tree.map(lambda leaf: leaf[:64], task.held_out)
    period = options["period"]
    inner = gnlin.iterative_linearisation(
        optax.adam(options["learning_rate"]), task.objective, period
    )
    method = from_optax(
        task.objective, gnlin.measure_kernel_drift(inner, task.objective, probe, every)
    )
    return method._replace(cycle=period or 1)


def layer_of_leaves(params):
    """The number of its layer for each leaf: leaves with the same parent are a layer."""
    paths = [path[:-1] for path, _ in jax.tree.leaves_with_path(params)]
    order = sorted(set(paths), key=paths.index)
    return jax.tree.unflatten(jax.tree.structure(params), [order.index(path) for path in paths])


def learning_in_some_layers(task, options):
    """Adam; layers marked 0 are linearised at the start for good."""
    periods = {layer: 1 if mark == "1" else None for layer, mark in enumerate(options["layers"])}
    layers = gnlin.LayerPeriods(periods, layer_of_leaves)
    tx = gnlin.iterative_linearisation(optax.adam(options["learning_rate"]), task.objective, layers)
    return from_optax(task.objective, tx)


def drift(every):
    return Contestant(
        "il-drift",
        "Iterative linearisation of Adam; its kernel on 64 held-out examples is measured every "
        f"{every} steps",
        functools.partial(drifting, every=every),
        grid=RATES,
        options={"period": period(16), "batch": batch()},
    )


SOME = Contestant(
    "il-layers",
    "Adam; the layers marked 0 are linearised at the start for good",
    learning_in_some_layers,
    grid=RATES,
    options={"layers": Option("", str, "a 0 or 1 for each layer"), "batch": batch()},
)


def mean(records, read):
    values = [read(record) for record in records]
    spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


def print_drift(rows):
    print(
        "| K | rate | anchors | centred alignment | alignment | distance | training loss "
        "| held out |"
    )
    print("|---" * 8 + "|")
    for row in rows:
        metrics = (
            "linearise/refreshes",
            "kernel/centred_alignment",
            "kernel/alignment",
            "kernel/distance",
        )
        cells = [
            "never" if row.options["period"] is None else str(row.options["period"]),
            f"{row.setting['learning_rate']:g}",
            *(mean(row.records, lambda r, name=name: r["metrics"][name]) for name in metrics),
            mean(row.records, lambda r: r["curve"]["loss"][-1]),
            mean(row.records, lambda r: r["curve"]["quality"][-1]),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def print_layers(rows):
    print("\n| layers that learn features | rate | training loss | held out |\n" + "|---" * 4 + "|")
    for row in rows:
        loss, quality = (
            mean(row.records, lambda r, name=name: r["curve"][name][-1])
            for name in ("loss", "quality")
        )
        print(
            f"| {row.options['layers']} | {row.setting['learning_rate']:g} | {loss} | {quality} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="some rows of each, a twentieth of the work, one seed"
    )
    given = parser.parse_args()
    task = TASKS[given.task]()
    marks = ["".join(each) for each in itertools.product("10", repeat=len(layers_of(task)))]
    periods, seeds, work, every, name = PERIODS, given.seeds, 1.0, 50, given.task
    if given.quick:
        periods, marks, seeds, work, every = (1, 4, 16, None), [marks[0], marks[-1]], 1, 0.05, 4
        name = f"{name}-quick"

    def rows(contestant, sweep, what):
        runs = run(
            given.task,
            [contestant],
            sweep=sweep,
            seeds=seeds,
            work=work,
            out=f"gnlin-results/{name}-{what}",
        )
        return summarise(runs, {task.name: facts(task)})

    print_drift(
        rows(drift(every), {"period": ["never" if k is None else k for k in periods]}, "drift")
    )
    print_layers(rows(SOME, {"layers": marks}, "layers"))
    print(f"\nFor figures: gnlin report gnlin-results/{name}-drift; ", end="")
    print(f"gnlin report gnlin-results/{name}-layers")


def layers_of(task):
    params = jax.eval_shape(task.init, jax.random.key(0))
    return set(jax.tree.leaves(layer_of_leaves(params)))


if __name__ == "__main__":
    main()
