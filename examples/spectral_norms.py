"""How accurately `scale_by_spectral_condition` knows the norms of updates while a network trains,
and what it costs.

python examples/spectral_norms.py                          # a few minutes
python examples/spectral_norms.py --quick                  # seconds: one network, few steps
python examples/spectral_norms.py --seconds                # and the clock, on an idle machine

The first table: networks trained on scikit-learn's digits in mini-batches, by an optimiser of Optax
whose updates are scaled. A number is the largest of 1 - (norm found / norm) over all matrices and
all steps from the sixth on, in per
cent: an update that is divided by the norm found exceeds its prescription by as much. All estimates
see the same updates, and each starts from the vector that it found in the one before; k steps of
Lanczos and k power iterations have the same products, two for each step. The second table:
operations that XLA counts, beside those of one value-and-gradient.
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
FIRST = 5  # steps that a start from random vectors is given


def lanczos(matrix, start, steps):
    """``(σ, v)`` as the transform finds them."""
    return spectral.leading_pair(matrix, start, 1.0, steps)


def power_iteration(matrix, start, steps):
    """``(σ, v)`` after as many products as `lanczos` has."""
    for _ in range(steps):
        start = (matrix @ start) @ matrix
        start = start / jnp.maximum(jnp.linalg.norm(start), 1e-30)
    return jnp.linalg.norm(matrix @ start), start


def estimators(counts):
    searches = {"Lanczos": lanczos, "power": power_iteration}
    return {(name, count): searches[name] for name in searches for count in counts}


def shortfalls(
    network: str, inner: str, batch_size: int, steps: int, counts, rate: float = 0.05
) -> dict:
    """Of each estimator the shortfall at every step and matrix, (steps, matrices)."""
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
    def step(params, state, kept, batch):
        grads = jax.grad(task.objective.value)(params, batch)
        updates, state = tx.update(grads, state, params)
        found, short = {}, {}
        exact = [jnp.linalg.norm(matrix, 2) for matrix in matrices(updates)]
        for key, search in searches.items():
            pairs = [
                search(matrix, start, key[1])
                for matrix, start in zip(matrices(updates), kept[key], strict=True)
            ]
            found[key] = [vector for _, vector in pairs]
            short[key] = jnp.stack(
                [1 - norm / true for (norm, _), true in zip(pairs, exact, strict=True)]
            )
        return optax.apply_updates(params, updates), state, found, short

    train = jax.tree.map(jnp.asarray, task.train)
    params = jax.jit(init)(jax.random.key(0))
    state = tx.init(params)
    generator = np.random.default_rng(0)
    starts = [generator.standard_normal(leaf.shape[1]) for leaf in matrices(params)]
    kept = {
        key: [jnp.asarray(v / np.linalg.norm(v), jnp.float32) for v in starts] for key in searches
    }
    seen = []
    for rows in task.batches(0, steps, batch_size):
        params, state, kept, short = step(
            params, state, kept, jax.tree.map(lambda leaf, r=rows: leaf[r], train)
        )
        seen.append(jax.device_get(short))
    return {key: np.stack([short[key] for short in seen[FIRST:]]) for key in searches}


def accuracy(networks, inners, batch_sizes, steps, counts) -> None:
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
    return min(taken)


def scaling_flops(params, steps: int) -> float:
    """Operations of one update. XLA counts the body of a loop once, so the steps of Lanczos are counted apart."""
    tx = gnlin.width.scale_by_spectral_condition(lanczos_steps=steps)
    once = flops(tx.update, params, tx.init(params))
    body = 0.0
    for leaf in jax.tree.leaves(params):
        if leaf.ndim > 1:
            rows, columns = leaf.shape
            body += 4 * rows * columns + 8 * (rows + columns)  # two products; recurrences, lengths
    return once + (steps - 1) * body


def cost(widths, batch_sizes, steps: int, clock: bool) -> None:
    params = init_perceptron(jax.random.key(0), widths)
    tx = gnlin.width.scale_by_spectral_condition(lanczos_steps=steps)
    print("| network | batch | operations |" + (" seconds |" if clock else ""))
    print("|---|---:|---:|" + ("---:|" if clock else ""))
    for size in batch_sizes:
        batch = {"x": jnp.ones((size, widths[0])), "y": jnp.zeros(size, jnp.int32)}

        def gradient(params, batch):
            return jax.value_and_grad(lambda p: mean_cross_entropy(perceptron(p, batch), batch))(
                params
            )

        cells = [f"{scaling_flops(params, steps) / flops(gradient, params, batch):.1%}"]
        if clock:
            cells.append(
                f"{seconds(tx.update, params, tx.init(params)) / seconds(gradient, params, batch):.0%}"
            )
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
