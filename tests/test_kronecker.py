"""Kronecker factors, against their definitions on materialised matrices."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.flatten_util import ravel_pytree

import gnlin
from gnlin.solve.sampling import root_sample


def problem(rows=90, transposed=False):
    """tanh network 3-5-4 under a softmax loss, in float64 where a test asks for it."""
    return _problem(rows, transposed, jnp.result_type(float))


@functools.cache
def _problem(rows, transposed, dtype):
    """One for each precision, so that a program compiled for it serves all tests."""
    del dtype
    x, labels = oracles.normal(rows, 3, seed=0), jnp.arange(rows) % 4
    shapes = {"in": (3, 5), "bias": (5,), "out": (5, 4)}
    params = {
        name: oracles.normal(*shape, seed=1 + i) for i, (name, shape) in enumerate(shapes.items())
    }
    if transposed:
        params |= {"in": params["in"].T, "out": params["out"].T}

    def model(params, batch):
        first, second = (
            (params["in"].T, params["out"].T) if transposed else (params["in"], params["out"])
        )
        return jnp.tanh(batch["x"] @ first + params["bias"][None]) @ second

    def loss(outputs, batch):
        chosen = jnp.take_along_axis(outputs, batch["y"][:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(outputs, axis=1) - chosen)

    return gnlin.Objective(model, loss), params, {"x": x, "y": labels}


def system_of(objective, params, batch, damping):
    model = gnlin.quadratic_model(objective, params, batch)
    return model.system(damping)


@functools.partial(jax.jit, static_argnums=(0, 1))
def prepared(kronecker, objective, params, batch, damping, vector):
    """The preconditioned vector and the state after, from the first factors of this batch."""
    system = system_of(objective, params, batch, damping)
    (apply, _), state = kronecker.prepare(system, params, kronecker.init(params)[0])
    return apply(vector), state


def vector_like(params):
    return jax.tree.map(lambda leaf: jnp.sin(3 * leaf), params)


def factors_of(state, name):
    return SimpleNamespace(left=state.left[name], right=state.right[name])


def test_sample_is_the_square_root_of_the_hessian_times_noise(x64):
    root = np.linalg.qr(oracles.normal(6, 6, seed=0))[0]
    hessian = jnp.asarray(root * np.asarray([0, 0.1, 0.5, 1, 2, 30]) @ root.T)
    like, key = jnp.zeros([2, 3]), jax.random.key(1)

    def product(u):
        return (hessian @ u.ravel()).reshape(2, 3)

    sample = jax.jit(root_sample, static_argnums=(0, 3))
    noise = sample(lambda u: u, like, key)
    exact = root * np.sqrt([0, 0.1, 0.5, 1, 2, 30]) @ root.T @ np.asarray(noise).ravel()
    # Six products span the space; those beyond it must do no harm.
    for iterations in (6, 9):
        found = sample(product, like, key, iterations)
        np.testing.assert_allclose(
            np.ravel(found), exact, rtol=1e-6, atol=1e-6 * np.linalg.norm(exact)
        )
    np.testing.assert_allclose(sample(lambda u: 4 * u, like, key), 2 * noise, rtol=1e-12)


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_inverse_is_that_of_the_damped_kronecker_product(x64, damping):
    objective, params, batch = problem()
    kronecker, vector = gnlin.Kronecker(fraction=1.0), vector_like(params)
    found, state = prepared(kronecker, objective, params, batch, damping, vector)

    x = np.asarray(batch["x"])
    extended = np.concatenate([x, np.ones([len(x), 1])], axis=1)
    hidden = np.tanh(x @ np.asarray(params["in"]) + np.asarray(params["bias"]))
    bias, first, second = (factors_of(state, name) for name in ("bias", "in", "out"))
    np.testing.assert_allclose(first.left, extended.T @ extended / len(x), rtol=1e-12)
    np.testing.assert_allclose(second.left[:-1, :-1], hidden.T @ hidden / len(x), rtol=1e-12)
    assert not np.any(bias.left)  # the bias is a row of the weights

    def expected(factors, side, matrix):
        a, s = np.asarray(factors.left)[:side, :side], np.asarray(factors.right)[:-1, :-1]
        pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(s) / len(s)))
        a, s = (
            a + pi * np.sqrt(damping) * np.eye(len(a)),
            s + np.sqrt(damping) / pi * np.eye(len(s)),
        )
        return np.linalg.solve(np.kron(a, s), np.ravel(matrix)).reshape(np.shape(matrix))

    joint = expected(first, 4, np.concatenate([vector["in"], vector["bias"][None]]))
    np.testing.assert_allclose(found["in"], joint[:-1], rtol=1e-9)
    np.testing.assert_allclose(found["bias"], joint[-1], rtol=1e-9)
    np.testing.assert_allclose(found["out"], expected(second, 5, vector["out"]), rtol=1e-9)


def test_moments_of_cotangents_have_the_exact_expectation(x64):
    """tr(A) tr(S) need not be tr(G), but S is Σ sᵀs, and for the last layer that is the sum of the
    rows' Hessians.
    """
    objective, params, batch = problem(rows=40)
    kronecker = gnlin.Kronecker(fraction=1.0, decay=0.9999)

    @jax.jit
    def average(state):
        system = system_of(objective, params, batch, 0.1)
        return jax.lax.fori_loop(
            0, 3000, lambda _, state: kronecker.prepare(system, params, state)[1], state
        )

    outputs = objective.model(params, batch)
    probabilities = np.asarray(jax.nn.softmax(outputs))
    hessians = [np.diag(p) - np.outer(p, p) for p in probabilities]
    state = average(kronecker.init(params)[0])
    found = np.asarray(state.right["out"])[:-1, :-1]
    # A mean of 3000 samples of 40 rows each.
    np.testing.assert_allclose(found, np.mean(hessians, axis=0), atol=0.004)


def test_leaves_in_no_layer_have_the_moments_of_their_pseudo_gradient(x64):
    objective = gnlin.Objective.least_squares(
        lambda p: jnp.tanh(p["matrix"] * p["matrix"]) * jnp.sum(p["scale"])
    )
    params = {"matrix": oracles.normal(3, 2, seed=0), "scale": jnp.asarray([1.0, 2.0])}
    _, state = prepared(gnlin.Kronecker(), objective, params, None, 0.0, params)

    @jax.jit
    def pseudo_gradient():
        key = jax.random.fold_in(jax.random.key(0), 0)
        noise = root_sample(lambda u: u, params["matrix"], key)
        return system_of(objective, params, None, 0.0).vjp(noise)

    gradient = pseudo_gradient()
    matrix = np.asarray(gradient["matrix"])
    np.testing.assert_allclose(
        state.left["matrix"][:-1, :-1],
        matrix @ matrix.T / np.linalg.norm(matrix),
        rtol=1e-9,
        atol=1e-12,
    )
    np.testing.assert_allclose(
        state.right["matrix"][:-1, :-1],
        matrix.T @ matrix / np.linalg.norm(matrix),
        rtol=1e-9,
        atol=1e-12,
    )
    np.testing.assert_allclose(state.left["scale"], gradient["scale"] ** 2, rtol=1e-9)


@functools.partial(jax.jit, static_argnums=0)
def solve(objective, params, batch, damping):
    """Direction and statistics."""
    kronecker = gnlin.Kronecker()
    model = gnlin.quadratic_model(objective, params, batch)
    state, _ = kronecker.init(params)
    solution, _ = kronecker.solve(model.system(damping), model.gradient(), state)
    return solution.direction, solution.stats


def test_the_direction_does_not_depend_on_how_weights_are_stored(x64):
    directions = []
    for transposed in (False, True):
        objective, params, batch = problem(transposed=transposed)
        found, stats = solve(objective, params, batch, 0.01)
        assert stats["kronecker/finite"]
        directions.append({name: leaf.T if transposed else leaf for name, leaf in found.items()})
    for name in directions[0]:
        np.testing.assert_allclose(directions[1][name], directions[0][name], rtol=1e-9, atol=1e-12)


def test_a_bias_of_two_axes_belongs_to_its_layer_wherever_it_sorts(x64):
    """Attention's (heads, width), say."""
    x, weight = oracles.normal(30, 4, seed=0), oracles.normal(4, 2, 3, seed=1)
    directions = []
    for name in ("a", "z"):

        def model(params, batch, name=name):
            return jnp.einsum("ni,ihw->nhw", batch, params["w"]) + params[name][None]

        objective = gnlin.Objective(model, lambda outputs, batch: jnp.mean(jnp.square(outputs - 1)))
        params = {name: jnp.ones((2, 3)), "w": weight}
        directions.append(solve(objective, params, x, 0.1)[0][name])
    np.testing.assert_allclose(directions[0], directions[1], rtol=1e-10)


@pytest.mark.parametrize("rows", [65, 79, 127, 128, 300])
def test_every_row_is_taken_as_often(x64, rows):
    kronecker, weight = gnlin.Kronecker(decay=0.0), jnp.ones((rows, 1))
    # One input for each row: the diagonal of A counts how often each is taken.
    objective = gnlin.Objective(
        lambda params, batch: batch @ params, lambda outputs, batch: jnp.mean(outputs**2)
    )

    @jax.jit
    def update(state, batch):
        system = system_of(objective, weight, batch, 0.1)
        state = kronecker.prepare(system, weight, state)[1]
        return state, jnp.diagonal(state.left)[:-1] > 0

    state, counts = kronecker.init(weight)[0], np.zeros(rows)
    for _ in range(rows):
        state, taken = update(state, np.eye(rows))
        counts += np.asarray(taken)
    assert len(set(counts)) == 1


def test_an_empty_batch_is_named():
    objective, params, batch = problem()
    tx = gnlin.gauss_newton(objective)
    with pytest.raises(ValueError, match="`batch` has no examples"):
        tx.update(None, tx.init(params), params, batch=jax.tree.map(lambda leaf: leaf[:0], batch))


def test_a_long_side_has_its_diagonal_alone(x64):
    objective, params, batch = problem()
    kronecker, vector = gnlin.Kronecker(fraction=1.0, max_side=4), vector_like(params)
    found, state = prepared(kronecker, objective, params, batch, 0.1, vector)
    second = factors_of(state, "out")
    assert [each[name].ndim for name in ("in", "out") for each in (state.left, state.right)] == [
        2,
        1,
        1,
        2,
    ]
    a, s = np.asarray(second.left)[:-1], np.asarray(second.right)[:-1, :-1]
    pi = np.sqrt(np.mean(a) / (np.trace(s) / len(s)))
    rows, columns = a + pi * np.sqrt(0.1), s + np.sqrt(0.1) / pi * np.eye(len(s))
    expected = np.linalg.solve(columns, (np.asarray(vector["out"]) / rows[:, None]).T).T
    np.testing.assert_allclose(found["out"], expected, rtol=1e-9)


def test_a_batch_that_is_not_finite_leaves_no_trace():
    objective, params, batch = problem()
    tx = gnlin.gauss_newton(objective)
    update = jax.jit(tx.update)
    _, state = update(None, tx.init(params), params, batch=batch)
    step, after = update(
        None, state, params, batch={**batch, "x": batch["x"].at[0, 0].set(jnp.nan)}
    )
    assert not np.any(ravel_pytree(step)[0])
    assert not gnlin.metrics(after)["accepted"]
    step, _ = update(None, after, params, batch=batch)
    assert np.all(np.isfinite(ravel_pytree(step)[0]))
    assert np.any(ravel_pytree(step)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"`decay` must lie in \[0, 1\); got 1.0"),
        ({"fraction": 0}, r"`fraction` must lie in \(0, 1\]; got 0"),
        ({"max_side": -1}, "`max_side` must be an integer of at least 0; got -1"),
        ({"seed": True}, "`seed` must be an integer of at least 0; got True"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        gnlin.Kronecker(**options)


def test_inverses_are_kept_without_jit_too():
    """`jax.disable_jit` runs one branch alone, and the layers are read in the other."""
    objective, params, batch = problem(rows=8)
    kronecker = gnlin.Kronecker(refresh=5)
    system, (state, _) = system_of(objective, params, batch, 0.1), kronecker.init(params)
    with jax.disable_jit():
        for count in range(6):
            solution, state = kronecker.solve(system, params, state)
            assert bool(solution.stats["kronecker/finite"]), count
    assert int(state.kept.uses) < 4


@pytest.mark.parametrize("refresh", [1, 5])
@pytest.mark.parametrize("max_side", [4096, 0], ids=["matrices", "diagonals"])
def test_an_infinite_moment_is_not_kept(refresh, max_side):
    """The loss and its gradient are finite at the outlier, and its square is not."""
    x = jnp.asarray(oracles.normal(8, 3, seed=0), jnp.float32)
    batch = {"x": x, "y": (x[:, 0] > 0).astype(jnp.float32)}
    outlier = {**batch, "x": x.at[0].set(1e20)}
    params = {"c": jnp.zeros([]), "m": jnp.zeros([3, 1]), "v": jnp.zeros(3)}

    def model(params, batch):
        return batch["x"] @ params["v"] + (batch["x"] @ params["m"])[:, 0] + params["c"]

    objective = gnlin.Objective(
        model, lambda z, batch: jnp.mean(jnp.logaddexp(0, z) - batch["y"] * z)
    )
    solver = gnlin.Kronecker(refresh=refresh, max_side=max_side)
    tx = gnlin.gauss_newton(objective, damping=1.0, solver=solver)
    update, state = jax.jit(tx.update), tx.init(params)
    for each in (outlier, batch, batch):
        updates, state = update(None, state, params, batch=each)
        params = optax.apply_updates(params, updates)
        assert bool(gnlin.metrics(state)["kronecker/finite"]) == (each is batch)
        for leaf in jax.tree.leaves(state.solver):
            assert np.all(np.isfinite(leaf))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(params))


def test_leaves_without_entries():
    x = jnp.asarray(oracles.normal(8, 4, seed=0), jnp.float32)
    params = {"a": jnp.zeros([4, 4]), "none": jnp.zeros([4, 0]), "nothing": jnp.zeros([0])}
    objective = gnlin.Objective.least_squares(lambda p: x @ p["a"] - jnp.sin(x))
    for refresh in (1, 5):
        tx = gnlin.gauss_newton(objective, solver=gnlin.Kronecker(refresh=refresh))
        updates, _ = jax.jit(tx.update)(None, tx.init(params), params)
        assert np.any(updates["a"])
        assert [updates[name].shape for name in ("none", "nothing")] == [(4, 0), (0,)]


def test_leaves_of_one_shape_go_their_own_ways(x64):
    """Of three equal weights the first has a bias and the last is transposed: all as if alone."""
    names = ("a", "b", "c")
    params = {name: oracles.normal(4, 4, seed=seed) / 2 for seed, name in enumerate(names)}
    params["bias"] = oracles.normal(4, seed=3)
    x, y = oracles.normal(20, 4, seed=4), oracles.normal(20, 4, seed=5)

    def model(p, batch):
        hidden = jnp.tanh(batch["x"] @ p["a"] + p["bias"][None])
        return jnp.tanh(hidden @ p["b"]) @ p["c"].T

    objective = gnlin.Objective(model, lambda z, batch: 0.5 * jnp.mean((z - batch["y"]) ** 2))
    batch, vector = {"x": x, "y": y}, vector_like(params)
    kronecker, damping = gnlin.Kronecker(fraction=1.0), 0.01
    found, state = prepared(kronecker, objective, params, batch, damping, vector)
    kept = prepared(
        gnlin.Kronecker(fraction=1.0, refresh=3), objective, params, batch, damping, vector
    )
    jax.tree.map(np.testing.assert_array_equal, found, kept[0])
    for name in names:
        sides = [4 + (name == "a"), 4]
        a, s = (
            np.asarray(side[name])[:length, :length]
            for side, length in zip((state.left, state.right), sides, strict=True)
        )
        pi = np.sqrt(np.trace(a) / len(a) / (np.trace(s) / len(s)))
        a = a + pi * np.sqrt(damping) * np.eye(len(a))
        s = s + np.sqrt(damping) / pi * np.eye(len(s))
        rows = [vector[name], vector["bias"][None]] if name == "a" else [vector[name]]
        exact = np.linalg.inv(a) @ np.concatenate(rows) @ np.linalg.inv(s)
        np.testing.assert_allclose(found[name], exact[:4], rtol=1e-9, atol=1e-9)
        if name == "a":
            np.testing.assert_allclose(found["bias"], exact[4], rtol=1e-9, atol=1e-9)
