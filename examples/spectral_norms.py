"""How accurately `scale_by_spectral_condition` finds the norms of updates, and what it costs.

    python examples/spectral_norms.py                          # a few minutes
    python examples/spectral_norms.py --quick                  # seconds: one network, few steps
    python examples/spectral_norms.py --seconds                # and the clock, on an idle machine

The first table: networks learn scikit-learn's digits in mini-batches. An optimiser of Optax makes
the updates, and the transform scales them. A number is the largest of 1 - (norm found / norm) over
all matrices and all steps from the sixth on, in per cent. An update is divided by the norm found,
so it exceeds its prescription by as much. All estimators see the same updates. Each starts from the
vector that it found in the update before. Lanczos with k steps and k power iterations have equally
many products, two for each step.

The second table: operations that XLA counts, beside those of one value-and-gradient.
"""

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gnlin
from gnlin.compare.tasks import TASKS
from gnlin.compare.tasks.networks import (
    init_convolutional,
    init_perceptron,
    mean_cross_entropy,
    perceptron,
)
from gnlin.width import condition as spectral

NETWORKS = {
    "MLP 64-128-64-10": ("digits", lambda key: init_perceptron(key, (64, 128, 64, 10))),
    "MLP 64-512-512-10": ("digits", lambda key: init_perceptron(key, (64, 512, 512, 10))),
    "CNN 1-16-32, 128-10": (
        "digits-cnn",
        lambda key: init_convolutional(key, (1, 16, 32), (128, 10)),
    ),
}
INNER = {
    "Adam": optax.scale_by_adam(),
    "SGD": optax.identity(),
    "momentum": optax.trace(0.9),
}
FIRST = 5  # steps that are not counted, after the start from random vectors


def lanczos(matrix, start, steps):
    """``(σ, v)`` as the transform finds them, from a vector `start`."""
    return spectral.leading_pair(matrix, start, 1.0, steps)


def power_iteration(matrix, start, steps):
    """``(σ, v)`` after as many products as `lanczos` has."""
    for _ in range(steps):
        start = (matrix @ start) @ matrix
        start = start / jnp.maximum(jnp.linalg.norm(start), 1e-30)  # a matrix of zeros stays zero
    return jnp.linalg.norm(matrix @ start), start


def estimators(counts) -> dict:
    """A search by name and number of steps, for all of `counts`."""
    searches = {"Lanczos": lanczos, "power": power_iteration}
    return {(name, count): searches[name] for name in searches for count in counts}


def shortfalls(
    network: str, inner: str, batch_size: int, steps: int, counts, rate: float = 0.05
) -> dict:
    """The shortfall of each estimator at every step and matrix, (steps, matrices)."""
    task_name, init = NETWORKS[network]
    task = TASKS[task_name]()
    tx = optax.chain(
        INNER[inner], gnlin.width.scale_by_spectral_condition(), optax.scale_by_learning_rate(rate)
    )
    searches = estimators(counts)

    def matrices(updates):
        return [
            leaf.reshape(-1, leaf.shape[-1]) for leaf in jax.tree.leaves(updates) if leaf.ndim > 1
        ]

    @jax.jit
    def step(params, state, starts, batch):
        grads = jax.grad(task.objective.value)(params, batch)
        updates, state = tx.update(grads, state, params)
        found, short = {}, {}
        exact = [jnp.linalg.norm(matrix, 2) for matrix in matrices(updates)]
        for (name, count), search in searches.items():
            found[name, count], ratios = [], []
            each = zip(matrices(updates), starts[name, count], exact, strict=True)
            for matrix, start, true in each:
                norm, vector = search(matrix, start, count)
                found[name, count].append(vector)
                ratios.append(1 - norm / true)
            short[name, count] = jnp.stack(ratios)
        return optax.apply_updates(params, updates), state, found, short

    train = jax.tree.map(jnp.asarray, task.train)
    params = jax.jit(init)(jax.random.key(0))
    state = tx.init(params)
    generator = np.random.default_rng(0)
    random = [generator.standard_normal(leaf.shape[1]) for leaf in matrices(params)]
    units = [jnp.asarray(vector / np.linalg.norm(vector), jnp.float32) for vector in random]
    starts = dict.fromkeys(searches, units)
    history = []
    for rows in task.batches(0, steps, batch_size):
        batch = jax.tree.map(lambda leaf, r=rows: leaf[r], train)
        params, state, starts, short = step(params, state, starts, batch)
        history.append(jax.device_get(short))
    return {key: np.stack([short[key] for short in history[FIRST:]]) for key in searches}


def accuracy(networks, inners, batch_sizes, steps, counts) -> None:
    """Print the first table."""
    header = [f"{name} {count}" for name, count in estimators(counts)]
    print(f"| network | updates | batch | {' | '.join(header)} |")
    print("|---|---|---:|" + "---:|" * len(header))
    for network, inner, size in itertools.product(networks, inners, batch_sizes):
        found = shortfalls(network, inner, size, steps, counts)
        cells = [f"{100 * max(short.max(), 0):.2f}" for short in found.values()]
        print(f"| {network} | {inner} | {size} | {' | '.join(cells)} |", flush=True)


def flops(function, *args) -> float:
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def seconds(function, *args) -> float:
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*args))
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        taken.append(time.perf_counter() - start)
    return min(taken)  # other processes only add time


def scaling_flops(params, steps: int) -> float:
    """Operations of one update.

    XLA counts the body of a loop once, so the other steps of Lanczos are counted by hand.
    """
    tx = gnlin.width.scale_by_spectral_condition(lanczos_steps=steps)
    once = flops(tx.update, params, tx.init(params))
    body = 0.0
    for leaf in jax.tree.leaves(params):
        if leaf.ndim > 1:
            rows, columns = leaf.shape
            body += 4 * rows * columns + 8 * (rows + columns)  # two products; recurrences, lengths
    return once + (steps - 1) * body


def cost(widths, batch_sizes, steps: int, clock: bool) -> None:
    """Print the second table."""
    params = init_perceptron(jax.random.key(0), widths)
    tx = gnlin.width.scale_by_spectral_condition(lanczos_steps=steps)
    print("| network | batch | operations |" + (" seconds |" if clock else ""))
    print("|---|---:|---:|" + ("---:|" if clock else ""))
    for size in batch_sizes:
        batch = {"x": jnp.ones((size, widths[0])), "y": jnp.zeros(size, jnp.int32)}

        gradient = jax.value_and_grad(lambda p, b: mean_cross_entropy(perceptron(p, b), b))
        cells = [f"{scaling_flops(params, steps) / flops(gradient, params, batch):.1%}"]
        if clock:
            scaling = seconds(tx.update, params, tx.init(params))
            cells.append(f"{scaling / seconds(gradient, params, batch):.0%}")
        print(f"| MLP {'-'.join(map(str, widths))} | {size} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument(
        "--counts",
        type=int,
        nargs="+",
        default=(4, 6, 8),
        help="steps of Lanczos, power iterations",
    )
    parser.add_argument("--quick", action="store_true", help="one network, 20 steps")
    parser.add_argument(
        "--seconds", action="store_true", help="time the scaling and the gradient as well"
    )
    options = parser.parse_args()
    if options.quick:
        accuracy(list(NETWORKS)[:1], ["Adam"], [128], 20, options.counts[-1:])
    else:
        accuracy(NETWORKS, INNER, [32, 128], options.steps, options.counts)
    print()
    cost((64, 256, 10) if options.quick else (64, 1024, 1024, 10), [128, 256], 8, options.seconds)


if __name__ == "__main__":
    main()
