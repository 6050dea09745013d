"""Products, solves and trajectories against dense references derived differently, in float64."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import nist
import numpy as np
import optax
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from problems import enable_x64, full_steps, tolerance

import gnlin

# Products run through a dozen roundings on numbers of order ten.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


class Case(NamedTuple):
    name: str
    model: object
    loss: object
    batch: object


def _hidden(params, batch):
    return jnp.tanh(batch["x"] @ params["in"] + params["bias"][None, :])


def _squared(outputs, batch):
    return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(outputs)) / batch["x"].shape[0]


def _weighted_cross_entropy(outputs, batch):
    losses = jax.nn.logsumexp(outputs, axis=-1) - jnp.sum(outputs * batch["labels"], axis=-1)
    return jnp.sum(batch["weights"] * losses) / jnp.sum(batch["weights"])


@functools.cache
def _cases():
    with enable_x64(True):
        return _built()


def _built():
    x = oracles.normal(7, 3, seed=0)
    labels = jax.nn.one_hot(jnp.arange(7) % 4, 4, dtype=x.dtype)
    mask = jnp.asarray([1.0, 0, 1, 1, 0, 1, 1])
    tokens = jnp.broadcast_to(labels[:, None, :], (7, 2, 4))

    def outputs(params, batch):
        return _hidden(params, batch) @ params["out"]

    def scalar(params, batch):
        return jnp.mean(outputs(params, batch))

    def sequence(params, batch):
        z = outputs(params, batch)
        return jnp.stack([z, 2.0 * z + 1.0], axis=1)

    def pytree(params, batch):
        z = outputs(params, batch)
        return {"a": z[:, 0], "b": (z[:, 1:], jnp.sum(z))}

    weights2 = jnp.stack([mask, 1.0 + mask], axis=1)
    return [
        Case("scalar", scalar, lambda z, batch: jnp.cosh(z), {"x": x}),
        Case("squared (N, C)", outputs, _squared, {"x": x}),
        Case(
            "softmax (N, C)",
            outputs,
            _weighted_cross_entropy,
            {"x": x, "labels": labels, "weights": jnp.ones(7)},
        ),
        Case(
            "masked softmax",
            outputs,
            _weighted_cross_entropy,
            {"x": x, "labels": labels, "weights": mask},
        ),
        Case(
            "softmax (N, T, C)",
            sequence,
            _weighted_cross_entropy,
            {"x": x, "labels": tokens, "weights": weights2},
        ),
        Case("pytree", pytree, _squared, {"x": x}),
    ]


def _params():
    return {
        "in": oracles.normal(3, 5, seed=1),
        "bias": oracles.normal(5, seed=2),
        "out": oracles.normal(5, 4, seed=3),
        "none": None,
    }


@pytest.fixture(
    params=range(6),
    ids=lambda index: ["scalar", "squared", "softmax", "masked", "tokens", "pytree"][index],
)
def problem(request, x64):
    case = _cases()[request.param]
    return gnlin.Objective(case.model, case.loss), _params(), case.batch


def _flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def test_ggn_product_is_the_hessian_of_the_loss_on_the_linearised_model(problem):
    objective, params, batch = problem
    vector = jax.tree.map(lambda leaf: jnp.cos(3.0 * leaf), params)
    product = jax.jit(lambda p, b, v: gnlin.ggn_vector_product(objective, p, b)(v))(
        params, batch, vector
    )
    np.testing.assert_allclose(
        _flat(product), oracles.ggn_matrix(objective, params, batch) @ _flat(vector), **CLOSE
    )


def test_quadratic_model_is_the_second_order_expansion(problem):
    objective, params, batch = problem
    step = jax.tree.map(lambda leaf: 0.1 * jnp.sin(leaf), params)

    @jax.jit
    def expand(params, batch, step):
        model = gnlin.quadratic_model(objective, params, batch)
        return model.change(step), model(step), objective.value(params, batch)

    change, value, at_anchor = expand(params, batch, step)
    g, matrix, d = (
        oracles.gradient(objective, params, batch),
        oracles.ggn_matrix(objective, params, batch),
        _flat(step),
    )
    np.testing.assert_allclose(change, g @ d + d @ matrix @ d / 2, **CLOSE)
    np.testing.assert_allclose(value, at_anchor + g @ d + d @ matrix @ d / 2, **CLOSE)


@pytest.mark.parametrize(
    "solver", [gnlin.CG(max_iterations=400, rtol=1e-13), gnlin.Dense()], ids=["cg", "dense"]
)
def test_damped_solve_agrees_with_numpy_for_any_right_hand_side(problem, solver):
    objective, params, batch = problem
    rhs = jax.tree.map(lambda leaf: jnp.sin(7.0 * leaf) + 0.3, params)
    curvature = oracles.ggn_matrix(objective, params, batch)

    @jax.jit
    def solve(damping):
        tx = gnlin.scale_by_gauss_newton(objective, damping, solver=solver)
        return tx.update(rhs, tx.init(params), params, batch=batch)

    for damping in (1e-2, 3.0):
        step, state = solve(damping)
        expected = np.linalg.solve(curvature + damping * np.eye(len(curvature)), _flat(rhs))
        np.testing.assert_allclose(_flat(step), expected, rtol=1e-8, atol=1e-9)
        assert gnlin.metrics(state)[f"{type(solver).__name__.lower()}/converged"]


def test_without_updates_the_right_hand_side_is_the_gradient_and_curvature_may_have_its_own_batch(
    problem,
):
    objective, params, batch = problem
    other = {**batch, "x": batch["x"][::-1] * 0.5}
    tx = gnlin.scale_by_gauss_newton(objective, 0.5, solver=gnlin.Dense())
    step, _ = jax.jit(tx.update)(None, tx.init(params), params, batch=batch, curvature_batch=other)
    matrix = oracles.ggn_matrix(objective, params, other) + 0.5 * np.eye(len(_flat(params)))
    expected = np.linalg.solve(matrix, oracles.gradient(objective, params, batch))
    np.testing.assert_allclose(_flat(step), expected, rtol=1e-9, atol=1e-10)


@functools.partial(jax.jit, static_argnums=0)
def _small_solve(solver, rhs):
    objective = gnlin.Objective.least_squares(
        lambda p: jnp.asarray([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0]]) @ p
    )
    tx = gnlin.scale_by_gauss_newton(objective, 0.0, solver=solver)
    return tx.update(rhs, tx.init(rhs), jnp.ones(2))[0]


@given(size=st.floats(-300, 300), seed=st.integers(0, 2**31))
def test_solves_are_free_of_scale(size, seed):
    with enable_x64(True):
        rhs = np.random.default_rng(seed).standard_normal(2) * 10.0**size
        for solver in (gnlin.CG(rtol=1e-12), gnlin.Dense()):
            step = _small_solve(solver, rhs)
            np.testing.assert_allclose(
                step, np.linalg.solve([[5.0, 3.0], [3.0, 11.0]], rhs), rtol=1e-8
            )


@pytest.mark.parametrize("solver", [gnlin.CG(warm_start=0.9), gnlin.Dense()], ids=["cg", "dense"])
def test_zero_and_non_finite_right_hand_sides_give_finite_steps(solver):
    objective = gnlin.Objective.least_squares(lambda p: 2.0 * p)
    tx = gnlin.scale_by_gauss_newton(objective, 0.0, solver=solver)
    params, update = jnp.ones(3), jax.jit(tx.update)
    name = type(solver).__name__.lower()
    for rhs, converged in (
        (jnp.zeros(3), True),
        (jnp.full(3, jnp.nan), False),
        (jnp.full(3, 1e-38), True),
    ):
        step, state = update(rhs, tx.init(params), params)
        assert np.all(np.isfinite(step))
        assert bool(gnlin.metrics(state)[f"{name}/converged"]) is converged


def test_preconditioner_warm_start_and_progress_rule_change_the_work_and_not_the_answer(x64):
    scales = jnp.asarray([1.0, 10.0, 100.0, 1000.0, 3.0, 30.0])
    matrix = jnp.diag(scales) + 0.1 * oracles.normal(6, 6, seed=4)
    objective = gnlin.Objective.least_squares(lambda p: matrix @ p)
    exact = np.linalg.solve(np.asarray(matrix.T @ matrix), np.ones(6))

    def jacobi(system):
        diagonal = jnp.sum(matrix**2, axis=0) + system.damping
        return lambda vector: vector / diagonal

    def solve(solver, times=1):
        tx = gnlin.scale_by_gauss_newton(objective, 0.0, solver=solver)
        state, update = tx.init(jnp.ones(6)), jax.jit(tx.update)
        for _ in range(times):
            step, state = update(jnp.ones(6), state, jnp.ones(6))
        return step, int(gnlin.metrics(state)["cg/iterations"])

    plain, plain_steps = solve(gnlin.CG(max_iterations=200, rtol=1e-10))
    fast, fast_steps = solve(gnlin.CG(max_iterations=200, rtol=1e-10, preconditioner=jacobi))
    _, warm_steps = solve(gnlin.CG(max_iterations=200, rtol=1e-8, warm_start=1.0), times=2)
    _, stalled_steps = solve(gnlin.CG(max_iterations=200, rtol=0.0, progress_tol=0.5))
    np.testing.assert_allclose(plain, exact, rtol=1e-6)
    np.testing.assert_allclose(fast, exact, rtol=1e-6)
    assert fast_steps < plain_steps
    assert warm_steps <= 1
    assert 10 < stalled_steps < 30


MOMENTUM = optax.sgd(0.3, momentum=0.9)  # one, so that the reference is compiled once


@pytest.mark.parametrize("quadratic", [False, True], ids=["exact", "quadratic"])
@pytest.mark.parametrize("period", [1, 2, 5, 16, None])
def test_trajectories_equal_the_two_nested_loops(x64, period, quadratic):
    case = _cases()[3]
    objective, params = gnlin.Objective(case.model, case.loss), _params()
    batches = [{**case.batch, "x": case.batch["x"] + 0.1 * i} for i in range(18)]
    inner = MOMENTUM
    expected = oracles.iterative_linearisation(
        objective, inner, params, batches, period, quadratic=quadratic
    )

    model = "quadratic" if quadratic else "exact"
    chained = optax.chain(gnlin.linearise_gradients(objective, period, loss_model=model), inner)
    wrapped = gnlin.iterative_linearisation(inner, objective, period, loss_model=model)
    for tx in (chained, wrapped):
        update = jax.jit(tx.update)
        now, state = params, tx.init(params)
        for batch, iterate in zip(batches, expected, strict=True):
            updates, state = update(None, state, now, batch=batch)
            now = optax.apply_updates(now, updates)
            np.testing.assert_allclose(_flat(now), iterate, rtol=1e-9, atol=1e-10)


def test_period_one_is_the_inner_optimiser():
    case = _cases()[1]
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (_params(), case.batch))
    params, batch = cast
    objective = gnlin.Objective(case.model, case.loss)
    inner = optax.adam(1e-2)
    tx = optax.chain(gnlin.linearise_gradients(objective, 1), inner)
    ours, theirs = (params, tx.init(params)), (params, inner.init(params))

    @jax.jit
    def step(ours, theirs):
        updates, state = tx.update(None, ours[1], ours[0], batch=batch)
        ours = optax.apply_updates(ours[0], updates), state
        grads = objective.value_and_grad(theirs[0], batch)[1]
        updates, state = inner.update(grads, theirs[1], theirs[0])
        return ours, (optax.apply_updates(theirs[0], updates), state)

    with jax.numpy_dtype_promotion("standard"):  # inside Optax's Adam
        for _ in range(5):
            ours, theirs = step(ours, theirs)
    np.testing.assert_allclose(_flat(ours[0]), _flat(theirs[0]), **tolerance(jnp.float32))


def test_prox_linear_is_one_cycle_on_one_batch(x64):
    case = _cases()[2]
    objective, params = gnlin.Objective(case.model, case.loss), _params()
    inner = optax.sgd(0.2, momentum=0.5)
    expected = oracles.iterative_linearisation(objective, inner, params, [case.batch] * 6, None)[-1]
    tx = gnlin.prox_linear(inner, objective, steps=6)
    updates, _ = jax.jit(tx.update)(None, tx.init(params), params, batch=case.batch)
    np.testing.assert_allclose(
        _flat(optax.apply_updates(params, updates)), expected, rtol=1e-10, atol=1e-11
    )


def test_line_search_is_never_worse_than_not_moving():
    objective = gnlin.Objective.least_squares(
        lambda p: jnp.stack([10.0 * (p[1] - p[0] ** 2), 1.0 - p[0]])
    )
    tx = gnlin.iterative_linearisation(
        optax.sgd(0.05), objective, 3, line_search=(1.0, 0.3, 0.1, 0.01)
    )
    params, losses = jnp.asarray([-1.2, 1.0]), []
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, after = tx.update(None, state, params)
        return optax.apply_updates(params, updates), after, objective.value(params)

    for _ in range(30):
        moves = bool(state.linearised.period.moves)
        params, state, loss = step(params, state)
        losses += [float(loss)] if moves else []
    assert np.all(np.diff(losses) <= 1e-5 * np.abs(losses[:-1]))
    assert losses[-1] < losses[0]


def _linear_problem():
    jacobian = oracles.normal(4, 9, seed=8)
    target = oracles.normal(4, seed=9)
    return (
        np.asarray(jacobian),
        np.asarray(target),
        gnlin.Objective.least_squares(lambda p: jacobian @ p - target),
    )


def test_a_long_cycle_on_a_squared_loss_reaches_the_minimum_norm_step(x64):
    jacobian, target, objective = _linear_problem()
    start = oracles.normal(9, seed=10)
    tx = optax.chain(
        gnlin.linearise_gradients(objective, None), optax.sgd(1 / np.linalg.norm(jacobian, 2) ** 2)
    )

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=4000)
    minimum_norm = -np.linalg.pinv(jacobian) @ (jacobian @ start - target)
    np.testing.assert_allclose(params - start, minimum_norm, atol=1e-9)


def test_k_steps_filter_as_damping_does_at_one_over_eta_k(x64):
    """(1 − (1 − ησ²)^K)/σ² and 1/(σ² + λ) agree to first order in 1/λ at λ = 1/(ηK): the gap is
    O(λ⁻²).
    """
    jacobian, _, objective = _linear_problem()
    start, steps = oracles.normal(9, seed=10), 8
    gaps = []

    @jax.jit
    def both(damping, start):
        tx = gnlin.prox_linear(optax.sgd(1 / (damping * steps)), objective, steps=steps)
        damped = full_steps(objective, damping, solver=gnlin.Dense())
        return [each.update(None, each.init(start), start)[0] for each in (tx, damped)]

    for damping in (1e4, 1e5):
        linearised, solved = both(damping, start)
        u, sigma, vt = np.linalg.svd(jacobian, full_matrices=False)
        filtered = (1 - (1 - sigma**2 / (damping * steps)) ** steps) / sigma
        residual = np.asarray(objective.outputs_and_aux(start)[0])
        np.testing.assert_allclose(
            linearised, -vt.T @ (filtered * (u.T @ residual)), rtol=1e-8, atol=1e-14
        )
        gaps.append(np.linalg.norm(linearised - solved) / np.linalg.norm(solved))
    assert gaps[0] < 1e-2
    assert gaps[1] < 0.11 * gaps[0]


def test_predict_follows_the_model_being_trained(x64):
    case = _cases()[1]
    objective, params = gnlin.Objective(case.model, case.loss), _params()
    tx = gnlin.linearise_gradients(objective, 2)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, params)
    state = tx.init(params)
    update = jax.jit(tx.update)
    predict = jax.jit(lambda state: gnlin.predict(objective, state, moved, case.batch))
    _, within = update(None, state, params, batch=case.batch)
    _, at_end = update(None, within, moved, batch=case.batch)
    true = objective.outputs_and_aux(moved, case.batch)[0]
    linear = jax.jit(lambda: gnlin.linearise(objective, params, case.batch).predict(moved))()
    assert np.max(np.abs(true - linear)) > 1e-3
    np.testing.assert_allclose(predict(within), linear, **CLOSE)
    np.testing.assert_allclose(predict(at_end), true, **CLOSE)
    np.testing.assert_allclose(predict(()), true, **CLOSE)


def test_models_with_only_a_reverse_rule_go_through_the_transpose(x64):
    @jax.custom_vjp
    def activation(z):
        return jnp.sin(z)

    activation.defvjp(lambda z: (jnp.sin(z), jnp.cos(z)), lambda cosine, g: (cosine * g,))

    def objective(function):
        return gnlin.Objective(lambda p, batch: function(batch["x"] @ p), _squared)

    batch, params = {"x": oracles.normal(5, 3, seed=1)}, oracles.normal(3, seed=2)
    ours, usual = jax.jit(
        lambda: [
            gnlin.ggn_vector_product(objective(function), params, batch)(params)
            for function in (activation, jnp.sin)
        ]
    )()
    np.testing.assert_allclose(ours, usual, **CLOSE)


def test_value_and_grad_with_auxiliary_data():
    objective = gnlin.Objective(
        lambda p, batch: (p * batch, {"size": p.size}), lambda z, batch: jnp.sum(z), has_aux=True
    )
    (value, aux), grads = objective.value_and_grad(jnp.ones(2), jnp.asarray([1.0, 2.0]))
    assert (float(value), aux["size"]) == (3.0, 2)
    np.testing.assert_allclose(grads, [1.0, 2.0])
    (linear, aux), _ = gnlin.linearised_value_and_grad(objective)(
        jnp.zeros(2), jnp.ones(2), jnp.ones(2)
    )
    assert (float(linear), aux["size"]) == (0.0, 2)


def test_line_search_comes_back_from_where_nothing_is_finite():
    objective = gnlin.Objective.least_squares(lambda p: p**2 - 2.0)
    tx = gnlin.iterative_linearisation(optax.sgd(1e38), objective, 1, line_search=(1.0, 0.5))
    params = jnp.asarray([3.0])
    updates, state = jax.jit(tx.update)(None, tx.init(params), params)
    np.testing.assert_array_equal(updates, [0.0])
    assert gnlin.metrics(state)["line_search/alpha"] == 0


def test_line_search_judges_where_the_rounded_update_leads():
    """Steps this long leave too few digits to come back to the anchor; α = 0 must not be chosen as
    if they did.
    """
    objective = gnlin.Objective.least_squares(lambda p: p**2 - jnp.asarray([1.7, 2.2]))
    tx = gnlin.iterative_linearisation(optax.sgd(30.0), objective, 8, line_search=(1.0, 1e-3))
    params = jnp.asarray([1.3, 1.5])
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(8):
        updates, state = update(None, state, params)
        back = optax.apply_updates(params, state.linearised.anchor - params)
        params = optax.apply_updates(params, updates)
    assert jnp.any(back != state.linearised.anchor)  # else this test shows nothing
    assert objective.value(params) <= objective.value(back)


@pytest.mark.parametrize("name", ["MGH17", "Misra1a"])
def test_derivatives_of_fits_whose_parameters_differ_by_orders_of_magnitude(x64, name):
    fit = nist.load(name)
    objective = gnlin.Objective.least_squares(nist.residuals(name))
    tx = gnlin.levenberg_marquardt(objective, scaling="marquardt", solver=gnlin.Dense())
    x, y, start = (jnp.asarray(data) for data in (fit.x, fit.y, fit.starts[1]))

    @jax.jit
    def solve(y):
        return gnlin.minimise(
            objective, start, tx, batch={"x": x, "y": y}, max_steps=100, tol=1e-9
        )[0]

    @jax.jit
    def second_derivatives(params, y):
        slope = jax.grad(lambda params, y: objective.value(params, {"x": x, "y": y}))
        return jax.jacfwd(slope)(params, y), jax.jacrev(slope, argnums=1)(params, y)

    with jax.numpy_rank_promotion("allow"):
        params = solve(y)
        weights = jnp.asarray(1 / fit.certified)
        ours = jax.jit(jax.grad(lambda y: weights @ solve(y)))(y)
        hessian, mixed = jax.device_get(second_derivatives(params, y))
    unit = np.abs(fit.certified)
    expected = -(
        np.sign(fit.certified)
        @ np.linalg.solve(hessian * unit * unit[:, None], mixed * unit[:, None])
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_a_singular_system_is_not_called_converged(x64):
    """Rank 3 of 5 and no damping; for a right-hand side in the range of Jᵀ a solution exists, for
    others none.
    """
    rng = np.random.default_rng(0)
    jacobian = rng.normal(size=(8, 3)) @ rng.normal(size=(3, 5))
    system = gnlin.System(lambda v: jacobian @ v, lambda u: jacobian.T @ u, lambda u: u, 0.0)

    @jax.jit
    def solve(rhs):
        solution, _ = gnlin.Dense().solve(system, rhs, ())
        return solution.direction, solution.stats["dense/converged"]

    direction, converged = solve(rng.normal(size=5))
    assert not converged
    assert np.linalg.norm(direction) < 1e3


def test_progress_rule_is_off_by_default():
    """In float32 this system loses progress to rounding long before the tolerance; that is not
    convergence.
    """
    scales = jnp.logspace(0, 6, 40)
    system = gnlin.System(lambda v: v, lambda u: u, lambda u: scales * u, 0.0)
    solution, _ = gnlin.CG(max_iterations=60, rtol=1e-12).solve(
        system, jnp.ones(40), gnlin.CG().init(jnp.ones(40))[0]
    )
    assert not solution.stats["cg/converged"]


def test_a_fit_is_differentiable_with_respect_to_its_data(x64):
    x = jnp.linspace(0.0, 1.0, 12)
    objective = gnlin.Objective.least_squares(lambda p, batch: p[0] * jnp.exp(p[1] * x) - batch)
    tx = gnlin.levenberg_marquardt(objective, solver=gnlin.Dense())

    @jax.jit
    def fit(y):
        params, info = gnlin.minimise(objective, jnp.ones(2), tx, batch=y, max_steps=100, tol=1e-10)
        return params, info

    y = 2.0 * jnp.exp(-0.7 * x) + 0.05 * jnp.cos(9.0 * x)
    params, info = fit(y)
    assert info.converged
    ours = jax.jit(jax.jacrev(lambda y: fit(y)[0]))(y)
    hessian = jax.jit(jax.hessian(objective.value))(params, y)
    mixed = jax.jit(jax.jacrev(jax.grad(objective.value), argnums=1))(params, y)
    np.testing.assert_allclose(ours, -np.linalg.solve(hessian, mixed), rtol=1e-5, atol=1e-7)
