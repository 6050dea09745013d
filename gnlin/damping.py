"""How much damping: a number, a schedule, or a rule that listens to the gain ratio."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer

from gnlin import tree


class DampingState(NamedTuple):
    damping: jax.Array  # λ for the next step
    growth: jax.Array  # factor that λ takes at the next rejection


@dataclasses.dataclass(frozen=True)
class GainRatio:
    r"""Damping that follows how well the quadratic model predicts the loss (Nielsen's rule).

    With the gain ratio ρ = actual decrease / predicted decrease,

    .. math:: \lambda \leftarrow \begin{cases}
                \lambda \max\!\big(\tfrac13,\; 1 - (2\rho - 1)^3\big),\ \nu \leftarrow 2 & \rho > \text{accept} \\
                \lambda\,\nu,\ \nu \leftarrow 2\nu & \text{otherwise (NaN included)}\end{cases}

    a continuous version of Marquardt's up and down factors: λ barely moves while ρ is near ½, and repeated
    failures raise it faster and faster.

    Args:
        initial: first λ.
        accept: least gain ratio of a step that counts as good.
        minimum: smallest λ.
        maximum: largest λ.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Nielsen, Damping parameter in Marquardt's method, IMM-REP-1999-05, 1999.

    Example:
        >>> import gnlin
        >>> gnlin.GainRatio(1.0)
        GainRatio(initial=1.0, accept=0.0001, minimum=1e-20, maximum=1e+20)
    """

    initial: float
    accept: float = 1e-4
    minimum: float = 1e-20
    maximum: float = 1e20

    def __post_init__(self):
        for name in ("initial", "minimum", "maximum"):
            check_positive(name, getattr(self, name))
        if not 0 <= self.accept < 1:
            raise ValueError(f"`accept` must lie in [0, 1); got {self.accept!r}")
        if not self.minimum <= self.maximum:
            raise ValueError(f"`minimum` must not exceed `maximum`; got {self.minimum!r} and {self.maximum!r}")

    def init(self) -> DampingState:
        return DampingState(jnp.asarray(self.initial, float), jnp.asarray(2.0, float))

    def update(self, state: DampingState, gain_ratio: jax.Array) -> DampingState:
        good = gain_ratio > self.accept  # false for NaN
        # ρ > 1 says no more than ρ = 1: the factor is ⅓ from ρ ≈ 0.94 on.
        bounded = jnp.clip(jnp.where(good, gain_ratio, 0.0), 0.0, 1.0).astype(state.damping.dtype)
        shrink = jnp.maximum(1 / 3, 1 - (2 * bounded - 1) ** 3)
        damping = state.damping * jnp.where(good, shrink, state.growth)
        growth = jnp.where(good, 2.0, jnp.minimum(2 * state.growth, 2.0**20))
        return DampingState(jnp.clip(damping, self.minimum, self.maximum), growth)


Damping = chex.Numeric | Callable[[chex.Numeric], chex.Numeric]


def check_number(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number ≥ 0. Traced arrays pass: their values are not known yet."""
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or hasattr(value, "dtype")):
        raise TypeError(f"`{name}` must be a number; got {value!r}")
    if not isinstance(value, Tracer) and not (float(value) >= 0 and math.isfinite(float(value))):
        raise ValueError(f"`{name}` must be finite and at least 0; got {value!r}")


def check_positive(name: str, value: Any) -> None:
    check_number(name, value)
    if not isinstance(value, Tracer) and not float(value) > 0:
        raise ValueError(f"`{name}` must be positive; got {value!r}")


def damping_at(damping: Damping, count: jax.Array) -> jax.Array:
    """λ at this update, in the default floating dtype."""
    return jnp.asarray(damping(count) if callable(damping) else damping, float)


def gain_ratio(value: jax.Array, new_value: jax.Array, predicted: jax.Array) -> jax.Array:
    """ρ = actual decrease / predicted decrease; −∞ where either is not finite or none was predicted.

    Near a minimum both decreases drop below the resolution of the loss itself, and their quotient is noise. The loss
    then cannot speak against the step and the gradient, which is still accurate, speaks for it: ρ is 1.
    """
    dtype = tree.accumulation_dtype(value)
    eps = float(jnp.finfo(value.dtype).eps)
    value, new_value, predicted = (jnp.asarray(x).astype(dtype) for x in (value, new_value, predicted))
    # 8 units in the last place: a sum over examples is rounded a few times.
    resolution = 8 * eps * jnp.abs(value)
    actual = value - new_value
    indistinguishable = (jnp.abs(actual) <= resolution) & (jnp.abs(predicted) <= resolution)
    sound = jnp.isfinite(actual) & (predicted > 0)
    ratio = jnp.where(sound, actual / jnp.where(sound, predicted, 1).astype(actual.dtype), -jnp.inf)
    return jnp.where(indistinguishable, 1.0, ratio)
