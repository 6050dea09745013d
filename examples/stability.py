"""Run `gnlin.gauss_newton(objective)` on every task of the comparison: does its loss ever blow up?

    python examples/stability.py                        # everything; an hour or two
    python examples/stability.py digits poisson-pinn    # some tasks
    python examples/stability.py --quick                # one task: half a minute

Batches are of 32, of 128 and of all data. Each row is one run. It has the loss over the training
data at the start, and the largest and the last of 20 evaluations after it. The last cell is the
share of refused steps. Where there are more than 4096 examples, the loss is over the first 4096.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

import gnlin
from gnlin.compare.tasks import TASKS

BATCHES = ("32", "128", "full")
PROBE = 4096
# The data of the first two are not shipped; the network and data of the last are those of chars.
LEFT_OUT = ("mnist", "cifar10", "chars-large-batch")


def losses(task, batch_size: int | None, seed: int, steps: int) -> tuple[list[float], float]:
    """Return ``(loss at the start and at 20 points after it, share of refused steps)``."""
    transform = gnlin.gauss_newton(task.objective)

    @jax.jit
    def step(params, state, batch):
        updates, state = transform.update(None, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    train = jax.tree.map(jnp.asarray, task.train)
    probe = jax.tree.map(lambda leaf: leaf[:PROBE], train)
    value = jax.jit(task.objective.value)
    params = task.init(jax.random.key(seed))
    state = transform.init(params)
    order = None if batch_size is None else task.batches(seed, steps, batch_size)
    found, accepted = [float(value(params, probe))], 0
    for number in range(steps):
        batch = train
        if order is not None:
            batch = jax.tree.map(lambda leaf, examples=order[number]: leaf[examples], train)
        params, state = step(params, state, batch)
        accepted += bool(gnlin.metrics(state)["accepted"])
        if (number + 1) % max(1, steps // 20) == 0:
            found.append(float(value(params, probe)))
    return found, 1 - accepted / steps


def main() -> None:
    shipped = [name for name in TASKS if name not in LEFT_OUT]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", help=", ".join(shipped))
    parser.add_argument(
        "--batches", nargs="+", default=BATCHES, help="numbers of examples, or full"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one task, 20 steps: half a minute")
    options = parser.parse_args()
    names, steps, seeds = options.tasks or shipped, options.steps, options.seeds
    if options.quick:
        names, options.batches, steps, seeds = ["diabetes"], ["32", "full"], 20, 1
    print("| task | batch | seed | start | largest after | last | refused |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in names:
        task = TASKS[name]()
        with task.precision():
            for size in options.batches:
                for seed in range(seeds):
                    batch_size = None if size == "full" else int(size)
                    (start, *after), refused = losses(task, batch_size, seed, steps)
                    print(f"| {name} | {size} | {seed} | {start:.3g} ", end="")
                    print(f"| {max(after):.3g} | {after[-1]:.3g} | {refused:.0%} |", flush=True)


if __name__ == "__main__":
    main()
