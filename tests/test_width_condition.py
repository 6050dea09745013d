"""The spectral condition against singular value decompositions of NumPy, in double precision."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from hypothesis import given
from hypothesis import strategies as st
from problems import classifier, enable_x64, third_party, tolerance, train

import gnlin
from gnlin.compare.tasks import TASKS
from gnlin.width.condition import leading_pair
from gnlin.width.fans import layout_of, layouts

Fans = gnlin.width.Fans
SCALE = jax.jit(gnlin.width.scale_by_spectral_condition().update)
PAIR = jax.jit(leading_pair, static_argnames="steps")


def norm(matrix) -> float:
    return float(np.linalg.norm(np.asarray(matrix, np.float64), 2))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def with_values(values, rows=30, columns=40, seed=0):
    """A matrix with these singular values."""
    left = np.linalg.qr(normal(seed, rows, len(values)))[0]
    right = np.linalg.qr(normal(seed + 1, columns, len(values)))[0]
    return (left * values) @ right.T


def scaled(updates, fans=None, *, calls=1, **options):
    """The updates after several calls on the same, each from the vectors of the one before."""
    tx = gnlin.width.scale_by_spectral_condition(fans, **options)
    state, update = jax.jit(tx.init)(updates), jax.jit(tx.update)
    for _ in range(calls):
        new, state = update(updates, state)
    return new, state


# What a leaf's norm is, and what it should be.

LEAVES = {
    # name: (shape, fans, leaf ↦ its maps as matrices (fan-in, fan-out) in the units of the norm,
    # prescription)
    "matrix": ((4, 9), None, lambda w: [w], 1.5),
    "bias": ((9,), None, lambda w: [w[None]], 3.0),
    "scalar": ((), None, lambda w: [w[None, None]], 1.0),
    "gain": ((9,), Fans(-1, -1), lambda w: [np.diag(w)], 1.0),
    "convolution": ((3, 2, 4, 6), None, lambda w: [w.reshape(24, 6)], 0.5),
    "convolution-1d": ((3, 4, 6), Fans(), lambda w: [w.reshape(12, 6)], 0.5**0.5),
    "depthwise": (
        (2, 2, 1, 6),
        Fans(-1, -1),
        lambda w: [w[..., i].reshape(4, 1) for i in range(6)],
        0.5,
    ),
    "oihw": ((6, 4, 3, 2), Fans(1, 0), lambda w: [w.reshape(6, 24).T], 0.5),
    "transposed": ((9, 4), Fans(1, 0), lambda w: [w.T], 1.5),
    "embedding": ((7, 9), Fans((), -1, index_axis=0), lambda w: [row[None] for row in w], 3.0),
    "experts": ((3, 4, 9), Fans(index_axis=0), list, 1.5),
    "heads": ((4, 3, 3), Fans(0, (1, 2)), lambda w: [w.reshape(4, 9)], 1.5),
    "heads-out": ((2, 2, 9), Fans((0, 1), 2), lambda w: [w.reshape(4, 9)], 1.5),
}
NAMES = LEAVES.keys()
LEAF_FANS = {name: fans for name, (_, fans, _, _) in LEAVES.items()}


def leaf_norms(name, leaf):
    return max(map(norm, LEAVES[name][2](np.asarray(leaf))))


def test_every_kind_of_leaf_has_its_prescribed_norm():
    """The largest among its separate maps, and the direction is untouched."""
    leaves = {name: jnp.asarray(normal(0, *LEAVES[name][0]), jnp.float32) for name in NAMES}
    new, state = scaled(leaves, LEAF_FANS, calls=2)
    before = {name: leaf_norms(name, leaves[name]) for name in NAMES}
    for name, (_, _, _, prescription) in LEAVES.items():
        np.testing.assert_allclose(
            leaf_norms(name, new[name]), prescription, rtol=1e-4, err_msg=name
        )
        np.testing.assert_allclose(
            new[name] * before[name], leaves[name] * prescription, rtol=1e-3, err_msg=name
        )
    ratios = [before[name] / LEAVES[name][3] for name in NAMES]
    np.testing.assert_allclose(gnlin.metrics(state)["spectral/largest"], max(ratios), rtol=1e-4)
    np.testing.assert_allclose(gnlin.metrics(state)["spectral/smallest"], min(ratios), rtol=1e-4)


def test_reports_and_initial_weights_follow_the_same_axes():
    @jax.jit
    def draw(key):
        return {
            name: gnlin.width.spectral_init(key, shape, fans=fans)
            for name, (shape, fans, _, _) in LEAVES.items()
        }

    weights = draw(jax.random.key(0))
    updates = {name: jnp.asarray(normal(1, *LEAVES[name][0]), jnp.float32) for name in NAMES}
    reports = jax.jit(lambda *trees: gnlin.width.spectral_report(*trees, LEAF_FANS))(
        weights, updates
    )
    for name, (_, _, maps, prescription) in LEAVES.items():
        report = reports[f"['{name}']"]
        np.testing.assert_allclose(report.prescription, prescription, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(
            (report.fan_out / report.fan_in) ** 0.5, prescription, rtol=1e-6, err_msg=name
        )
        np.testing.assert_allclose(report.weight_ratio, 1, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(
            report.update, leaf_norms(name, updates[name]), rtol=1e-5, err_msg=name
        )
        np.testing.assert_allclose(
            report.update_ratio * prescription, report.update, rtol=1e-5, err_msg=name
        )
        for each in maps(np.asarray(weights[name])):
            singular = np.linalg.svd(each, compute_uv=False)
            np.testing.assert_allclose(
                singular[singular > 0], prescription, rtol=1e-5, err_msg=name
            )


def test_stacked_layers_are_scaled_one_by_one():
    sizes = np.array([1e-6, 1.0, 30.0])
    tree = {
        "w": jnp.asarray(normal(0, 3, 4, 9) * sizes[:, None, None], jnp.float32),
        "b": jnp.asarray(normal(1, 3, 9) * sizes[:, None], jnp.float32),
    }
    fans = {"w": Fans(batch_axis=0), "b": Fans((), -1, batch_axis=0)}
    new, _ = scaled(tree, fans, calls=2)
    for i in range(3):
        np.testing.assert_allclose(new["w"][i] * norm(tree["w"][i]), tree["w"][i] * 1.5, rtol=1e-3)
        np.testing.assert_allclose(norm(new["b"][i][None]), 3, rtol=1e-5)
    report = jax.jit(lambda *trees: gnlin.width.spectral_report(*trees, fans))(tree, new)["['w']"]
    assert report.update.shape == (3,)
    np.testing.assert_allclose(report.update_ratio, 1, rtol=1e-4)


def test_fans_are_a_tree_a_prefix_or_a_function():
    params = {
        "blocks": [jnp.ones((3, 4, 4)), jnp.ones((2, 5, 5))],
        "out": jnp.ones((4, 2)),
        "none": None,
    }
    whole = {"blocks": [Fans(batch_axis=0)] * 2, "out": None, "none": None}
    prefix = {"blocks": Fans(batch_axis=0), "out": None, "none": None}

    def function(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: Fans(batch_axis=0) if "blocks" in jax.tree_util.keystr(path) else None,
            params,
        )

    expected = layouts(whole, params)
    assert expected["blocks"][1].stack == (2, 1, 5, 5)
    assert expected["out"].stack == (1, 1, 4, 2)
    for fans in (prefix, function):
        assert layouts(fans, params) == expected


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
    """No search is left where there are as many steps as rows or columns; sizes are of no consequence."""
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
    for shape, size in (((1000, 1000), 1e36), ((64, 64), 1e38), ((8,), 1e38), ((1000, 10), 2e-38)):
        new, state = scaled(np.full(shape, size, np.float32))
        ratio = size * (shape[0] if len(shape) == 2 else 1.0)  # of the norm to the prescription
        assert gnlin.metrics(state)["spectral/largest"] == pytest.approx(
            ratio if ratio < 3e38 else np.inf, rel=1e-3
        )
        prescription = (shape[-1] / shape[0]) ** 0.5 if len(shape) == 2 else shape[0] ** 0.5
        assert norm(np.atleast_2d(new)) == pytest.approx(prescription, rel=1e-3)


def training(network, inner, steps, *, batch_size=32, rate=0.05):
    """Of every scaled update after the first five, and every matrix, its norm / prescription."""
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
    """Within 2 % of the prescription after the first steps, on mini-batches that change every update."""
    ratios, losses = training(network, third_party(inner), 60)
    assert np.all(ratios > 1 - 1e-4)
    assert np.max(ratios) < 1.02
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_fewer_steps_are_less_accurate():
    """The figures depend on how many there are; a power iteration is the first."""
    matrix = jnp.asarray(normal(0, 60, 50), jnp.float32)
    start = jnp.asarray(normal(1, 50), jnp.float32)
    found = [float(PAIR(matrix, start, 1.0, steps)[0]) for steps in (1, 8, 50)]
    assert found == sorted(found)
    np.testing.assert_allclose(found[-1], norm(matrix), rtol=1e-5)


# What it costs.


def test_cost_beside_the_gradient():
    """Under 5 % of the operations of a gradient on a wide perceptron, at batches of 128.

    XLA counts the body of a loop once. What the other seven steps take is counted by hand: their
    products, and 2 % for the vectors.
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
    products = sum(
        4 * leaf.size for leaf in params.values()
    )  # of one step: with the matrix and its transpose
    assert (
        products < once < 2.3 * products
    )  # the loop's body, and what is done once: entries, sizes, scaling
    gradient = flops(jax.value_and_grad(loss), params, jnp.ones((examples, 64)))
    assert once + 7 * 1.02 * products < 0.05 * gradient


# Numbers that are none.


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
    assert np.isnan(broken["w"]).all()  # for those who look for it
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
    """Updates keep theirs; norms are as accurate as it allows, and the vectors at least float32."""
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


# Initial weights.


def test_initial_weights_keep_features_through_square_layers():
    x = jnp.asarray(normal(0, 5, 32), jnp.float32)
    draw = jax.jit(lambda key: gnlin.width.spectral_init(key, (32, 32)))
    for key in jax.random.split(jax.random.key(0), 10):
        x = x @ draw(key)
    np.testing.assert_allclose(
        np.linalg.norm(x, axis=1), np.linalg.norm(normal(0, 5, 32), axis=1), rtol=1e-4
    )


def test_initial_weights_are_drawn_evenly():
    """Entries of a random orthogonal matrix have mean 0 and mean square 1 / n, on the diagonal as elsewhere."""
    draw = jax.jit(jax.vmap(lambda key: gnlin.width.spectral_init(key, (3, 3))))
    draws = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    np.testing.assert_allclose(draws.mean(axis=0), 0, atol=4 * np.sqrt(1 / 3 / 4000))
    np.testing.assert_allclose((draws**2).mean(axis=0), 1 / 3, atol=0.03)
    assert (np.linalg.det(draws) > 0).mean() == pytest.approx(0.5, abs=0.04)


def test_initialises_flax():
    layer = linen.Dense(6, kernel_init=functools.partial(gnlin.width.spectral_init, scale=2.0))
    kernel = layer.init(jax.random.key(0), jnp.ones((1, 24)))["params"]["kernel"]
    assert norm(kernel) == pytest.approx(2 * 0.5, rel=1e-5)


# Learning rates by layer.


def test_multipliers():
    params = {"w": (16, 64), "b": (64,), "g": (64,), "e": (9, 64), "k": (3, 3, 16, 32), "s": ()}
    fans = {
        "w": None,
        "b": None,
        "g": Fans(-1, -1),
        "e": Fans((), -1, index_axis=0),
        "k": None,
        "s": None,
    }
    params = {name: jnp.ones(shape) for name, shape in params.items()}
    sgd = {"w": 64 / 16, "b": 64, "g": 64, "e": 64, "k": 32 / (9 * 16), "s": 1}
    adam = {"w": 1 / 16, "b": 1, "g": 1, "e": 1, "k": 1 / (9 * 16), "s": 1}
    for build, expected in (
        (gnlin.width.scale_by_maximal_update_sgd, sgd),
        (gnlin.width.scale_by_maximal_update_adam, adam),
    ):
        new, _ = build(fans).update(params, build(fans).init(params))
        chex.assert_trees_all_close(
            new, jax.tree.map(lambda x, c: c * x, params, jax.tree.map(float, expected)), rtol=1e-6
        )


def test_multipliers_relative_to_a_narrower_network():
    def shapes(width):
        return [
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in ((8, width), (width, width), (width, 2), (width,))
        ]

    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes(40))
    sgd = gnlin.width.scale_by_maximal_update_sgd(base=shapes(10))
    adam = gnlin.width.scale_by_maximal_update_adam(base=shapes(10))
    for tx, expected in ((sgd, (4, 1, 1 / 4, 4)), (adam, (1, 1 / 4, 1 / 4, 1))):
        new, _ = tx.update(ones, tx.init(ones))
        np.testing.assert_allclose([leaf.ravel()[0] for leaf in new], expected, rtol=1e-6)
    same = gnlin.width.scale_by_maximal_update_adam(base=shapes(40))
    chex.assert_trees_all_equal(same.update(ones, same.init(ones))[0], ones)


@pytest.mark.parametrize(
    ("inner", "build"),
    [
        (optax.sgd(1.0), gnlin.width.scale_by_maximal_update_sgd),
        (optax.adam(1.0, eps=1e-20), gnlin.width.scale_by_maximal_update_adam),
    ],
    ids=["sgd", "adam"],
)
def test_multipliers_keep_updates_in_proportion_at_every_width(inner, build):
    """From the paper's initial weights, the first update's norm / prescription is of one order at widths 64 and 512."""
    x = jnp.asarray(normal(0, 32, 16), jnp.float32)
    y = jnp.asarray(normal(1, 32, 3), jnp.float32)

    def ratios(width):
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = ((16, width), (width, width), (width, 3))
        sides = [(shape[1] / shape[0]) ** 0.5 for shape in shapes]
        sizes = [min(1, side) / shape[0] ** 0.5 for side, shape in zip(sides, shapes, strict=True)]
        params = [
            jax.random.normal(*each) * size for *each, size in zip(keys, shapes, sizes, strict=True)
        ]

        def loss(params):
            hidden = jnp.tanh(jnp.tanh(x @ params[0]) @ params[1])
            return jnp.mean((hidden @ params[2] - y) ** 2)

        tx = optax.chain(third_party(inner), build())
        grads = jax.jit(jax.grad(loss))(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return np.array([norm(each) / side for each, side in zip(updates, sides, strict=True)])

    narrow, wide = ratios(64), ratios(512)
    assert np.all(wide / narrow < 2)
    assert np.all(wide / narrow > 0.5)


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
        gnlin.gauss_newton(1.0, o, 0.1), SPECTRAL, third_party(optax.scale(0.05))
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
    if build not in (
        FAMILY["multipliers"],
        FAMILY["prox_linear"],
    ):  # whose inner optimiser begins afresh
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
    fans = lambda params: None  # noqa: E731
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


# Mistakes.


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, None])
def test_steps_out_of_range(steps):
    with pytest.raises(ValueError, match="`lanczos_steps` must be an integer of at least 1; got"):
        gnlin.width.scale_by_spectral_condition(lanczos_steps=steps)


BUILDERS = {
    "scale_by_spectral_condition": gnlin.width.scale_by_spectral_condition,
    "scale_by_maximal_update_sgd": gnlin.width.scale_by_maximal_update_sgd,
    "scale_by_maximal_update_adam": gnlin.width.scale_by_maximal_update_adam,
}
each_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())


@each_builder
@pytest.mark.parametrize(
    ("fans", "error", "message"),
    [
        (
            None,
            ValueError,
            r"`fans` must say what the three axes of \['w'\] are, of shape \(2, 3, 4\): gnlin\.Fans\(",
        ),
        (
            {"v": Fans()},
            ValueError,
            r"`fans` must be a gnlin\.Fans, or a tree of them .* got \{'v'",
        ),
        (
            {"w": "kernel"},
            TypeError,
            r"`fans` must hold gnlin\.Fans, or None .*; got 'kernel' at \['w'\]",
        ),
        (
            Fans(3),
            ValueError,
            r"`fans` names axes that an array of shape \(2, 3, 4\) does not have: .*\(at \['w'\]\)",
        ),
        (Fans(1, 2, batch_axis=-2), ValueError, r"`fans` names an axis twice: .*\(at \['w'\]\)"),
    ],
    ids=["three-axes", "other-tree", "string", "range", "twice"],
)
def test_fans_that_do_not_fit(build, fans, error, message):
    with pytest.raises(error, match=message):
        build(fans).init({"w": jnp.ones((2, 3, 4))})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.5,), TypeError, r"`in_axis` must be an integer or a tuple of integers; got 1\.5"),
        ((0, "last"), TypeError, "`out_axis` must be .*; got 'last'"),
        ((0, 1, True), TypeError, "`batch_axis` must be .*; got True"),
        ((0, 1, 1), ValueError, "`fans` names an axis twice"),
        (((0, 0), 1), ValueError, "`fans` names an axis twice"),
        ((0, 1, (), 0), ValueError, "`fans` names an axis twice"),
    ],
)
def test_axes_that_are_none(arguments, error, message):
    with pytest.raises(error, match=message):
        Fans(*arguments)


@each_builder
def test_missing_updates_and_parameters(build):
    tx = build()
    with pytest.raises(ValueError, match="`params` is missing"):
        tx.init(None)
    with pytest.raises(ValueError, match="`updates` is missing"):
        tx.update(None, tx.init(jnp.ones(2)))
    with pytest.raises(TypeError, match="params has dtype int32"):
        tx.init(jnp.arange(3))


def test_state_of_other_parameters():
    tx = gnlin.width.scale_by_spectral_condition()
    for others in ({"v": jnp.ones((2, 3))}, {"w": jnp.ones((2, 4))}, jnp.ones((2, 3))):
        with pytest.raises(
            ValueError, match=r"`opt_state` does not match `updates`; call tx\.init"
        ):
            tx.update({"w": jnp.ones((2, 3))}, tx.init(others))


def test_base_of_another_form():
    with pytest.raises(ValueError, match="`base` must be of the form of the parameters"):
        gnlin.width.scale_by_maximal_update_sgd(base={"v": jnp.ones(2)}).init({"w": jnp.ones(2)})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"shape": (2, 3, 4)},
            ValueError,
            "`fans` must say what the three axes of the weights are",
        ),
        ({"scale": 0.0}, ValueError, r"`scale` must be positive; got 0\.0"),
        ({"scale": "big"}, TypeError, "`scale` must be a number; got 'big'"),
        ({"dtype": jnp.int32}, TypeError, "`dtype` must be a real floating dtype; got int32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_initial_weights_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        gnlin.width.spectral_init(**{"key": jax.random.key(0), "shape": (2, 3), **options})


def test_report_of_other_updates():
    with pytest.raises(
        ValueError, match=r"`updates` does not match `params`; pass what tx\.update returned"
    ):
        gnlin.width.spectral_report({"w": jnp.ones((2, 3))}, {"w": jnp.ones((3, 2))})


def test_layouts_are_invertible():
    leaf = np.arange(120).reshape(2, 3, 4, 5)
    layout = layout_of("leaf", Fans(in_axis=3, out_axis=(1, 3), batch_axis=2), leaf.shape)
    assert layout.stack == (4, 5, 2, 3)
    np.testing.assert_array_equal(layout.join(layout.split(leaf)), leaf)
    assert layout.spread(np.arange(4)).shape == (1, 1, 4, 1)
