"""Levenberg-Marquardt on certified fits and classical problems, and what a rejection may not do."""

import functools

import jax
import jax.numpy as jnp
import nist
import numpy as np
import optax
import pytest

import gnlin
from gnlin.transforms.damping import RadiusState, Trial


def _train(objective, tx, params, batch, steps):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), gnlin.metrics(state)

    return jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=steps))(
        params
    )


@pytest.mark.parametrize("name", nist.MODELS)
def test_certified_fits_to_six_digits_from_both_starts(x64, name):
    fit = nist.load(name)
    objective = gnlin.Objective.least_squares(nist.residuals(name))
    tx = gnlin.levenberg_marquardt(objective, scaling="marquardt", solver=gnlin.Dense())
    batch = {"x": jnp.asarray(fit.x), "y": jnp.asarray(fit.y)}
    train = jax.jit(lambda start: _train(objective, tx, start, batch, 800)[0][0])
    with jax.numpy_rank_promotion("allow"):
        for start in fit.starts:
            assert nist.correct_digits(train(jnp.asarray(start)), fit.certified) >= 6


def test_damping_within_a_radius_agrees_with_a_dense_search(x64):
    """λ by bisection on ‖D^½ (JᵀJ + λD)⁻¹ b‖, from NumPy's solve."""
    rng = np.random.default_rng(0)
    jacobian, b = rng.normal(size=(9, 4)) * [1e3, 1.0, 1.0, 1e-2], rng.normal(size=4)
    scaling = np.array([1e6, 2.0, 0.5, 1e-4])

    @functools.partial(jax.jit, static_argnums=0)
    def solve_within(output_hessian, radius):
        system = gnlin.System(
            lambda v: jacobian @ v,
            lambda u: jacobian.T @ u,
            output_hessian,
            0.0,
            jnp.asarray(scaling),
        )
        solution, _, damping = gnlin.Dense().solve_within(system, jnp.asarray(b), (), radius)
        return solution.direction, damping

    def identity(u):
        return u

    def length(damping):
        x = np.linalg.solve(jacobian.T @ jacobian + damping * np.diag(scaling), b)
        return np.linalg.norm(np.sqrt(scaling) * x)

    for radius in (1e-4 * length(0.0), 0.1 * length(0.0), 0.999 * length(0.0)):
        low, high = 0.0, 1e12
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if length(middle) > radius else (low, middle)
        direction, damping = solve_within(identity, radius)
        np.testing.assert_allclose(damping, middle, rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(np.sqrt(scaling) * direction), radius, rtol=1e-5)

    # Outside the range of a singular H nothing but damping bounds the step.
    direction, _ = solve_within(lambda u: u * (jnp.arange(9) == 0).astype(u.dtype), 0.7)
    np.testing.assert_allclose(np.linalg.norm(np.sqrt(scaling) * direction), 0.7, rtol=1e-5)

    # A radius that does not bind leaves the undamped step.
    direction, damping = solve_within(identity, 2 * length(0.0))
    assert damping < 1e-12
    np.testing.assert_allclose(direction, np.linalg.solve(jacobian.T @ jacobian, b), rtol=1e-9)


@pytest.mark.parametrize(
    ("ratio", "decrease", "length", "expected"),
    [
        (0.9, 1.0, 4.0, 8.0),  # well predicted: twice the step
        (0.5, 1.0, 4.0, 4.0),  # fairly: as it is
        (0.5, 1.0, 1.0, 2.0),  # fairly, but the radius did not bind
        (0.1, 1.0, 4.0, 2.0),  # poorly, downhill: half
        (-1.0, -2.0, 4.0, 1.0),  # uphill: −2α + 4α² through the two losses, its minimum at α = ¼
        (-99.0, -100.0, 4.0, 0.4),  # steeply uphill: a tenth
        (-np.inf, np.nan, 4.0, 0.4),  # not finite
    ],
)
def test_the_radius_follows_the_gain_ratio(ratio, decrease, length, expected):
    policy = gnlin.TrustRegion()
    state = RadiusState(jnp.asarray(4.0))
    slope = -2.0
    trial = Trial(*(jnp.asarray(value) for value in (ratio, decrease, slope, length, 4.0)))
    np.testing.assert_allclose(policy.judge(state, trial)[0].radius, expected, rtol=1e-6)


def test_the_first_radius_is_the_size_of_the_parameters_and_no_longer_than_the_step(x64):
    objective = gnlin.Objective.least_squares(lambda p: p - jnp.asarray([3.5, 4.0]))
    tx = gnlin.levenberg_marquardt(objective, solver=gnlin.Dense())
    params = jnp.asarray([3.0, 4.0])
    _, state = jax.jit(tx.update)(None, tx.init(params), params)
    np.testing.assert_allclose(gnlin.metrics(state)["radius"], 5.0)
    np.testing.assert_allclose(state.damping.radius, 1.0)  # twice the step of ½


def test_a_rejected_step_moves_nothing_and_raises_the_damping():
    # From here the first steps overshoot by orders of magnitude.
    objective = gnlin.Objective.least_squares(lambda p: jnp.exp(p) - 1e-3)
    tx = gnlin.levenberg_marquardt(objective, damping=1e-12)
    params = jnp.asarray([-12.0])
    state, seen, update = tx.init(params), [], jax.jit(tx.update)
    value = jax.jit(objective.value)
    for _ in range(40):
        before = state.damping.damping
        updates, state = update(None, state, params)
        found = gnlin.metrics(state)
        if not found["accepted"]:
            np.testing.assert_array_equal(updates, np.zeros(1))
            assert found["rejections"] > 0
            assert state.damping.damping > before
        else:
            assert value(optax.apply_updates(params, updates)) <= value(params)
            assert found["rejections"] == 0
        seen.append((bool(found["accepted"]), float(before)))
        params = optax.apply_updates(params, updates)
    assert {accepted for accepted, _ in seen} == {True, False}
    np.testing.assert_allclose(params, np.log(1e-3), rtol=1e-4)


def test_a_loss_without_curvature_is_descended():
    """Huber's loss with every residual in its linear part: G = 0, and the gradient is not."""
    x = jnp.arange(1.0, 21.0)
    objective = gnlin.Objective(
        lambda p, batch: p[0] * x + p[1] - (3.0 * x + 50.0),
        lambda r, batch: jnp.sum(optax.huber_loss(r)),
        is_bound=True,
    )
    tx = gnlin.levenberg_marquardt(objective, scaling="marquardt", solver=gnlin.Dense())
    with jax.numpy_rank_promotion("allow"):
        (params, _), found = _train(objective, tx, jnp.zeros(2), None, 60)
    assert found["loss"][0] > 100
    np.testing.assert_allclose(params, [3.0, 50.0], rtol=1e-3)


@pytest.mark.parametrize("factor", [1e-7, 1.0, 1e7])
def test_float32_fits_do_not_depend_on_the_units_of_the_residuals(factor):
    x = jnp.linspace(0.0, 3.0, 20)
    objective = gnlin.Objective.least_squares(
        lambda p: factor * (p[0] * jnp.exp(-p[1] * x) - 2 * jnp.exp(-0.7 * x))
    )
    tx = gnlin.levenberg_marquardt(objective, solver=gnlin.Dense())
    (params, _), _ = _train(objective, tx, jnp.asarray([5.0, 1.0]), None, 60)
    np.testing.assert_allclose(params, [2.0, 0.7], rtol=1e-4)


def test_rejections_do_not_look_like_convergence():
    objective = gnlin.Objective.least_squares(
        lambda p: jnp.abs(p) ** 0.5 + 1.0
    )  # a cusp: no step helps at 0+
    tx = gnlin.levenberg_marquardt(objective)
    _, info = gnlin.minimise(objective, jnp.asarray([1e-12]), tx, max_steps=3, tol=1e-6)
    assert not info.converged


def test_marquardt_scaling_makes_the_iterates_independent_of_units(x64):
    fit = nist.load("Misra1a")
    base = nist.residuals("Misra1a")
    batch = {"x": jnp.asarray(fit.x), "y": jnp.asarray(fit.y)}
    units = jnp.asarray([1e3, 1e-4])
    paths = []
    for factor in (jnp.ones(2), units):
        objective = gnlin.Objective.least_squares(lambda p, b, factor=factor: base(p * factor, b))
        tx = gnlin.levenberg_marquardt(objective, scaling="marquardt", solver=gnlin.Dense())
        (params, _), found = _train(objective, tx, jnp.asarray(fit.starts[0]) / factor, batch, 12)
        paths.append((params * factor, found["loss"]))
    np.testing.assert_allclose(paths[0][1], paths[1][1], rtol=1e-5)
    np.testing.assert_allclose(paths[0][0], paths[1][0], rtol=1e-6)


def test_geodesic_acceleration_of_an_undamped_step_is_chebyshevs_iteration(x64):
    """For one equation r(x) = 0: x − r/r' − r''r²/(2r'³), of third order."""
    objective = gnlin.Objective.least_squares(lambda p: jnp.exp(p) - 3.0)
    tx = gnlin.levenberg_marquardt(
        objective, damping=1e-18, solver=gnlin.Dense(), geodesic_acceleration=0.75
    )
    start = jnp.asarray([1.3])
    updates, state = jax.jit(tx.update)(None, tx.init(start), start)
    slope, residual = np.exp(1.3), np.exp(1.3) - 3.0
    expected = -residual / slope - slope * residual**2 / (2 * slope**3)
    np.testing.assert_allclose(updates, [expected], rtol=1e-12)
    np.testing.assert_allclose(
        gnlin.metrics(state)["acceleration"], 2 * residual / slope, rtol=1e-12
    )
