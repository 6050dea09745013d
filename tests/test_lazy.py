"""Lazy training in closed form against long training of the linearised model and dense solves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.flatten_util import ravel_pytree
from problems import tolerance

import gnlin

N = 5


def model(params, batch):
    return jnp.tanh(batch["x"] @ params["in"]) @ params["out"]


def weighted(outputs, batch):
    """A squared error with weights, one of them 0, and a term that couples an example's outputs."""
    errors = outputs - batch["y"]
    return jnp.sum(batch["weights"][:, None] * errors**2) / 6 + 0.1 * jnp.sum(
        jnp.sum(errors, axis=1) ** 2
    )


def partly_seen(outputs, batch):
    """Of Hessian zero in some outputs."""
    return jnp.sum(batch["weights"][:, None] * (outputs - batch["y"]) ** 2) / 6


def problem(loss=weighted):
    params = {"in": oracles.normal(3, 6, seed=1), "out": oracles.normal(6, 2, seed=2)}
    batch = {
        "x": oracles.normal(N, 3, seed=3),
        "y": oracles.normal(N, 2, seed=4),
        "weights": jnp.arange(5.0),
    }
    return gnlin.Objective(model, loss), params, batch


def flat(params):
    return np.asarray(ravel_pytree(params)[0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def asked_of(objective, question, params, batch, *numbers):
    """The answer of lazy training, compiled as one program."""
    return question(gnlin.kernel.lazy_training(objective, params, batch), *numbers)


@pytest.mark.parametrize("loss", [weighted, partly_seen])
def test_gradient_descent_is_long_training_of_the_linearised_model(loss, x64):
    objective, params, batch = problem(loss)
    counts = jnp.asarray([1, 2, 7, 100, 1001])

    def descend(lazy, share):
        rate = share / lazy.eigenvalues[-1]
        tx = optax.chain(gnlin.linearise_gradients(objective, None), optax.sgd(rate))

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(None, state, params, batch=batch)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        _, path = jax.lax.scan(step, (params, tx.init(params)), None, 1001)
        return jax.vmap(lambda count: lazy.gradient_descent(rate, count))(counts), path

    for share in (0.3, 1.9):
        found, path = asked_of(objective, descend, params, batch, share)
        for name in params:
            np.testing.assert_allclose(found[name], path[name][counts - 1], rtol=1e-10, atol=1e-10)


def test_gradient_flow_is_the_limit_of_small_steps(x64):
    objective, params, batch = problem()

    def both(lazy, count):
        time = 3 / lazy.eigenvalues[-1]
        return lazy.gradient_flow(time), lazy.gradient_descent(time / count, count)

    errors = []
    for count in (1000, 2000):
        flow, descent = asked_of(objective, both, params, batch, count)
        errors.append(np.linalg.norm(flat(flow) - flat(descent)))
    assert errors[0] < 1e-2
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.01)  # Euler's method is of first order


def test_ridge_is_the_damped_gauss_newton_step(x64):
    objective, params, batch = problem(partly_seen)
    dampings = (1.0, 1e-3)

    def solutions(lazy, dampings):
        return (
            [lazy.ridge(damping) for damping in dampings],
            [lazy.ridge(0.0), lazy.gradient_flow(jnp.inf)],
            [lazy.gradient_flow(0.0), lazy.gradient_descent(0.1, 0)],
        )

    damped, limits, starts = asked_of(objective, solutions, params, batch, dampings)
    ggn, gradient = (
        oracles.ggn_matrix(objective, params, batch),
        oracles.gradient(objective, params, batch),
    )
    for damping, found in zip(dampings, damped, strict=True):
        expected = flat(params) - np.linalg.solve(ggn + damping * np.eye(len(ggn)), gradient)
        np.testing.assert_allclose(flat(found), expected, rtol=1e-9, atol=1e-9)
    least = flat(params) - np.linalg.pinv(ggn, rcond=1e-10) @ gradient
    for found in limits:
        np.testing.assert_allclose(flat(found), least, rtol=1e-8, atol=1e-8)
    for found in starts:
        np.testing.assert_array_equal(flat(found), flat(params))


def test_predictions_are_kernel_regression(x64):
    """f(x) = f₀(x) + K(x, X) (K + μI)⁻¹ (y − f₀(X)) for ½ Σ (z − y)², on other data."""
    _, params, batch = problem()
    objective = gnlin.Objective(model, lambda z, b: jnp.sum((z - b["y"]) ** 2) / 2)
    other = {**batch, "x": oracles.normal(3, 3, seed=9)}
    theta = asked_of(objective, lambda lazy: lazy.ridge(0.1), params, batch)
    across = np.asarray(gnlin.kernel.empirical_ntk(objective, params, other, batch)).reshape(
        6, 2 * N
    )
    own = np.asarray(gnlin.kernel.empirical_ntk(objective, params, batch)).reshape(2 * N, 2 * N)
    errors = np.ravel(batch["y"] - model(params, batch))
    expected = model(params, other) + (
        across @ np.linalg.solve(own + 0.1 * np.eye(2 * N), errors)
    ).reshape(3, 2)
    predict = jax.jit(lambda theta: gnlin.linearise(objective, params, other).predict(theta))
    np.testing.assert_allclose(predict(theta), expected, rtol=1e-9)


def test_half_precision_parameters_keep_their_dtype():
    objective, params, batch = problem()
    params, batch = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, batch))

    def three_steps(lazy, largest):
        largest = lazy.eigenvalues[-1] if largest is None else largest
        return lazy.gradient_descent(0.1 / largest, 3), lazy.eigenvalues

    theta, eigenvalues = asked_of(objective, three_steps, params, batch, None)
    assert eigenvalues.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(theta)} == {jnp.dtype(jnp.bfloat16)}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, batch))
    exact, _ = asked_of(objective, three_steps, *wide, eigenvalues[-1])
    np.testing.assert_allclose(
        flat(theta).astype(np.float32), flat(exact), **tolerance(jnp.bfloat16)
    )


def test_long_times_and_little_damping_do_not_amplify_rounding():
    """In single precision, with inputs that come twice: no time tells them apart."""
    params, x = (
        {"in": oracles.normal(3, 40, seed=1), "out": oracles.normal(40, 1, seed=2)},
        oracles.normal(10, 3, seed=3),
    )
    batch = {"x": jnp.concatenate([x, x]), "y": oracles.normal(20, 1, seed=4)}
    params, batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, batch))
    objective = gnlin.Objective(model, lambda z, b: jnp.sum((z - b["y"]) ** 2) / 2)

    def thrice(lazy, factor):
        largest = lazy.eigenvalues[-1]
        return (
            lazy.gradient_flow(factor / largest),
            lazy.gradient_descent(1 / largest, factor),
            lazy.ridge(largest / factor),
        )

    ask = functools.partial(asked_of, objective, thrice, params, batch)
    limit = flat(ask(jnp.inf)[0]) - flat(params)
    for exponent in range(2, 16):
        for theta in ask(10.0**exponent):
            moved = flat(theta) - flat(params)
            assert np.linalg.norm(moved) < 1.1 * np.linalg.norm(limit)
            if exponent > 8:
                assert np.linalg.norm(moved - limit) < 0.1 * np.linalg.norm(limit)


def test_a_loss_that_does_not_see_the_outputs():
    objective = gnlin.Objective(model, lambda z, b: 0 * jnp.sum(z))
    _, params, batch = problem()
    theta = asked_of(objective, lambda lazy: lazy.ridge(0.0), params, batch)
    np.testing.assert_array_equal(flat(theta), flat(params))


def test_gradients_where_the_loss_is_not_curved_are_said(x64):
    _, params, batch = problem()
    shares = [
        float(asked_of(gnlin.Objective(model, loss), lambda lazy: lazy.outside, params, batch))
        for loss in (partly_seen, lambda z, b: jnp.sum(z))
    ]
    assert shares[0] < 1e-12
    assert shares[1] == pytest.approx(1)


def test_bad_input():
    objective, params, batch = problem()
    with pytest.raises(
        ValueError, match=r"`max_outputs` is 9, but there are 10 outputs.*period=None"
    ):
        gnlin.kernel.lazy_training(objective, params, batch, max_outputs=9)
    with pytest.raises(ValueError, match=r"`batch` is missing"):
        gnlin.kernel.lazy_training(objective, params)
    lazy = gnlin.kernel.lazy_training(objective, params, batch)
    with pytest.raises(ValueError, match=r"`steps` must be a whole number; got 1.5"):
        lazy.gradient_descent(0.1, 1.5)
    with pytest.raises(ValueError, match=r"`learning_rate` must be finite and at least 0; got -1"):
        lazy.gradient_descent(-1, 1)
    with pytest.raises(ValueError, match=r"`time` must be at least 0; got -1.0"):
        lazy.gradient_flow(-1.0)
    with pytest.raises(
        ValueError, match=r"`time` must be a single number; got an array of shape \(2,\)"
    ):
        lazy.gradient_flow(jnp.ones(2))
    with pytest.raises(ValueError, match=r"`batch` needs an objective without data of its own"):
        gnlin.kernel.lazy_training(objective.bind(batch), params, batch)
    with pytest.raises(ValueError, match=r"`damping` must be finite and at least 0; got -0.1"):
        lazy.ridge(-0.1)
