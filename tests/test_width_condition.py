"""`scale_by_spectral_condition` against singular value decompositions in double precision."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrices import norm, normal, scaled
from problems import classifier, enable_x64, third_party, tolerance, train

import gnlin
from gnlin.compare.tasks import TASKS
from gnlin.width.condition import leading_pair

Fans = gnlin.width.Fans
SCALE = jax.jit(gnlin.width.scale_by_spectral_condition().update)
PAIR = jax.jit(leading_pair, static_argnames="steps")


def with_values(values, rows=30, columns=40, seed=0):
    """A matrix with these singular values."""
    left = np.linalg.qr(normal(seed, rows, len(values)))[0]
    right = np.linalg.qr(normal(seed + 1, columns, len(values)))[0]
    return (left * values) @ right.T


# The norm.


@pytest.mark.parametrize(
    "values",
    [
        np.ones(20),
        np.r_[1, 0.999, 0.998, np.linspace(0.9, 0, 17)],
        np.linspace(1, 0.9, 20),
        0.8 ** np.arange(20),
        np.r_[1.0, 1e-3],
        np.ones(1),
    ],
    ids=["orthogonal", "close", "band", "geometric", "rank-two", "rank-one"],
)
def test_norm_of_close_singular_values(values):
    """Within 2 % from the second update on, and never above the norm."""
    matrix = jnp.asarray(with_values(values), jnp.float32)
    vector = jnp.asarray(normal(5, 40), jnp.float32)
    for _ in range(3):
        found, vector = PAIR(matrix, vector, 1.0, 8)
        assert found <= 1 + 1e-5
    assert found >= 0.98
    np.testing.assert_allclose(
        np.linalg.norm(np.asarray(matrix) @ np.asarray(vector)), found, rtol=1e-4
    )


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    rank=st.integers(1, 9),
    exponent=st.integers(-15, 15),
)
def test_small_matrices_are_exact(rows, columns, rank, exponent):
    """As many steps as rows or columns find the norm exactly, at every size."""
    matrix = normal(rows, rows, rank) @ normal(columns, rank, columns) * 10.0**exponent
    updates = np.zeros((9, 9), np.float32)
    updates[:rows, :columns] = matrix
    state = gnlin.width.scale_by_spectral_condition().init(updates)
    assert norm(SCALE(updates, state)[0]) == pytest.approx(1, rel=1e-4)


def test_an_update_at_right_angles_to_all_before_has_its_norm():
    """Two heads of a network that learn in turn: each writes to columns of its own."""
    draw = functools.partial(normal, 0, 40)
    for size in (1e-30, 1e-4, 1.0, 1e3, 1e30):
        first, second = np.zeros((40, 20), np.float32), np.zeros((40, 20), np.float32)
        first[:, :10], second[:, 10:] = draw(10), draw(10) * size
        state = gnlin.width.scale_by_spectral_condition().init(first)
        for _ in range(30):
            _, state = SCALE(first, state)
        for updates in (second, first, second):
            new, state = SCALE(updates, state)
            assert norm(new) == pytest.approx(0.5**0.5, rel=0.02)


def test_large_updates_do_not_overflow():
    for shape, size in (((500, 500), 1e36), ((64, 64), 1e38), ((8,), 1e38), ((1000, 10), 2e-38)):
        new, state = scaled(np.full(shape, size, np.float32))
        ratio = size * (shape[0] if len(shape) == 2 else 1.0)  # of the norm to the prescription
        assert gnlin.metrics(state)["spectral/largest"] == pytest.approx(
            ratio if ratio < 3e38 else np.inf, rel=1e-3
        )
        prescription = (shape[-1] / shape[0]) ** 0.5 if len(shape) == 2 else shape[0] ** 0.5
        assert norm(np.atleast_2d(new)) == pytest.approx(prescription, rel=1e-3)


def training(network, inner, steps, *, batch_size=32, rate=0.05):
    """Norm / prescription of every matrix, for each update from the sixth on, and all losses."""
    task = TASKS[network]()
    tx = optax.chain(
        inner,
        gnlin.width.scale_by_spectral_condition(),
        third_party(optax.scale_by_learning_rate(rate)),
    )

    @jax.jit
    def step(params, state, batch):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            value, grads = jax.value_and_grad(task.objective.value)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates, value

    data = jax.tree.map(jnp.asarray, task.train)
    params = task.init(jax.random.key(0))
    state, ratios, losses = tx.init(params), [], []
    for count, rows in enumerate(task.batches(0, steps, batch_size)):
        params, state, updates, value = step(
            params, state, jax.tree.map(lambda leaf, rows=rows: leaf[rows], data)
        )
        losses.append(float(value))
        if count >= 5:
            matrices = [
                leaf.reshape(-1, leaf.shape[-1])
                for leaf in jax.tree.leaves(updates)
                if leaf.ndim > 1
            ]
            ratios += [
                norm(each) / rate / np.sqrt(each.shape[1] / each.shape[0]) for each in matrices
            ]
    return np.array(ratios), losses


@pytest.mark.parametrize(
    ("network", "inner"),
    [
        ("digits", optax.scale_by_adam()),
        ("digits", optax.identity()),
        ("digits-cnn", optax.scale_by_adam()),
    ],
    ids=["perceptron-adam", "perceptron-sgd", "convolutions-adam"],
)
def test_norms_in_training(network, inner):
    """Within 2 % of the prescription after the first steps, on changing mini-batches."""
    ratios, losses = training(network, third_party(inner), 60)
    assert np.all(ratios > 1 - 1e-4)
    assert np.max(ratios) < 1.02
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_fewer_steps_are_less_accurate():
    """Accuracy grows with their number; one step is a power iteration."""
    matrix = jnp.asarray(normal(0, 60, 50), jnp.float32)
    start = jnp.asarray(normal(1, 50), jnp.float32)
    found = [float(PAIR(matrix, start, 1.0, steps)[0]) for steps in (1, 8, 50)]
    assert found == sorted(found)
    np.testing.assert_allclose(found[-1], norm(matrix), rtol=1e-5)


# What it costs.


def test_cost_beside_the_gradient():
    """Under 5 % of the operations of a gradient on a wide perceptron, at batches of 128.

    XLA counts the body of a loop once. The other seven steps are counted by hand: their products,
    and 2 % for the vectors.
    """
    widths, examples = (64, 1024, 1024, 10), 128
    params = {str(i): jnp.ones(shape) for i, shape in enumerate(itertools.pairwise(widths))}

    def flops(function, *args):
        analysis = jax.jit(function).lower(*args).compile().cost_analysis()
        return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

    def loss(params, x):
        for name in sorted(params)[:-1]:
            x = jnp.tanh(x @ params[name])
        return jnp.mean(jax.nn.log_softmax(x @ params["2"])[:, 0])

    tx = gnlin.width.scale_by_spectral_condition()
    once = flops(tx.update, params, tx.init(params))
    # One step has a product with the matrix and one with its transpose.
    products = sum(4 * leaf.size for leaf in params.values())
    # The loop's body, and the work outside of it: entries, sizes, scaling.
    assert products < once < 2.3 * products
    gradient = flops(jax.value_and_grad(loss), params, jnp.ones((examples, 64)))
    assert once + 7 * 1.02 * products < 0.05 * gradient


# Zeros, infinities, NaN, and empty leaves.


def test_zero_stays_zero():
    updates = {
        "w": jnp.zeros((5, 4)),
        "b": jnp.zeros(4),
        "s": jnp.zeros([]),
        "k": jnp.zeros((2, 3, 3)),
    }
    updates["k"] = updates["k"].at[1].set(jnp.eye(3))
    fans = {"w": None, "b": None, "s": None, "k": Fans(batch_axis=0)}
    new, state = scaled(updates, fans, calls=2)
    expected = {**updates, "k": updates["k"]}
    chex.assert_trees_all_close(new, expected, rtol=1e-6)
    assert gnlin.metrics(state)["spectral/smallest"] == 0
    chex.assert_tree_all_finite(state)


@pytest.mark.parametrize("size", [1e-35, 1e-20, 1e20, 1e35])
def test_any_size_is_brought_to_size(size):
    updates = {"w": jnp.full((5, 4), size), "b": jnp.full(4, size), "s": jnp.asarray(size)}
    new, _ = SCALE(updates, gnlin.width.scale_by_spectral_condition().init(updates))
    for leaf, expected in (
        (new["w"], 0.8**0.5),
        (new["b"][None], 2.0),
        (new["s"][None, None], 1.0),
    ):
        assert norm(leaf) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_leaves_nothing_behind(bad):
    tx = gnlin.width.scale_by_spectral_condition()
    update = jax.jit(tx.update)
    clean = {
        "w": jnp.asarray(normal(0, 12, 10), jnp.float32),
        "v": jnp.asarray(normal(1, 10, 12), jnp.float32),
    }
    _, state = update(clean, tx.init(clean))
    broken, after = update({**clean, "w": clean["w"].at[0, 0].set(bad)}, state)
    assert np.isnan(broken["w"]).all()  # so that a check for NaN sees it
    np.testing.assert_allclose(norm(broken["v"]), 1.2**0.5, rtol=1e-4)
    chex.assert_trees_all_equal(after.vectors["w"], state.vectors["w"])
    again, _ = update(clean, after)
    assert norm(again["w"]) == pytest.approx((10 / 12) ** 0.5, rel=1e-3)


def test_empty_leaves_pass():
    updates = {"w": jnp.zeros((0, 4)), "b": jnp.ones(4), "none": None}
    new, _ = scaled(updates)
    assert new["w"].shape == (0, 4)
    np.testing.assert_allclose(new["b"], 1, rtol=1e-6)
    new, state = scaled({})
    assert new == {}
    assert gnlin.metrics(state)["spectral/largest"] == 0


@pytest.mark.parametrize(
    "dtypes", [(jnp.bfloat16, jnp.float16, jnp.float32), (jnp.float64,)], ids=["32", "64"]
)
def test_dtypes(dtypes):
    """Updates keep theirs; norms are as accurate as it allows; vectors are at least float32."""
    with enable_x64(jnp.float64 in dtypes):
        names = [dtype.__name__ for dtype in dtypes]
        updates = {
            name: [jnp.asarray(normal(0, 12, 10), name), jnp.ones(3, name), jnp.ones([], name)]
            for name in names
        }
        new, state = scaled(updates, calls=3)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, updates)
        for name in names:
            assert state.vectors[name][0].dtype == ("float64" if name == "float64" else "float32")
            accuracy = max(float(jnp.finfo(name).eps), 1e-9 if name == "float64" else 1e-4)
            assert norm(new[name][0]) == pytest.approx((10 / 12) ** 0.5, rel=2 * accuracy)
            weights = jax.jit(
                lambda key, name=name: gnlin.width.spectral_init(key, (12, 10), name)
            )(jax.random.key(0))
            assert weights.dtype == name
            assert norm(weights) == pytest.approx(
                (10 / 12) ** 0.5, rel=2 * float(jnp.finfo(name).eps) + 1e-6
            )


# In the family, and under JAX and Optax.

ADAM = third_party(optax.scale_by_adam())
RATE = third_party(optax.scale_by_learning_rate(0.05))
SPECTRAL = gnlin.width.scale_by_spectral_condition()
FAMILY = {
    "iterative_linearisation": lambda o: gnlin.iterative_linearisation(
        optax.chain(ADAM, SPECTRAL, RATE), o, 3
    ),
    "prox_linear": lambda o: gnlin.prox_linear(optax.chain(ADAM, SPECTRAL, RATE), o, 3),
    "scale_by_gauss_newton": lambda o: optax.chain(
        gnlin.scale_by_gauss_newton(o, 0.1), SPECTRAL, RATE
    ),
    "gauss_newton": lambda o: optax.chain(
        gnlin.gauss_newton(o, damping=0.1), SPECTRAL, third_party(optax.scale(0.05))
    ),
    "levenberg_marquardt": lambda o: optax.chain(
        gnlin.levenberg_marquardt(o), SPECTRAL, third_party(optax.scale(0.05))
    ),
    "multipliers": lambda o: optax.chain(ADAM, gnlin.width.scale_by_maximal_update_adam(), RATE),
}


@pytest.mark.parametrize("build", FAMILY.values(), ids=FAMILY.keys())
def test_composes_with_the_family(build):
    problem = classifier()
    tx = build(problem.objective)
    params, state = train(
        tx.update, problem.objective, problem.params, tx.init(problem.params), problem.batches
    )
    before, after = (
        problem.objective.value(p, problem.batches[0]) for p in (problem.params, params)
    )
    assert after < before
    # The inner optimiser of prox_linear begins afresh, and multipliers have no metrics.
    if build not in (FAMILY["multipliers"], FAMILY["prox_linear"]):
        assert gnlin.metrics(state)["spectral/largest"] > 0


def test_muon_is_brought_to_size():
    params = {"w": jnp.asarray(normal(0, 12, 10), jnp.float32)}
    tx = optax.chain(
        third_party(optax.contrib.muon(1.0)), gnlin.width.scale_by_spectral_condition()
    )
    updates, _ = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
    assert norm(updates["w"]) == pytest.approx((10 / 12) ** 0.5, rel=0.02)


def test_scan_donation_and_a_report_under_jit():
    params = {"w": jnp.asarray(normal(0, 12, 10), jnp.float32), "b": jnp.ones(10)}
    tx = gnlin.width.scale_by_spectral_condition()
    gradients = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1, leaf - 1]), params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(params, state, gradients):
        def body(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), gnlin.width.spectral_report(
                params, updates
            )

        return jax.lax.scan(body, (params, state), gradients)

    start = jax.tree.map(jnp.array, params)
    (_, state), report = run(start, tx.init(params), gradients)
    assert start["w"].is_deleted()
    np.testing.assert_allclose(report["['w']"].update_ratio, 1, rtol=5e-3)
    assert state.vectors["w"].shape == (1, 1, 10)


def test_injected_hyperparameters():
    params = {"w": jnp.asarray(normal(0, 12, 10), jnp.float32)}

    def fans(params):
        return None

    factory = optax.inject_hyperparams(
        gnlin.width.scale_by_spectral_condition, static_args=("fans", "lanczos_steps")
    )
    tx = factory(fans, lanczos_steps=4)
    updates, _ = jax.jit(tx.update)(params, tx.init(params))
    chex.assert_trees_all_close(
        updates, scaled(params, lanczos_steps=4)[0], **tolerance(jnp.float32, 50)
    )


def test_unknown_arguments_and_parameters_are_ignored():
    tx = optax.chain(
        gnlin.width.scale_by_spectral_condition(), gnlin.width.scale_by_maximal_update_sgd()
    )
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2), batch=None, value=0.0)


# Errors.


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, None])
def test_steps_out_of_range(steps):
    with pytest.raises(ValueError, match="`lanczos_steps` must be an integer of at least 1; got"):
        gnlin.width.scale_by_spectral_condition(lanczos_steps=steps)


def test_state_of_other_parameters():
    tx = gnlin.width.scale_by_spectral_condition()
    for others in ({"v": jnp.ones((2, 3))}, {"w": jnp.ones((2, 4))}, jnp.ones((2, 3))):
        with pytest.raises(
            ValueError, match=r"`opt_state` does not match `updates`; call tx\.init"
        ):
            tx.update({"w": jnp.ones((2, 3))}, tx.init(others))
