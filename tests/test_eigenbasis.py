"""Inverses of many matrices at once, and Adam in the eigenbasis of the factors, by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gnlin
from gnlin.solve.inverses import inverse_of_positive_definite, inverse_of_triangular, together


def normal(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


def positive_definite(*shape, seed):
    root = normal(*shape, 2 * shape[-1], seed=seed)
    return root @ np.swapaxes(root, -2, -1) / shape[-1] + 0.01 * np.eye(shape[-1])


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 16, 17, 33, 65])
def test_inverse_of_triangular_matrices(x64, size):
    lower = np.linalg.cholesky(positive_definite(3, size, seed=size))
    found = inverse_of_triangular(jnp.asarray(lower))
    np.testing.assert_allclose(found, np.linalg.inv(lower), atol=1e-11)


def test_inverses_of_different_sizes_keep_their_places(x64):
    shapes = [(5,), (3,), (2, 5), (5,), (2, 2, 3), (0,)]
    matrices = [
        positive_definite(*shape, seed=place) if shape[-1] else np.zeros((0, 0))
        for place, shape in enumerate(shapes)
    ]
    inverses = together(inverse_of_positive_definite, [jnp.asarray(m) for m in matrices])
    for found, matrix in zip(inverses, matrices, strict=True):
        np.testing.assert_allclose(found, np.linalg.inv(matrix), atol=1e-11)


X = normal(12, 3, seed=0)
PARAMS = {"b": 0.1 * normal(4, seed=1), "w": normal(3, 4, seed=2)}


def model(params, batch):
    return jnp.tanh(batch @ params["w"] + params["b"][None])


OBJECTIVE = gnlin.Objective(model, lambda z, _: jnp.sum(jnp.square(z - 0.3)) / 2)


def test_directions_are_those_of_adam_in_the_eigenbasis(x64):
    """Right-hand sides of the test's own; factors from `Kronecker`, which has its own oracle."""
    refresh, momentum, decay = 3, 0.8, 0.9
    factors = gnlin.Kronecker(decay=0.8, fraction=1.0)
    solver = gnlin.Eigenbasis(momentum, decay, refresh, factors)
    state, _ = solver.init(PARAMS)
    averages, _ = factors.init(PARAMS)
    mean = {name: np.zeros_like(leaf) for name, leaf in PARAMS.items()}
    square = {name: np.zeros_like(leaf) for name, leaf in PARAMS.items()}
    turned = 0
    for count in range(8):
        batch = X + 0.3 * count
        rhs = {name: normal(*leaf.shape, seed=10 + count) for name, leaf in PARAMS.items()}
        system = gnlin.quadratic_model(OBJECTIVE, PARAMS, batch).system(0.1)
        solution, state = solver.solve(system, rhs, state)
        if count < 3 or count % refresh == 0:
            _, averages = factors.prepare(system, PARAMS, averages)
            sides = averages.left["w"][:3, :3], averages.right["w"][:4, :4]
            u, w = (np.linalg.eigh(np.asarray(side))[1] for side in sides)
            turned += 1
        for name, b in rhs.items():
            m = mean[name] = momentum * mean[name] + (1 - momentum) * b
            ahead = (momentum * m + (1 - momentum) * b) / (1 - momentum ** (count + 2))
            rotated = u.T @ b @ w if name == "w" else b
            v = square[name] = decay * square[name] + (1 - decay) * rotated**2
            size = np.sqrt(v / (1 - decay ** (count + 1)))
            expected = u @ ((u.T @ ahead @ w) / size) @ w.T if name == "w" else ahead / size
            np.testing.assert_allclose(solution.direction[name], expected, rtol=1e-8, atol=1e-10)
    assert turned == 5  # of eight: eigenvectors are kept between


def test_it_trains_and_a_batch_of_nan_leaves_no_trace():
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), PARAMS)
    batch = jnp.asarray(X, jnp.float32)
    tx = gnlin.gauss_newton(OBJECTIVE, solver=gnlin.Eigenbasis())
    update = jax.jit(lambda state, params, batch: tx.update(None, state, params, batch=batch))
    state, losses = tx.init(params), []
    for count in range(30):
        if count == 10:
            before = state
            updates, state = update(state, params, batch.at[0, 0].set(jnp.nan))
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
            for old, new in zip(
                jax.tree.leaves(before.solver), jax.tree.leaves(state.solver), strict=True
            ):
                np.testing.assert_array_equal(old, new)
        updates, state = update(state, params, batch)
        params = optax.apply_updates(params, updates)
        losses.append(float(gnlin.metrics(state)["loss"]))
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("solver", "step", "rate"),
    [
        (gnlin.Eigenbasis(), gnlin.Momentum(0.0, every=10, check=10), 0.3),
        (gnlin.Kronecker(refresh=5), gnlin.Momentum(), 1.0),
    ],
    ids=["eigenbasis", "kronecker"],
)
def test_rate_and_step_rule_are_those_of_the_solver(x64, solver, step, rate):
    chosen = gnlin.gauss_newton(OBJECTIVE, solver=solver)
    written = gnlin.gauss_newton(OBJECTIVE, solver=solver, step=step, learning_rate=rate)
    ends = []
    for tx in (chosen, written):
        params, state = PARAMS, tx.init(PARAMS)
        update = jax.jit(tx.update)
        for count in range(13):
            updates, state = update(None, state, params, batch=jnp.roll(X, count, axis=1))
            params = optax.apply_updates(params, updates)
        ends.append(params)
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.parametrize("name", ["step", "learning_rate"])
def test_a_word_that_chooses_nothing(name):
    with pytest.raises(TypeError, match=f"`{name}` must be"):
        gnlin.gauss_newton(OBJECTIVE, **{name: "automatic"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum"),
        ({"decay": -0.1}, "decay"),
        ({"refresh": 0}, "refresh"),
        ({"kronecker": gnlin.CG()}, "kronecker"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        gnlin.Eigenbasis(**options)
