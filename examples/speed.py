"""Time of a step, of an iteration of conjugate gradients and of compilation: gnlin beside other
libraries.

python examples/speed.py            # digits and diabetes, a few minutes
python examples/speed.py --quick    # half a minute: gnlin alone, few repetitions

Everything is timed in one process in shuffled order, and the least of many repetitions counts:
other programs only add. An iteration is the difference between steps of 25 and of 5 iterations, all
of which are made (tolerances are zero). lineax and jaxopt solve the same system with gnlin's
products; somax and optimistix (least squares, without damping) bring their own. Compilation is
tracing, lowering and XLA's part, without any cache, and the least of three. What is not installed
is left out.
"""

import argparse
import dataclasses
import importlib.util
import random
import time

import jax
import jax.numpy as jnp
import optax

import gnlin
from gnlin import tree
from gnlin.compare.entrants.entry import parse
from gnlin.compare.entrants.method import Method
from gnlin.compare.tasks import TASKS

DAMPING = 0.05
FEW, MANY = 5, 25


@dataclasses.dataclass(frozen=True)
class Foreign:
    """Another library's conjugate gradients as a solver of `gnlin.gauss_newton`."""

    solve_system: object

    def init(self, params):
        return (), {}

    def solve(self, system, rhs, carry):
        return gnlin.solve.system.Solution(self.solve_system(system.matvec, rhs), {}), carry


def lineax(steps):
    import lineax

    def solve(matvec, rhs):
        # Its tolerances are absolute at heart: a large system does not meet the smallest that it
        # allows.
        operator = lineax.FunctionLinearOperator(
            lambda v: tree.scale(1e4, matvec(v)),
            jax.eval_shape(lambda: rhs),
            lineax.positive_semidefinite_tag,
        )
        solver = lineax.CG(rtol=0.0, atol=0.0, max_steps=steps, stabilise_every=None)
        return tree.scale(1e4, lineax.linear_solve(operator, rhs, solver, throw=False).value)

    return Foreign(solve)


def jaxopt(steps):
    from jaxopt.linear_solve import solve_cg

    return Foreign(lambda matvec, rhs: solve_cg(matvec, rhs, maxiter=steps, tol=0.0))


def trained_by(make):
    """Task ↦ method, from objective ↦ transformation; the gradient is taken from the linearisation."""

    def method(task):
        transform = make(task.objective)

        def step(params, state, batch, key):
            updates, state = transform.update(None, state, params, batch=batch)
            return optax.apply_updates(params, updates), state

        return Method(lambda params, batch, key: transform.init(params), step)

    return method


def solved_by(solver):
    return trained_by(lambda objective: gnlin.gauss_newton(0.1, objective, DAMPING, solver=solver))


def contestant(words, number):
    """A contestant of the comparison, at the given value of its tuned number."""
    entry = parse(words)

    def method(task):
        reason = entry.contestant.reason_absent() or entry.contestant.reason_unfit(task)
        if reason:
            print(f"left out: {entry.label}: {reason}")
        return None if reason else entry.method(task, number)

    return method


def methods(quick):
    """``(name, iterations or nothing, task ↦ method)``."""
    for steps in (FEW, MANY):
        yield "gnlin, `CG`", steps, solved_by(gnlin.CG(max_steps=steps, rtol=0.0))
        if not quick:
            yield "jaxopt, `solve_cg`", steps, solved_by(jaxopt(steps))
            if importlib.util.find_spec("lineax"):
                yield "lineax, `CG`", steps, solved_by(lineax(steps))
            words = f"somax-sgn:damping={DAMPING},rtol=0,max_steps={steps}"
            yield "somax, `sgn`", steps, contestant(words, 0.1)
            words = f"optimistix-gn:solver=cg,rtol=0,max_steps={steps}"
            yield "optimistix, `GaussNewton`", steps, contestant(words, 1.0)
    yield "gnlin, defaults", None, trained_by(lambda objective: gnlin.gauss_newton(1.0, objective))
    if not quick:
        yield "kfac-jax", None, contestant("kfac", 1.0)


def compiled(method, params, state, batch, key, repetitions):
    """``(executable, seconds to trace, lower and compile)``."""
    seconds = []
    for _ in range(repetitions):
        jax.clear_caches()
        start = time.perf_counter()
        executable = (
            jax.jit(lambda *arguments: method.step(*arguments))
            .lower(params, state, batch, key)
            .compile()
        )
        seconds.append(time.perf_counter() - start)
    return executable, min(seconds)


def measure(task, examples, quick):
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[:examples]), task.train)
    params, key = task.init(jax.random.key(0)), jax.random.key(1)
    gradient = jax.jit(task.objective.value_and_grad).lower(params, batch).compile()
    calls, compilation, seconds = {None: lambda: gradient(params, batch)}, {}, {None: []}
    for name, steps, build in methods(quick):
        method = build(task)
        if method is None:
            continue
        state = method.init(params, batch, key)
        executable, compilation[name, steps] = compiled(
            method, params, state, batch, key, 1 if quick else 3
        )
        calls[name, steps] = lambda run=executable, state=state: run(params, state, batch, key)
        seconds[name, steps] = []
    for _ in range(3 if quick else 60):
        for name in random.sample(list(calls), len(calls)):
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            seconds[name].append(time.perf_counter() - start)
    best = {name: 1e3 * min(times) for name, times in seconds.items()}
    return best, compilation


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="gnlin alone, few repetitions: half a minute"
    )
    quick = parser.parse_args().quick
    for name, examples in (
        [("diabetes", None)] if quick else [("digits", 256), ("digits", None), ("diabetes", None)]
    ):
        task = TASKS[name]()
        best, compilation = measure(task, examples or task.train_size, quick)
        print(
            f"\n{name}, {examples or task.train_size} examples; a gradient takes {best[None]:.2f} ms\n"
        )
        print(
            "| method | ms for an iteration | ms for a step | compilation, s |\n|---|---:|---:|---:|"
        )
        for method, steps in compilation:
            if steps != FEW:
                iteration = (
                    f"{(best[method, MANY] - best[method, FEW]) / (MANY - FEW):.3f}"
                    if steps
                    else ""
                )
                print(
                    f"| {method} | {iteration} | {best[method, steps]:.2f} | {compilation[method, steps]:.2f} |"
                )


if __name__ == "__main__":
    main()
