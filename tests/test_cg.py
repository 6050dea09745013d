"""Conjugate gradients as a recurrence: what each step minimises, how it ends, and the loop written
out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from problems import classifier, full_steps

import gnlin


def _system(matrix, damping=0.0):
    return gnlin.System(lambda v: v, lambda u: u, lambda u: matrix @ u, damping)


def _spd(size, seed, spread=2.0):
    q = np.linalg.qr(np.asarray(oracles.normal(size, size, seed=seed)))[0]
    return jnp.asarray(q * np.logspace(0, spread, size) @ q.T)


def _solve(cg, system, rhs, state=None):
    @jax.jit
    def solve(rhs, state):
        solution, state = cg.solve(system, rhs, state)
        return solution.direction, solution.stats, state

    direction, stats, state = solve(rhs, cg.init(rhs)[0] if state is None else state)
    return gnlin.Solution(direction, stats), state


@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "preconditioned"])
def test_each_iterate_is_the_best_of_its_krylov_space(x64, preconditioned):
    matrix, b = np.asarray(_spd(8, 0)), np.asarray(oracles.normal(8, seed=1))
    inverse = np.diag(1 / np.diag(matrix)) if preconditioned else np.eye(8)
    function = (lambda system: lambda v: jnp.asarray(inverse) @ v) if preconditioned else None
    space = np.stack(
        [np.linalg.matrix_power(inverse @ matrix, k) @ inverse @ b for k in range(4)], axis=1
    )
    for k in (1, 2, 4):
        basis = np.linalg.qr(space[:, :k])[0]
        best = basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)
        solution, _ = _solve(
            gnlin.CG(max_iterations=k, rtol=0.0, preconditioner=function),
            _system(jnp.asarray(matrix)),
            jnp.asarray(b),
        )
        np.testing.assert_allclose(solution.direction, best, rtol=1e-9, atol=1e-11)
        residual = np.linalg.norm(b - matrix @ best) / np.linalg.norm(b)
        np.testing.assert_allclose(solution.stats["cg/residual"], residual, rtol=1e-8)


def test_the_first_iterate_within_the_tolerance_is_the_last(x64):
    """The tolerance is relative: a right-hand side of many entries is longer than its largest."""
    matrix, b = _spd(40, 7), jnp.ones(40)
    residuals = []
    for k in range(12):
        solution, _ = _solve(gnlin.CG(max_iterations=k + 1, rtol=0.0), _system(matrix), b)
        residuals.append(float(solution.stats["cg/residual"]))
    rtol = 1.01 * residuals[7]
    solution, _ = _solve(gnlin.CG(max_iterations=50, rtol=rtol), _system(matrix), b)
    assert solution.stats["cg/converged"]
    first = next(k for k, residual in enumerate(residuals) if residual <= rtol)
    assert solution.stats["cg/iterations"] == first + 1


def test_a_warm_start_that_leads_uphill_is_dropped(x64):
    matrix, b = _spd(6, 8), oracles.normal(6, seed=9)
    cg = gnlin.CG(max_iterations=2, rtol=0.0, warm_start=1.0)
    cold, state = _solve(cg, _system(matrix), b)
    warm, _ = _solve(cg, _system(matrix), -b, state)
    np.testing.assert_allclose(warm.direction, -cold.direction, rtol=1e-12)


def _jacobi(system):
    del system
    return lambda v: v / jnp.linspace(1.0, 3.0, v.shape[0], dtype=v.dtype)


SETTINGS = {
    "plain": {"rtol": 0.0},
    "early": {"rtol": 0.2},
    "preconditioned": {"preconditioner": _jacobi, "rtol": 1e-2},
    "warm": {"warm_start": 0.9, "rtol": 1e-2},
    "progress": {"progress_tol": 0.2, "rtol": 0.0},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
def test_unrolled_iterations_are_those_of_the_loop(x64, options):
    rhs = {"a": oracles.normal(9, seed=2)}
    matrix = _spd(9, 3, spread=3.0)
    system = gnlin.System(lambda v: v["a"], lambda u: {"a": u}, lambda u: matrix @ u, 0.1)
    if "preconditioner" in options:
        options = {
            **options,
            "preconditioner": lambda system: lambda v: {"a": _jacobi(system)(v["a"])},
        }
    loop, written = (
        gnlin.CG(max_iterations=14, unroll=unroll, **options) for unroll in (False, True)
    )
    carry = loop.init(rhs)[0]
    for _ in range(2 if "warm_start" in options else 1):
        ours, next_carry = _solve(written, system, rhs, carry)
        theirs, carry = _solve(loop, system, rhs, carry)
        assert jax.tree.structure(carry) == jax.tree.structure(next_carry)
        np.testing.assert_allclose(ours.direction["a"], theirs.direction["a"], rtol=1e-10)
        assert int(ours.stats["cg/iterations"]) == int(theirs.stats["cg/iterations"])
        assert bool(ours.stats["cg/converged"]) == bool(theirs.stats["cg/converged"])
        np.testing.assert_allclose(
            ours.stats["cg/residual"], theirs.stats["cg/residual"], rtol=1e-6
        )
    assert (int(ours.stats["cg/iterations"]) < 14) is (
        options.get("rtol", 0.0) > 0 or "progress_tol" in options
    )


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
def test_breakdown_keeps_what_was_reached(unroll):
    """Two sound steps, then a direction of negative curvature, or a product that is a NaN."""
    b = jnp.ones(3)
    cg = gnlin.CG(max_iterations=6, rtol=0.0, unroll=unroll)
    solution, _ = _solve(cg, _system(jnp.diag(jnp.asarray([1.0, 2.0, -0.1]))), b)
    assert 0 < int(solution.stats["cg/iterations"]) < 3
    assert not solution.stats["cg/converged"]
    assert jnp.max(jnp.abs(solution.direction)) > 0
    broken = _system(jnp.full([3, 3], jnp.nan))
    solution, _ = _solve(cg, broken, b)
    np.testing.assert_array_equal(solution.direction, 0)
    assert int(solution.stats["cg/iterations"]) == 0
    for rhs, converged in ((jnp.zeros(3), True), (jnp.full(3, jnp.nan), False)):
        solution, _ = _solve(cg, _system(jnp.eye(3)), rhs)
        np.testing.assert_array_equal(solution.direction, 0)
        assert bool(solution.stats["cg/converged"]) is converged


def test_progress_rule_is_that_of_martens(x64):
    matrix, b, tolerance = (
        np.asarray(_spd(40, 5, spread=4.0)),
        np.asarray(oracles.normal(40, seed=6)),
        2e-2,
    )
    x, residual, direction, values = np.zeros(40), b, b, [0.0]
    for _ in range(39):
        product = matrix @ direction
        length = residual @ residual / (direction @ product)
        x, before, residual = x + length * direction, residual, residual - length * product
        direction = residual + (residual @ residual) / (before @ before) * direction
        values.append(x @ matrix @ x / 2 - b @ x)
    expected = next(
        k for k in range(11, 40) if (values[k] - values[k - 10]) / values[k] < 10 * tolerance
    )
    cg = gnlin.CG(max_iterations=40, rtol=0.0, progress_tol=tolerance)
    solution, _ = _solve(cg, _system(jnp.asarray(matrix)), jnp.asarray(b))
    assert int(solution.stats["cg/iterations"]) == expected
    assert solution.stats["cg/converged"]


def test_a_warm_start_counts_towards_progress(x64):
    matrix, b = _spd(12, 7), oracles.normal(12, seed=8)
    cg = gnlin.CG(max_iterations=40, rtol=1e-10, progress_tol=1e-6, warm_start=1.0)
    first, carry = _solve(cg, _system(matrix), b)
    again, _ = _solve(cg, _system(matrix), b, carry)
    assert int(again.stats["cg/iterations"]) <= 1 < int(first.stats["cg/iterations"])
    np.testing.assert_allclose(again.direction, first.direction, rtol=1e-8)
    opposite, _ = _solve(cg, _system(matrix), -b, carry)  # φ > 0 there: dropped
    np.testing.assert_allclose(opposite.direction, -first.direction, rtol=1e-8)


def _convolutional():
    kernels = [0.1 * oracles.normal(3, 3, 2, 4, seed=0), 0.1 * oracles.normal(4, 3, seed=1)]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), kernels)
    x = oracles.normal(4, 6, 6, 2, seed=2).astype(jnp.float32)

    def model(params, batch):
        hidden = jax.lax.conv_general_dilated(
            batch, params[0], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(jnp.tanh(hidden), axis=(1, 2)) @ params[1]

    return gnlin.Objective(model, lambda z, batch: jnp.sum(z**2)), params, x


@pytest.mark.parametrize("max_steps", [1, 4])
def test_unrolled_iterations_leave_no_loop(max_steps):
    objective, params, x = _convolutional()

    def compiled(unroll):
        tx = gnlin.scale_by_gauss_newton(
            objective, 0.1, solver=gnlin.CG(max_iterations=max_steps, rtol=0.0, unroll=unroll)
        )
        return (
            jax.jit(lambda p, s, b: tx.update(None, s, p, batch=b))
            .lower(params, tx.init(params), x)
            .compile()
        )

    written, loop = compiled(True), compiled(False)
    assert " while(" not in written.as_text()
    assert " while(" in loop.as_text() or max_steps == 1


def test_unrolled_in_bfloat16_under_scan():
    problem = classifier()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), problem.params)
    cg = gnlin.CG(max_iterations=3, unroll=True, warm_start=0.5)
    tx = full_steps(problem.objective, 0.1, 0.5, solver=cg)

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(None, state, params, batch=batch)
        return (jax.tree.map(jnp.add, params, updates), state), problem.objective.value(
            params, batch
        )

    (params, _), losses = jax.jit(lambda start: jax.lax.scan(step, start, problem.stacked))(
        (params, tx.init(params))
    )
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    assert losses[-1] < losses[0]


def test_unroll_of_a_silly_size_is_refused():
    with pytest.raises(ValueError, match="`unroll` needs `max_iterations` of at most 32; got 50"):
        gnlin.CG(unroll=True)
    with pytest.raises(TypeError, match="`unroll` must be True or False; got 4"):
        gnlin.CG(max_iterations=4, unroll=4)
    assert gnlin.CG(max_iterations=32, unroll=True).unroll
