"""Matrices for the tests of `gnlin.width`: their norms by NumPy in float64, and their scaling."""

import jax
import numpy as np

import gnlin


def norm(matrix) -> float:
    return float(np.linalg.norm(np.asarray(matrix, np.float64), 2))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def scaled(updates, fans=None, *, calls=1, **options):
    """The updates after several calls on the same, each from the vectors of the one before."""
    tx = gnlin.width.scale_by_spectral_condition(fans, **options)
    state, update = jax.jit(tx.init)(updates), jax.jit(tx.update)
    for _ in range(calls):
        new, state = update(updates, state)
    return new, state
