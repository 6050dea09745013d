"""Time a step, an iteration of conjugate gradients and compilation: gnlin and other libraries.

    python examples/speed.py            # digits and diabetes, a few minutes
    python examples/speed.py --quick    # half a minute: gnlin alone, few repetitions

Everything is timed in one process in shuffled order. The least of many repetitions counts,
because other programs only add. An iteration is the difference between steps of 25 and of 5
iterations, divided by 20. All iterations are made, because tolerances are zero. lineax and jaxopt
solve the same system with gnlin's products. somax and optimistix (least squares, without damping)
bring their own. Compilation is tracing, lowering and XLA's part, without any cache, and the least
of three. Libraries that are not installed are left out.
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
    """Conjugate gradients of another library as a solver of gnlin."""

    solve_system: object

    def init(self, params):
        return (), {}

    def solve(self, system, rhs, state):
        return gnlin.Solution(self.solve_system(system.matvec, rhs), {}), state


def lineax(iterations):
    import lineax

    def solve(matvec, rhs):
        # The tolerances of lineax are absolute: a large system does not meet the smallest allowed.
        operator = lineax.FunctionLinearOperator(
            lambda v: tree.scale(1e4, matvec(v)),
            jax.eval_shape(lambda: rhs),
            lineax.positive_semidefinite_tag,
        )
        solver = lineax.CG(rtol=0.0, atol=0.0, max_steps=iterations, stabilise_every=None)
        return tree.scale(1e4, lineax.linear_solve(operator, rhs, solver, throw=False).value)

    return Foreign(solve)


def jaxopt(iterations):
    from jaxopt.linear_solve import solve_cg

    return Foreign(lambda matvec, rhs: solve_cg(matvec, rhs, maxiter=iterations, tol=0.0))


def trained_by(make):
    """Turn objective ↦ transformation into task ↦ method, the gradient from the linearisation."""

    def method(task):
        transform = make(task.objective)

        def step(params, state, batch, key):
            updates, state = transform.update(None, state, params, batch=batch)
            return optax.apply_updates(params, updates), state

        return Method(lambda params, batch, key: transform.init(params), step)

    return method


def solved_by(solver):
    def make(objective):
        direction = gnlin.scale_by_gauss_newton(objective, DAMPING, solver=solver)
        return optax.chain(direction, optax.scale_by_learning_rate(0.1))

    return trained_by(make)


def contestant(words, number):
    """Turn a contestant of the comparison into task ↦ method, at a value of its tuned number."""
    entry = parse(words)

    def method(task):
        reason = entry.contestant.reason_absent() or entry.contestant.reason_unfit(task)
        if reason:
            print(f"left out: {entry.label}: {reason}")
        return None if reason else entry.method(task, number)

    return method


def methods(quick):
    """Yield ``(name, iterations or nothing, task ↦ method)``."""
    for iterations in (FEW, MANY):
        yield "gnlin, `CG`", iterations, solved_by(gnlin.CG(max_iterations=iterations, rtol=0.0))
        if not quick:
            yield "jaxopt, `solve_cg`", iterations, solved_by(jaxopt(iterations))
            if importlib.util.find_spec("lineax"):
                yield "lineax, `CG`", iterations, solved_by(lineax(iterations))
            words = f"somax-sgn:damping={DAMPING},rtol=0,max_iterations={iterations}"
            yield "somax, `sgn`", iterations, contestant(words, 0.1)
            words = f"optimistix-gn:solver=cg,rtol=0,max_iterations={iterations}"
            yield "optimistix, `GaussNewton`", iterations, contestant(words, 1.0)
    yield "gnlin, defaults", None, trained_by(gnlin.gauss_newton)
    if not quick:
        yield "kfac-jax", None, contestant("kfac", 1.0)


def compiled(method, params, state, batch, key, repetitions):
    """Return ``(executable, seconds to trace, lower and compile)``."""
    seconds = []
    for _ in range(repetitions):
        jax.clear_caches()
        start = time.perf_counter()
        step = jax.jit(lambda *arguments: method.step(*arguments))
        executable = step.lower(params, state, batch, key).compile()
        seconds.append(time.perf_counter() - start)
    return executable, min(seconds)


def measure(task, examples, quick):
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[:examples]), task.train)
    params, key = task.init(jax.random.key(0)), jax.random.key(1)
    gradient = jax.jit(task.objective.value_and_grad).lower(params, batch).compile()
    calls, compilation, seconds = {None: lambda: gradient(params, batch)}, {}, {None: []}
    repetitions = 1 if quick else 3
    for name, iterations, build in methods(quick):
        method = build(task)
        if method is None:
            continue
        state = method.init(params, batch, key)
        step, took = compiled(method, params, state, batch, key, repetitions)
        compilation[name, iterations] = took
        calls[name, iterations] = lambda run=step, state=state: run(params, state, batch, key)
        seconds[name, iterations] = []
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
    problems = [("digits", 256), ("digits", None), ("diabetes", None)]
    for name, examples in problems[-1:] if quick else problems:
        task = TASKS[name]()
        size = examples or task.train_size
        best, compilation = measure(task, size, quick)
        print(f"\n{name}, {size} examples; a gradient takes {best[None]:.2f} ms\n")
        print("| method | ms for an iteration | ms for a step | compilation, s |")
        print("|---|---:|---:|---:|")
        for method, iterations in compilation:
            if iterations == FEW:
                continue
            iteration = ""
            if iterations:
                per_iteration = (best[method, MANY] - best[method, FEW]) / (MANY - FEW)
                iteration = f"{per_iteration:.3f}"
            print(f"| {method} | {iteration} | {best[method, iterations]:.2f} ", end="")
            print(f"| {compilation[method, iterations]:.2f} |")


if __name__ == "__main__":
    main()
