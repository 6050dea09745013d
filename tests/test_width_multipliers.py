"""Learning rates by layer, against the factors of the paper and against measured norms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matrices import norm, normal
from problems import third_party

import gnlin

Fans = gnlin.width.Fans


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
    """First updates from the paper's initial weights: norm / prescription at widths 64 and 512."""
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

        @jax.jit
        def first_updates(params):
            return tx.update(jax.grad(loss)(params), tx.init(params), params)[0]

        updates = first_updates(params)
        return np.array([norm(each) / side for each, side in zip(updates, sides, strict=True)])

    narrow, wide = ratios(64), ratios(512)
    assert np.all(wide / narrow < 2)
    assert np.all(wide / narrow > 0.5)


def test_base_of_another_form():
    with pytest.raises(ValueError, match="`base` must be of the form of the parameters"):
        gnlin.width.scale_by_maximal_update_sgd(base={"v": jnp.ones(2)}).init({"w": jnp.ones(2)})
