"""Initial weights on the spectral condition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from matrices import norm, normal

import gnlin


def test_initial_weights_keep_features_through_square_layers():
    x = jnp.asarray(normal(0, 5, 32), jnp.float32)
    draw = jax.jit(lambda key: gnlin.width.spectral_init(key, (32, 32)))
    for key in jax.random.split(jax.random.key(0), 10):
        x = x @ draw(key)
    np.testing.assert_allclose(
        np.linalg.norm(x, axis=1), np.linalg.norm(normal(0, 5, 32), axis=1), rtol=1e-4
    )


def test_initial_weights_are_drawn_evenly():
    """Entries of a random orthogonal matrix, on the diagonal as elsewhere: mean 0, square 1 / n."""
    draw = jax.jit(jax.vmap(lambda key: gnlin.width.spectral_init(key, (3, 3))))
    draws = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    np.testing.assert_allclose(draws.mean(axis=0), 0, atol=4 * np.sqrt(1 / 3 / 4000))
    np.testing.assert_allclose((draws**2).mean(axis=0), 1 / 3, atol=0.03)
    assert (np.linalg.det(draws) > 0).mean() == pytest.approx(0.5, abs=0.04)


def test_initialises_flax():
    layer = linen.Dense(6, kernel_init=functools.partial(gnlin.width.spectral_init, scale=2.0))
    kernel = layer.init(jax.random.key(0), jnp.ones((1, 24)))["params"]["kernel"]
    assert norm(kernel) == pytest.approx(2 * 0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"shape": (2, 3, 4)},
            ValueError,
            "`fans` must name the three axes of the weights, ",
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
