"""Count the iterations and the work that a preconditioner saves conjugate gradients.

    python examples/preconditioners.py            # one task, one seed: minutes
    python examples/preconditioners.py --full     # three tasks, three seeds: hours

The systems are Gauss-Newton's, (G + λI) x = gradient, on the full batch of tasks of `gnlin
compare`. The parameters are those that `gnlin.gauss_newton` has trained for 5 and for 30 steps.
Each preconditioner has seen the systems of the five steps before, as it would have in training.
All solves stop at the same relative residual.

Work is that of the whole step, in gradients. Gradient, linearisation and preconditioner are
included. A sketch may serve several systems, and each of them then bears its share.
"""

import argparse
from statistics import median

import jax
import jax.numpy as jnp
import optax

import gnlin
from gnlin.compare.runs.cost import flops
from gnlin.compare.runs.meter import metered
from gnlin.compare.tasks import TASKS

SEEN, MAX_ITERATIONS = 5, 1000
PRECONDITIONERS = {
    "none": None,
    "Jacobi": gnlin.Jacobi(),
    "Nyström": gnlin.Nystrom(),
    "Kronecker": gnlin.Kronecker(),
}
VARIANTS = {
    "Jacobi, α = ½": gnlin.Jacobi(0.5),
    "Nyström, rank 50": gnlin.Nystrom(50),
    "Nyström, one for ten": gnlin.Nystrom(refresh_every=10),
}


def trained(task, seed, steps):
    """Stack the parameters before each of the steps and after the last."""
    tx = gnlin.gauss_newton(task.objective)

    def step(training, _):
        params, opt_state = training
        updates, opt_state = tx.update(None, opt_state, params, batch=task.train)
        return (optax.apply_updates(params, updates), opt_state), params

    start = task.init(jax.random.key(seed))
    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=steps))
    (last, _), before = run(start)
    return jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), before, last)


class Solves:
    """The systems of one task under one preconditioner."""

    def __init__(self, task, preconditioner):
        self.task, self.preconditioner = task, preconditioner
        params = jax.eval_shape(task.init, jax.random.key(0))
        opt_state = jax.eval_shape(self._transform(0.0, 0.0).init, params)
        self.unit = flops(task.objective.value_and_grad, params, task.train)
        self.meter = metered(self._step, jnp.float32(0), jnp.float32(0), params, opt_state)
        self.call = jax.jit(self.meter.call)

    def _transform(self, damping, rtol):
        solver = gnlin.CG(
            max_iterations=MAX_ITERATIONS, rtol=rtol, preconditioner=self.preconditioner
        )
        return gnlin.scale_by_gauss_newton(self.task.objective, damping, solver=solver)

    def _step(self, damping, rtol, params, opt_state):
        return self._transform(damping, rtol).update(None, opt_state, params, batch=self.task.train)

    def _counted(self, damping, rtol, params, opt_state):
        (_, opt_state), more = self.call(damping, jnp.float32(rtol), params, opt_state)
        return opt_state, (self.meter.flops + float(more)) / self.unit

    def __call__(self, iterates, steps, damping, rtols):
        """Return ``(iterations, work in gradients)`` for each tolerance, at one number of steps."""
        now = jax.tree.map(lambda leaf: leaf[steps], iterates)
        opt_state, works = self._transform(damping, 1.0).init(now), []
        for i in range(steps - SEEN, steps):
            params = jax.tree.map(lambda leaf, i=i: leaf[i], iterates)
            # A tolerance of 1 prepares the preconditioner and makes no iteration.
            opt_state, work = self._counted(damping, 1.0, params, opt_state)
            works.append(work)
        period = getattr(self.preconditioner, "refresh_every", 1)
        share = (works[0] - works[-1]) / period if period > 1 else 0.0
        return [
            self._figures(*self._counted(damping, rtol, now, opt_state), share) for rtol in rtols
        ]

    def _figures(self, opt_state, work, share):
        found = gnlin.metrics(opt_state)
        if not found["cg/converged"]:
            return MAX_ITERATIONS + 1, float("inf")
        return int(found["cg/iterations"]), work + share


def shown(results):
    iterations, work = (median(column) for column in zip(*results, strict=True))
    if iterations > MAX_ITERATIONS:
        return f"> {MAX_ITERATIONS}"
    return f"{iterations:.0f} ({work:.0f})"


def print_tables(name, preconditioners, dampings, seeds, stages, rtols=(1e-1, 1e-2, 1e-4)):
    task = TASKS[name]()
    iterates = [trained(task, seed, max(stages)) for seed in range(seeds)]
    cells = {}
    for label, preconditioner in preconditioners.items():
        solves = Solves(task, preconditioner)
        for steps in stages:
            for damping in dampings:
                found = [solves(each, steps, jnp.float32(damping), rtols) for each in iterates]
                for rtol, results in zip(rtols, zip(*found, strict=True), strict=True):
                    cells[steps, rtol, damping, label] = shown(results)
    for steps in stages:
        for rtol in rtols:
            print(f"\n{name} after {steps} steps, residual {rtol:g}:", end=" ")
            print(f"iterations (gradients), median of {seeds} seeds\n")
            print("| λ | " + " | ".join(preconditioners) + " |")
            print("|---" * (len(preconditioners) + 1) + "|")
            for damping in dampings:
                row = [cells[steps, rtol, damping, label] for label in preconditioners]
                print(f"| {damping:g} | " + " | ".join(row) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two columns, one λ: half a minute")
    parser.add_argument(
        "--full", action="store_true", help="three seeds, variants, five λ, early and late: hours"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="these tasks")
    parser.add_argument("--dampings", nargs="+", type=float, help="these λ")
    given = parser.parse_args()
    chosen = PRECONDITIONERS | (VARIANTS if given.full else {})
    dampings = given.dampings or ([1e-1, 1e-2, 1e-3, 1e-4, 1e-5] if given.full else [1e-1, 1e-3])
    seeds, stages = (3, (5, 30)) if given.full else (1, (5,))
    default = ["digits", "diabetes", "digits-autoencoder"] if given.full else ["diabetes"]
    for name in given.tasks or default:
        if given.quick:
            few = {label: PRECONDITIONERS[label] for label in ("none", "Nyström")}
            print_tables(name, few, [1e-2], seeds, stages, rtols=(1e-1, 1e-4))
        else:
            print_tables(name, chosen, dampings, seeds, stages)


if __name__ == "__main__":
    main()
