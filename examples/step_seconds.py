"""Time the steps of a training run: a default step of `gnlin.gauss_newton` beside Adam's.

    python examples/step_seconds.py             # both networks, three minutes
    python examples/step_seconds.py wide        # the perceptron alone
    python examples/step_seconds.py --quick     # a small perceptron, half a minute

The networks are

* decoder: the task chars-deep, four scanned blocks of width 64, in batches of 16 windows.
* wide: a perceptron 784-1200-1200-1200-10 with 3.8 million parameters, in batches of 128 digits.
  The digits of scikit-learn are enlarged to 28 x 28 pixels.

All optimisers take their steps in turn, in one process, from the same start and on the same
batches. A step may be dear or cheap: factors are refreshed at every fifth. So the mean counts, and
the first ten steps, which compile and are dearer, do not. The last column is the loss over all
training data after the last step. Adam's rate is not tuned here.
"""

import argparse
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gnlin
from gnlin.compare.tasks import TASKS
from gnlin.compare.tasks.networks import init_perceptron

SKIPPED = 10  # first steps


class Run(NamedTuple):
    name: str
    step: object  # the compiled step
    params: object
    state: object


def wide(widths):
    """``(objective, parameters, training data, examples in a batch)``."""
    task = TASKS["digits"]()
    side = round(widths[0] ** 0.5)
    images = jnp.asarray(task.train["x"]).reshape(-1, 8, 8)
    images = jax.image.resize(images, (len(images), side, side), "linear")
    data = {**task.train, "x": np.asarray(images.reshape(len(images), -1))}
    return task.objective, init_perceptron(jax.random.key(0), widths), data, 128


def decoder():
    task = TASKS["chars-deep"]()
    return task.objective, task.init(jax.random.key(0)), task.train, 16


def optimisers(objective, name):
    """Yield ``(name, transform, whether it makes the gradient itself)``."""
    yield "Adam", optax.adam(1e-3 if name == "wide" else 1e-2), False
    yield "`gauss_newton`", gnlin.gauss_newton(objective), True
    if name == "wide":
        whole = gnlin.Kronecker(refresh=5, rank=None)
        yield "with `rank=None`", gnlin.gauss_newton(objective, solver=whole), True
    else:
        solver = gnlin.Eigenbasis()
        yield "with `Eigenbasis`", gnlin.gauss_newton(objective, solver=solver), True


def begin(objective, params, name, transform, alone):
    def step(params, state, batch):
        if alone:
            updates, state = transform.update(None, state, params, batch=batch)
        else:
            _, gradient = objective.value_and_grad(params, batch)
            updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.array, params)
    return Run(name, jax.jit(step, donate_argnums=(0, 1)), params, transform.init(params))


def measure(name, problem, steps):
    objective, params, data, examples = problem
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"\n{name}: {size} parameters, batches of {examples}\n", flush=True)
    runs = [begin(objective, params, *each) for each in optimisers(objective, name)]
    seconds = {run.name: [] for run in runs}
    draw = np.random.default_rng(0)
    for _ in range(steps):
        chosen = draw.choice(len(jax.tree.leaves(data)[0]), examples, replace=False)
        batch = jax.tree.map(lambda leaf, rows=chosen: jnp.asarray(leaf[rows]), data)
        for number, run in enumerate(runs):
            start = time.perf_counter()
            params, state = jax.block_until_ready(run.step(run.params, run.state, batch))
            seconds[run.name].append(time.perf_counter() - start)
            runs[number] = run._replace(params=params, state=state)
    print("| optimiser | mean, ms | median, ms | mean over Adam's | loss |")
    print("|---|---:|---:|---:|---:|")
    means = {key: statistics.mean(times[SKIPPED:]) for key, times in seconds.items()}
    value = jax.jit(objective.value)
    for run in runs:
        middle = statistics.median(seconds[run.name][SKIPPED:])
        row = f"| {run.name} | {1e3 * means[run.name]:.1f} | {1e3 * middle:.1f} "
        loss = float(value(run.params, jax.tree.map(jnp.asarray, data)))
        print(row + f"| {means[run.name] / means['Adam']:.2f} | {loss:.2g} |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=["decoder", "wide"], metavar="NETWORK")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="a small perceptron, few steps")
    options = parser.parse_args()
    if options.quick:
        measure("wide", wide((64, 600, 10)), SKIPPED + 6)
        return
    for name in options.networks:
        if name not in ("decoder", "wide"):
            parser.error(f"networks are decoder and wide; got {name}")
        problem = decoder() if name == "decoder" else wide((784, 1200, 1200, 1200, 10))
        measure(name, problem, options.steps)


if __name__ == "__main__":
    main()
