"""The gain ratio of a step: what became of the decrease that a model promised.

`damping` adapts λ to it. `gauss_newton` and `levenberg_marquardt` hand a policy the `Trial` of a
step.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.tree import Params


class Trial(NamedTuple):
    """One step δ and its outcome; all scalars.

    Attributes:
        gain_ratio: ρ = actual decrease / predicted decrease; −∞ where it is not finite, or no
            decrease was predicted.
        decrease: ℓ(θ) − ℓ(θ + δ).
        slope: uᵀδ, with u the right-hand side of the solve: the gradient, or the incoming updates.
        length: ‖D^½ δ‖ of the solution, before any correction of it.
        radius: the Δ that bounded the step; infinite without a bound.
        again: whether both losses are of a batch that comes again and again.
    """

    gain_ratio: jax.Array
    decrease: jax.Array
    slope: jax.Array
    length: jax.Array
    radius: chex.Numeric
    again: jax.Array | bool = False


def resolution(value: jax.Array) -> jax.Array:
    """Differences of losses up to this size are rounding.

    It is 8 units in the last place, because a sum is rounded a few times.
    """
    return 8 * float(jnp.finfo(value.dtype).eps) * jnp.abs(value)


def trial_of(
    value: jax.Array,
    new_value: jax.Array,
    change: jax.Array,
    step: Params,
    rhs: Params,
    length: jax.Array,
    radius: chex.Numeric = math.inf,
) -> Trial:
    """The outcome of a step, from the losses before and after it."""
    sound = (length > 0) | is_zero(rhs)
    ratio = gain_ratio(value, new_value, change, sound)
    return Trial(ratio, value - new_value, tree.inner(rhs, step), length, radius)


def no_trial(value: jax.Array, length: jax.Array) -> Trial:
    """In place of the trial of a step that is not tried: no decrease was seen, and none refused."""
    ratio = jnp.zeros([], tree.accumulation_dtype(value))
    return Trial(ratio, jnp.zeros_like(value), jnp.zeros_like(length), length, math.inf)


def is_zero(rhs: Params) -> jax.Array:
    """Whether zero is the solution for this right-hand side, and no solve that failed."""
    return tree.max_abs(rhs) == 0


def gain_ratio(
    value: jax.Array, new_value: jax.Array, change: jax.Array, sound: jax.Array
) -> jax.Array:
    """ρ = actual decrease / predicted decrease; −∞ where it is not finite or none was predicted.

    Near a minimum both decreases drop below the resolution of the loss itself, and their quotient
    is noise. The loss then says nothing against the step. The gradient, which is still accurate,
    speaks for it: ρ is 1.

    Args:
        value: loss before the step.
        new_value: loss after it.
        change: prediction of the model for their difference, new − old.
        sound: false for a step of zeros from a solve that failed: its right-hand side is not zero.
    """
    dtype = tree.accumulation_dtype(value)
    finest = resolution(value).astype(dtype)
    value, new_value, predicted = (
        jnp.asarray(x).astype(dtype) for x in (value, new_value, -change)
    )
    actual = value - new_value
    indistinguishable = (jnp.abs(actual) <= finest) & (jnp.abs(predicted) <= finest)
    # A step that should not lower the loss has no gain ratio, and −∞ refuses it.
    falls = jnp.isfinite(actual) & (predicted > 0)
    ratio = jnp.where(falls, actual / jnp.where(falls, predicted, 1).astype(actual.dtype), -jnp.inf)
    return jnp.where(indistinguishable & sound, 1.0, ratio)
