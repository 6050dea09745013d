"""Compare Gauss-Newton in function space (`gnlin.Dual`) with conjugate gradients.

    python examples/function_space.py             # one network
    python examples/function_space.py --quick     # a smaller network
    python examples/function_space.py --full      # the whole table

The systems are (G + λI) x = gradient of softmax networks, with a λ of 1e-3. Work is in gradients
on the batch. That of the right-hand side and of the linearisation is included. In the columns
"same" conjugate gradients go to the residual that `Dual` reached.

Set OPENBLAS_NUM_THREADS=1 where other programs are at work: the threads of LAPACK wait for each
other.
"""

import argparse
import itertools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

import gnlin
from gnlin.compare.runs.cost import flops
from gnlin.compare.runs.meter import metered

DAMPING = 1e-3
# Widths and number of examples; the last width is C.
QUICK = [((64, 512, 2), 16)]
ONE = [((64, 512, 512, 10), 32)]
FULL = [
    *(((64, 256, 256, 10), examples) for examples in (16, 64, 256)),
    *(((64, 1024, 1024, 1), examples) for examples in (64, 256, 1024)),
    *(((784, 1408, 1408, 640, 10), examples) for examples in (16, 64, 128, 256)),
    *(((784, 1408, 1408, 640, outputs), 64) for outputs in (1, 40)),
]


def network(params, batch):
    hidden = batch["x"]
    for index, (w, b) in enumerate(params):
        hidden = (jnp.tanh(hidden) if index else hidden) @ w + b
    return hidden


def loss(outputs, batch):
    """Softmax cross-entropy, or the squared error of a single output."""
    if outputs.shape[1] == 1:
        return 0.5 * jnp.mean((outputs[:, 0] - batch["y"]) ** 2)
    return jnp.mean(jax.nn.logsumexp(outputs, 1) - outputs[jnp.arange(len(outputs)), batch["y"]])


OBJECTIVE = gnlin.Objective(network, loss)


def problem(widths, examples):
    key = jax.random.key(0)
    sizes = list(itertools.pairwise(widths))
    keys = jax.random.split(key, len(sizes) + 2)
    params = [
        (jax.random.normal(k, s) / s[0] ** 0.5, jnp.zeros(s[1]))
        for k, s in zip(keys, sizes, strict=False)
    ]
    x = jax.random.normal(keys[-1], (examples, widths[0]))
    y = jnp.argmax(x @ jax.random.normal(keys[-2], (widths[0], max(widths[-1], 2))), 1)
    return params, {"x": x, "y": y}


class Cost(NamedTuple):
    work: float  # in gradients
    seconds: float
    residual: float
    stats: dict[str, jax.Array]


def measured(solver, params, batch, unit):
    """Return the `Cost` of one solve."""

    def solve(params, batch):
        model = gnlin.quadratic_model(OBJECTIVE, params, batch)
        system = gnlin.System(model.linear.jvp, model.linear.vjp, model.output_hessian, DAMPING)
        solution, _ = solver.solve(system, model.gradient(), solver.init(params)[0])
        return solution.direction, solution.stats

    meter = metered(solve, params, batch)
    call = jax.jit(meter.call)
    (_, stats), more = jax.block_until_ready(call(params, batch))
    seconds = []
    for _ in range(5):  # the least counts, because other programs only add
        start = time.perf_counter()
        jax.block_until_ready(call(params, batch))
        seconds.append(time.perf_counter() - start)
    residual = next(float(value) for name, value in stats.items() if name.endswith("/residual"))
    return Cost((meter.flops + float(more)) / unit, min(seconds), residual, stats)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all networks: an hour")
    parser.add_argument("--quick", action="store_true", help="a small network: half a minute")
    given = parser.parse_args()
    print("| P | N·C | K, pull-backs | Dual: gradients | ms | residual ", end="")
    print("| CG, 20 iterations: gradients | ms | residual ", end="")
    print("| CG, same: iterations | gradients | ms |\n" + "|---:" * 12 + "|")
    networks = FULL if given.full else QUICK if given.quick else ONE
    for widths, examples in networks:
        params, batch = problem(widths, examples)
        unit = flops(OBJECTIVE.value_and_grad, params, batch)
        dual = measured(gnlin.Dual(), params, batch, unit)
        few = measured(gnlin.CG(max_iterations=20, rtol=0.0), params, batch, unit)
        same = measured(gnlin.CG(max_iterations=1000, rtol=dual.residual), params, batch, unit)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        print(f"| {count:,} | {examples}·{widths[-1]} | {dual.stats['dual/pull_backs']} ", end="")
        for cost in (dual, few):
            print(f"| {cost.work:.1f} | {1e3 * cost.seconds:.0f} | {cost.residual:.0e} ", end="")
        print(f"| {same.stats['cg/iterations']} | {same.work:.1f} ", end="")
        print(f"| {1e3 * same.seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
