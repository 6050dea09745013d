"""Preconditioners against dense matrices: what they approximate, that they are definite and change
no answer.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.flatten_util import ravel_pytree
from problems import classifier, enable_x64, tolerance

import gnlin

PRECONDITIONERS = {
    "jacobi": gnlin.Jacobi(probes=2),
    "nystrom": gnlin.Nystrom(rank=8, refresh_every=10),
    "nystrom, afresh": gnlin.Nystrom(rank=8, batch_size=3),
    "kronecker": gnlin.Kronecker(),
}
each = pytest.mark.parametrize("name", PRECONDITIONERS)


class Case(NamedTuple):
    objective: gnlin.Objective
    params: Any
    batch: Any


def _softmax(outputs, batch):
    losses = jax.nn.logsumexp(outputs, axis=-1) - jnp.sum(outputs * batch["labels"], axis=-1)
    return jnp.sum(batch["weights"] * losses) / 24


def _squared(outputs, batch):
    return jnp.sum((outputs - batch["labels"]) ** 2) / 24


def _network(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"] + params["bias"][None]) * params["gain"][None]
    return hidden @ params["out"].T


def _as_matrices(params, batch):
    """The network of `_network` in a form in which no layer can be read."""
    return _network(jax.tree.map(lambda leaf: 2.0 * leaf[::-1][::-1], params), batch)


def _pooled(params, batch):
    """Rows are tokens, three to an example; the cotangents of one example depend on each other."""
    tokens = jnp.stack([batch["x"], 0.5 * batch["x"] + 1.0, batch["x"][::-1]], axis=1)
    hidden = jnp.tanh(tokens @ params["in"] + params["bias"][None, None])
    return (jnp.mean(hidden, axis=1) * params["gain"][None]) @ params["out"].T


@functools.cache
def _case(model, loss=_softmax) -> Case:
    with enable_x64(True):
        params = {
            "bias": oracles.normal(4, seed=2),
            "gain": 1 + 0.1 * oracles.normal(4, seed=4),
            "in": oracles.normal(3, 4, seed=1),
            "none": None,
            "out": oracles.normal(3, 4, seed=3),
        }
        labels = jax.nn.one_hot(jnp.arange(24) % 3, 3, dtype=jnp.float64)
        weights = jnp.asarray([1.0, 0.0, 2.0] * 8)
        return Case(
            gnlin.Objective(model, loss),
            params,
            {"x": oracles.normal(24, 3, seed=0), "labels": labels, "weights": weights},
        )


@functools.cache
def _curvature(model, loss=_softmax) -> np.ndarray:
    with enable_x64(True):
        return oracles.ggn_matrix(*_case(model, loss))


def _system(case: Case, damping, scaling=None) -> tuple[gnlin.System, Any]:
    """The system at these parameters, and the gradient."""
    model = gnlin.quadratic_model(case.objective, case.params, case.batch)
    return model.system(damping, scaling), model.gradient()


def _flat(tree) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


@functools.cache
def _inverse_matrix(preconditioner):
    """(case, λ, D) ↦ (M⁻¹ as a matrix, the state after), compiled once for each objective."""

    def inverse(params, batch, damping, scaling, objective):
        system, _ = _system(Case(objective, params, batch), damping, scaling)
        (apply, _), state = preconditioner.prepare(system, params, preconditioner.init(params)[0])
        flat, unravel = ravel_pytree(params)
        rows = jax.vmap(lambda row: ravel_pytree(apply(unravel(row)))[0])(
            jnp.eye(len(flat), dtype=flat.dtype)
        )
        return rows, state

    compiled = jax.jit(inverse, static_argnames="objective")

    def call(case, damping, scaling=None):
        scaling = jax.tree.map(jnp.ones_like, case.params) if scaling is None else scaling
        return compiled(case.params, case.batch, damping, scaling, case.objective)

    return call


# What every preconditioner is.


@each
def test_action_is_symmetric_and_positive_definite(name, x64):
    case = _case(_network)
    dead = case._replace(batch={**case.batch, "weights": jnp.zeros(24)})
    partly = jax.tree.map(lambda leaf: jnp.maximum(10 * leaf, 0.0), case.params)
    for problem in (case, dead):  # G = 0 in the second
        for damping, scaling in ((0.0, None), (1e-3, None), (1e-3, partly), (10.0, partly)):
            matrix, _ = _inverse_matrix(PRECONDITIONERS[name])(problem, damping, scaling)
            # λ = 0 leaves entries of up to 1e12 beside those that are compared.
            np.testing.assert_allclose(matrix, matrix.T, atol=1e-9 * np.max(np.abs(matrix)))
            assert np.min(np.linalg.eigvalsh((matrix + matrix.T) / 2)) > 0


@pytest.mark.parametrize("name", ["jacobi", "nystrom, afresh", "kronecker"])
def test_answers_do_not_depend_on_it(name, x64):
    """Two damped systems and any right-hand sides, solved side by side under `vmap`."""
    case, curvature = _case(_network), _curvature(_network)
    scaling = jax.tree.map(lambda leaf: 0.1 + leaf**2, case.params)
    solver = gnlin.CG(max_iterations=400, rtol=1e-12, preconditioner=PRECONDITIONERS[name])

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0))
    def solve(damping, rhs):
        system, _ = _system(case, damping, scaling)
        solution, _ = solver.solve(system, rhs, solver.init(case.params)[0])
        return solution.direction, solution.stats["cg/converged"]

    dampings, sides = (
        np.asarray([1e-2, 1.0]),
        [jax.tree.map(lambda p, k=k: jnp.sin(k * p) + 0.3, case.params) for k in (7.0, 1.0)],
    )
    steps, converged = solve(dampings, jax.tree.map(lambda *rows: jnp.stack(rows), *sides))
    assert np.all(converged)
    for i, damping in enumerate(dampings):
        matrix = curvature + damping * np.diag(_flat(scaling))
        step = _flat(jax.tree.map(lambda leaf, i=i: leaf[i], steps))
        np.testing.assert_allclose(
            step, np.linalg.solve(matrix, _flat(sides[i])), rtol=1e-7, atol=1e-8
        )


@functools.cache
def _steps_on_badly_scaled_features(preconditioner) -> int:
    """Linear regression with two outputs, and features whose scales span four decades."""
    x = oracles.normal(96, 24, seed=5) * jnp.logspace(0, 4, 24)[None]
    objective = gnlin.Objective(
        lambda params, batch: batch @ params["w"] + params["b"][None],
        lambda z, batch: jnp.sum((z - 1.0) ** 2) / 96,
    )
    params = {"w": jnp.zeros([24, 2]), "b": jnp.zeros(2)}
    solver = gnlin.CG(max_iterations=1000, rtol=1e-6, preconditioner=preconditioner)
    tx = gnlin.scale_by_gauss_newton(objective, 1e-4, solver=solver)
    _, state = jax.jit(lambda p: tx.update(None, tx.init(p), p, batch=x))(params)
    assert gnlin.metrics(state)["cg/converged"]
    return int(gnlin.metrics(state)["cg/iterations"])


@pytest.mark.parametrize(
    "preconditioner",
    [gnlin.Jacobi(1.0, probes=4), gnlin.Nystrom(rank=40), gnlin.Kronecker(fraction=1.0)],
    ids=["jacobi", "nystrom", "kronecker"],
)
def test_fewer_iterations_where_scales_differ(preconditioner, x64):
    assert (
        _steps_on_badly_scaled_features(preconditioner) < _steps_on_badly_scaled_features(None) / 3
    )


@each
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_state_keeps_its_form_and_is_at_least_float32(name, dtype):
    case = jax.tree.map(lambda leaf: leaf.astype(dtype), _case(_network)[1:])
    objective, preconditioner = _case(_network).objective, PRECONDITIONERS[name]

    def prepared(params, batch, state):
        system, _ = _system(Case(objective, params, batch), 0.1)
        preparation, state = preconditioner.prepare(system, params, state)
        return preparation.apply(params), state

    before, _ = jax.eval_shape(preconditioner.init, case[0])
    applied, after = jax.eval_shape(prepared, *case, before)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), before) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), after
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(applied)} == {jnp.dtype(dtype)}
    floating = [
        leaf.dtype for leaf in jax.tree.leaves(after) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert set(floating) == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["jacobi", "nystrom"])
def test_a_batch_that_is_not_finite_is_told_and_forgotten(name):
    problem = classifier()
    tx = gnlin.scale_by_gauss_newton(
        problem.objective, 0.1, solver=gnlin.CG(5, preconditioner=PRECONDITIONERS[name])
    )
    start, batch = tx.init(problem.params), problem.batches[0]
    update = jax.jit(tx.update)
    step, state = update(None, start, problem.params, batch={**batch, "x": batch["x"] * jnp.nan})
    assert not np.any(_flat(step))
    assert not gnlin.metrics(state)["cg/converged"]
    after, fresh = (
        update(None, state, problem.params, batch=batch),
        update(None, start, problem.params, batch=batch),
    )
    np.testing.assert_array_equal(_flat(after[0]), _flat(fresh[0]))


# Jacobi.


SAMPLED = {
    "rows": (_network, _squared),
    "no layers": (_as_matrices, _squared),
    "tokens": (_pooled, _softmax),
}


def _errors_of_the_diagonal(name, probes=4000) -> np.ndarray:
    _, state = _inverse_matrix(gnlin.Jacobi(probes=probes))(_case(*SAMPLED[name]), 0.1)
    return _flat(state.diagonal) / np.diagonal(_curvature(*SAMPLED[name])) - 1


@pytest.mark.parametrize("name", SAMPLED)
def test_the_diagonal_is_right_on_average(name, x64):
    # A squared normal number deviates by √2 of its mean: five times that of the average of so many.
    assert np.max(np.abs(_errors_of_the_diagonal(name))) < 5 * np.sqrt(2 / 4000)


def test_rows_tell_more_than_the_pseudo_gradient(x64):
    layers = np.r_[0:4, 8:32]  # all but the gains, which are in no layer
    rows, pseudo_gradient = (
        np.linalg.norm(_errors_of_the_diagonal(name)[layers]) for name in ("rows", "no layers")
    )
    assert rows < 0.6 * pseudo_gradient


def test_jacobi_is_the_power_of_the_damped_diagonal(x64):
    case = _case(_network)
    scaling = jax.tree.map(lambda leaf: 0.1 + leaf**2, case.params)
    inverse, state = _inverse_matrix(PRECONDITIONERS["jacobi"])(case, 0.3, scaling)
    expected = (_flat(state.diagonal) + 0.3 * _flat(scaling)) ** -0.75
    np.testing.assert_allclose(
        inverse, np.diag(expected), **tolerance(jnp.float64, scale=64)
    )  # of the order of 10


def test_the_diagonal_is_averaged_over_steps(x64):
    case, jacobi = _case(_network), gnlin.Jacobi(decay=0.6)

    @jax.jit
    def after(state):
        return jacobi.prepare(_system(case, 0.1)[0], case.params, state)[1]

    start = jacobi.init(case.params)[0]
    state, expected = start, np.zeros(32)
    for count, keep in enumerate((0.0, 1 / 2, 0.6, 0.6)):
        alone = after(
            start._replace(count=jnp.asarray(count, jnp.int32))
        )  # this step's share, 1 − keep, and nothing else
        expected = keep * expected + _flat(alone.diagonal)
        state = after(state)
        np.testing.assert_allclose(_flat(state.diagonal), expected, rtol=1e-10)


# Nyström.


@pytest.mark.parametrize("scaled", [False, True], ids=["identity", "scaled"])
def test_sketch_equals_the_textbooks(scaled, x64):
    case, rank = _case(_network), 8
    root = np.ones(32)
    scaling = jax.tree.map(lambda leaf: 0.1 + leaf**2, case.params) if scaled else None
    if scaled:
        root = np.sqrt(_flat(scaling))
    inverse, state = _inverse_matrix(PRECONDITIONERS["nystrom"])(case, 0.1, scaling)
    curvature = _curvature(_network) / np.outer(root, root)
    key = jax.random.fold_in(jax.random.key(0), 0)
    test = np.linalg.qr(np.asarray(jax.random.normal(key, (32, rank), jnp.float64)))[0]
    image = curvature @ test
    expected = image @ np.linalg.pinv(test.T @ image) @ image.T
    found = (state.vectors * state.eigenvalues[None]) @ state.vectors.T
    np.testing.assert_allclose(found, expected, atol=1e-10 * np.linalg.norm(curvature, 2))
    np.testing.assert_allclose(state.vectors.T @ state.vectors, np.eye(rank), atol=1e-13)
    assert np.all(np.diff(state.eigenvalues) <= 0)
    # The formula of the record: 1 where the sketch sees nothing, and at its least eigenvalue.
    u, values = np.asarray(state.vectors), np.asarray(state.eigenvalues)
    sketched = (u * ((values[-1] + 0.1) / (values + 0.1))[None]) @ u.T
    expected = (sketched + np.eye(32) - u @ u.T) / np.outer(root, root)
    np.testing.assert_allclose(inverse, expected, rtol=1e-9, atol=1e-9)


def test_a_sketch_of_full_rank_inverts_the_system(x64):
    case, curvature = _case(_network), _curvature(_network)
    assert np.linalg.matrix_rank(curvature) < 32
    inverse, state = _inverse_matrix(gnlin.Nystrom(rank=1000))(case, 1e-3)
    assert state.vectors.shape == (32, 32)
    expected = np.linalg.inv(curvature / 1e-3 + np.eye(32))  # scaled so that it is I where G is 0
    np.testing.assert_allclose(inverse, expected, atol=1e-8)


def test_sketches_are_refreshed_in_their_time(x64):
    case, nystrom = _case(_network), gnlin.Nystrom(rank=3, refresh_every=3)

    def step(carry, _):
        params, state = carry
        state = nystrom.prepare(_system(case._replace(params=params), 0.1)[0], params, state)[1]
        return (jax.tree.map(lambda leaf: 0.9 * leaf, params), state), state

    start = (case.params, nystrom.init(case.params)[0])
    _, states = jax.jit(lambda carry: jax.lax.scan(step, carry, length=7))(start)
    changed = [
        not np.array_equal(a, b) for a, b in zip(states.vectors, states.vectors[1:], strict=False)
    ]
    assert changed == [False, False, True, False, False, True]
    np.testing.assert_array_equal(states.count, np.arange(1, 8))
    assert np.all(states.eigenvalues[0] > 0)


def test_sketches_of_one_system_converge_to_its_largest_eigenvalues(x64):
    case, nystrom = _case(_network), gnlin.Nystrom(rank=6)

    def step(state, _):
        state = nystrom.prepare(_system(case, 0.1)[0], case.params, state)[1]
        return state, state.eigenvalues

    _, history = jax.jit(lambda: jax.lax.scan(step, nystrom.init(case.params)[0], length=8))()
    exact = np.linalg.eigvalsh(_curvature(_network))[::-1][:6]
    errors = np.max(np.abs(history - exact[None]), axis=1) / exact[0]
    assert errors[-1] < errors[0] / 10


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_sketch_stays_definite_in_low_precision(dtype):
    """Eigenvalues over sixteen decades, of which the products resolve seven or two."""
    scales = jnp.logspace(4, -4, 40).astype(dtype)
    objective = gnlin.Objective(
        lambda params, batch: params * batch, lambda z, batch: jnp.sum(z.astype(jnp.float32) ** 2)
    )
    nystrom = gnlin.Nystrom(rank=20)

    @jax.jit
    def sketched(params, batch, damping):
        system, _ = _system(Case(objective, params, batch), damping)
        (apply, _), state = nystrom.prepare(system, params, nystrom.init(params)[0])
        return jax.vmap(apply)(jnp.eye(40)), state

    for damping in (0.0, 1e-6, 1.0):
        inverse, state = sketched(jnp.ones(40, dtype), scales, damping)
        np.testing.assert_allclose(state.vectors.T @ state.vectors, np.eye(20), atol=1e-5)
        wide = np.asarray(inverse, np.float64)
        assert np.min(np.linalg.eigvalsh((wide + wide.T) / 2)) > 0
        assert 0.5 < float(state.eigenvalues[0]) / 2e8 < 2


# Mistakes.


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: gnlin.Jacobi(exponent=1.5), r"`exponent` must lie in \[0, 1\]; got 1.5"),
        (lambda: gnlin.Jacobi(exponent=float("nan")), r"`exponent` must lie in \[0, 1\]; got nan"),
        (lambda: gnlin.Jacobi(decay=1.0), r"`decay` must lie in \[0, 1\); got 1.0"),
        (lambda: gnlin.Jacobi(probes=0), "`probes` must be an integer of at least 1; got 0"),
        (lambda: gnlin.Jacobi(probes=True), "`probes` must be an integer of at least 1; got True"),
        (lambda: gnlin.Jacobi(seed=-1), "`seed` must be an integer of at least 0; got -1"),
        (lambda: gnlin.Nystrom(rank=0), "`rank` must be an integer of at least 1; got 0"),
        (lambda: gnlin.Nystrom(rank=2.0), "`rank` must be an integer of at least 1; got 2.0"),
        (
            lambda: gnlin.Nystrom(refresh_every=0),
            "`refresh_every` must be an integer of at least 1; got 0",
        ),
        (
            lambda: gnlin.Nystrom(batch_size=0),
            "`batch_size` must be an integer of at least 1; got 0",
        ),
        (lambda: gnlin.Nystrom(seed=None), "`seed` must be an integer of at least 0; got None"),
    ],
)
def test_options_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_class_in_place_of_a_record():
    for kind in (gnlin.Jacobi, gnlin.Nystrom):
        with pytest.raises(
            TypeError, match="`preconditioner` must be a function of the System or a record"
        ):
            gnlin.CG(preconditioner=kind)


def test_records_are_hashable_and_compare_by_value():
    assert gnlin.Jacobi() == gnlin.Jacobi()
    assert hash(gnlin.Nystrom(5)) == hash(gnlin.Nystrom(5)) != hash(gnlin.Nystrom(6))
