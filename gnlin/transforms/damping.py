"""How much damping: a number, a schedule, or a rule that listens to the gain ratio."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer

from gnlin import tree
from gnlin.checks import check_number, check_positive
from gnlin.tree import Params


class DampingState(NamedTuple):
    damping: jax.Array  # λ for the next step
    growth: jax.Array  # factor that λ takes at the next rejection


class RadiusState(NamedTuple):
    radius: jax.Array  # Δ for the next step; 0 before the first


class Trial(NamedTuple):
    """What came of one step δ, all scalars."""

    gain_ratio: jax.Array
    decrease: jax.Array  # ℓ(θ) − ℓ(θ + δ)
    slope: jax.Array  # ∇ℓᵀδ
    length: jax.Array  # ‖D^½ δ‖
    radius: chex.Numeric  # the Δ that bounded it


@dataclasses.dataclass(frozen=True)
class GainRatio:
    r"""Damping that follows how well a model, quadratic or linearised, predicts the loss (Nielsen's
    rule).

    With the gain ratio ρ = actual decrease / predicted decrease,

    .. math:: \lambda \leftarrow \begin{cases}
                \lambda \max\!\big(\tfrac13,\; 1 - (2\rho - 1)^3\big),\ \nu \leftarrow 2 & \rho >
                \text{accept} \\ \lambda\,\nu,\ \nu \leftarrow 2\nu & \text{otherwise (NaN
                included)}\end{cases}

    a continuous version of Marquardt's up and down factors: λ barely moves while ρ is near ½, and
    repeated failures raise it faster and faster.

    Args:
        initial: first λ.
        accept: least gain ratio of a step that counts as good.
        minimum: smallest λ, and at least the smallest normal number of its dtype.
        maximum: largest λ, and at most what its dtype can hold.

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
        check_acceptance(self.accept)
        known = not any(
            isinstance(limit, Tracer) for limit in (self.minimum, self.initial, self.maximum)
        )
        if known and not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"`initial` must lie between `minimum` and `maximum`; got {self.initial!r}, {self.minimum!r} and "
                f"{self.maximum!r}"
            )

    def init(self) -> DampingState:
        dtype = jnp.result_type(float)
        return DampingState(_representable(self.initial, dtype), jnp.asarray(2.0, dtype))

    def update(self, state: DampingState, gain_ratio: jax.Array) -> DampingState:
        good = gain_ratio > self.accept  # false for NaN
        # ρ > 1 says no more than ρ = 1: the factor is ⅓ from ρ ≈ 0.94 on.
        bounded = jnp.clip(jnp.where(good, gain_ratio, 0.0), 0.0, 1.0).astype(state.damping.dtype)
        shrink = jnp.maximum(1 / 3, 1 - (2 * bounded - 1) ** 3)
        damping = state.damping * jnp.where(good, shrink, state.growth)
        growth = jnp.where(good, 2.0, jnp.minimum(2 * state.growth, 2.0**20))
        limits = (_representable(limit, damping.dtype) for limit in (self.minimum, self.maximum))
        return DampingState(jnp.clip(damping, *limits), growth)


def _representable(limit: chex.Numeric, dtype) -> jax.Array:
    """`limit` as a normal number of `dtype` that can still grow: λ must neither vanish nor overflow for good."""
    info = jnp.finfo(dtype)
    least, most = float(info.tiny), float(info.max * info.eps)
    if isinstance(limit, Tracer):
        return jnp.clip(limit, least, most).astype(dtype)
    return jnp.asarray(min(max(float(limit), least), most), dtype)


@dataclasses.dataclass(frozen=True)
class TrustRegion:
    r"""Damping that keeps each step within a radius, and a radius that follows the gain ratio
    (Moré's rule).

    λ is the least value at which the step obeys

    .. math:: \|D^{1/2}\delta(\lambda)\| \le \Delta, \qquad (G + \lambda D)\,\delta = -\nabla\ell,

    Where the curvature changes by orders of magnitude from one point to the next, as it does in
    curve fits from poor starting values, a length stays meaningful and the last λ does not. With
    the gain ratio ρ and the decrease d of the loss,

    .. math:: \Delta \leftarrow \begin{cases}
                \max\!\big(\tfrac1{10},\; \tfrac12 s / (s + \min(d, 0))\big)\, \min(\Delta,\,
                  10\,\|D^{1/2}\delta\|) & \rho \le \tfrac14,\quad s = \nabla\ell^\top\delta \\
                2\,\|D^{1/2}\delta\| & \rho \ge \tfrac34 \text{ or the step ended inside} \\
                \Delta & \text{otherwise.}\end{cases}

    After a step uphill the factor is where the parabola through both losses and the slope s has its
    minimum.

    Args:
        radius: first Δ, in units of :math:`\|D^{1/2}\theta\|` (or absolute, where θ is zero).
        accept: least gain ratio of a step that is taken.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Moré, The Levenberg-Marquardt algorithm: implementation and theory, 1978.

    Example:
        >>> import gnlin
        >>> gnlin.TrustRegion()
        TrustRegion(radius=1.0, accept=0.0001)
    """

    radius: float = 1.0
    accept: float = 1e-4

    def __post_init__(self):
        check_positive("radius", self.radius)
        check_acceptance(self.accept)

    def init(self) -> RadiusState:
        return RadiusState(jnp.asarray(0.0, float))

    def bound(self, state: RadiusState, size: jax.Array) -> jax.Array:
        """Δ of the next step; `size` is ‖D^½ θ‖."""
        first = self.radius * jnp.where(size > 0, size, 1).astype(state.radius.dtype)
        return jnp.where(state.radius > 0, state.radius, first)

    def update(self, state: RadiusState, trial: Trial) -> RadiusState:
        trial = tree.cast(trial, state.radius.dtype)
        uphill = jnp.minimum(trial.decrease, 0)  # −∞ or NaN count as the worst of steps
        factor = jnp.maximum(0.5 * trial.slope / (trial.slope + uphill), 0.1)
        factor = jnp.where(jnp.isfinite(factor), factor, 0.1)
        # Without this a first radius far beyond the reach of the model would take many rejections
        # to come down.
        radius = jnp.where(state.radius > 0, trial.radius, jnp.minimum(trial.radius, trial.length))
        smaller = factor * jnp.minimum(radius, 10 * trial.length)
        inside = trial.length < 0.99 * trial.radius
        radius = jnp.where((trial.gain_ratio >= 0.75) | inside, 2 * trial.length, radius)
        radius = jnp.where(trial.gain_ratio > 0.25, radius, smaller)  # also where the ratio is NaN
        return RadiusState(radius)


Damping = chex.Numeric | Callable[[chex.Numeric], chex.Numeric]


def check_damping(damping: Any) -> None:
    if isinstance(damping, type):
        raise TypeError(
            f"`damping` must be a number, a schedule or a record, not a class; got {damping!r}"
        )
    if not callable(damping):
        check_number("damping", damping)


def check_acceptance(accept: float) -> None:
    if not isinstance(accept, Tracer) and not 0 <= accept < 1:
        raise ValueError(f"`accept` must lie in [0, 1); got {accept!r}")


def damping_at(damping: Damping, count: jax.Array) -> jax.Array:
    """λ at this update, in the default floating dtype."""
    return jnp.asarray(damping(count) if callable(damping) else damping, float)


def resolution(value: jax.Array) -> jax.Array:
    """Differences of losses of this size are rounding: 8 units in the last place, for a sum is rounded a few times."""
    return 8 * float(jnp.finfo(value.dtype).eps) * jnp.abs(value)


def gain_ratio(
    value: jax.Array, new_value: jax.Array, change: jax.Array, step: Params, rhs: Params
) -> jax.Array:
    """ρ = actual decrease / predicted decrease; −∞ where either is not finite or none was
    predicted.

    Near a minimum both decreases drop below the resolution of the loss itself, and their quotient
    is noise. The loss then cannot speak against the step and the gradient, which is still accurate,
    speaks for it: ρ is 1. No step although there was a right-hand side, a solve that failed, is no
    such case.

    Args:
        value: loss before the step.
        new_value: loss after it.
        change: what the model says of their difference, new − old.
        step: δ.
        rhs: the right-hand side that δ was solved for.
    """
    dtype = tree.accumulation_dtype(value)
    finest = resolution(value).astype(dtype)
    value, new_value, predicted = (
        jnp.asarray(x).astype(dtype) for x in (value, new_value, -change)
    )
    actual = value - new_value
    indistinguishable = (jnp.abs(actual) <= finest) & (jnp.abs(predicted) <= finest)
    indistinguishable &= (tree.max_abs(step) > 0) | (tree.max_abs(rhs) == 0)
    sound = jnp.isfinite(actual) & (predicted > 0)
    ratio = jnp.where(sound, actual / jnp.where(sound, predicted, 1).astype(actual.dtype), -jnp.inf)
    return jnp.where(indistinguishable, 1.0, ratio)
