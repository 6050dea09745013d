"""The damping λ: a number, a schedule, or a policy that follows the gain ratio.

A policy also decides which steps are taken. `gauss_newton` and `levenberg_marquardt` hand it a
`Trial`, from `gain`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer

from gnlin import tree
from gnlin.checks import check_number, check_part, check_positive, returned, shows_signature
from gnlin.solve.protocols import Stats
from gnlin.transforms.gain import Trial
from gnlin.tree import Params

# A number, or a schedule: count of updates ↦ number.
Damping = chex.Numeric | Callable[[chex.Numeric], chex.Numeric]

# Least gain ratio of a step that is taken, where a policy does not say.
ACCEPT = 1e-4


@runtime_checkable
class DampingPolicy(Protocol):
    """A frozen record that chooses λ and decides which steps are taken.

    It is the argument `damping` of `gauss_newton` and of `levenberg_marquardt`.

    Example:
        >>> import dataclasses, gnlin, jax.numpy as jnp
        >>> @dataclasses.dataclass(frozen=True)
        ... class UpAndDown:   # Marquardt's rule: λ / 10 after a good step, 10 λ after a bad one
        ...     initial: float = 1e-2
        ...     def init(self, params):
        ...         return jnp.asarray(self.initial, float), {}
        ...     def damping(self, state, count):
        ...         return state
        ...     def judge(self, state, trial):
        ...         accepted = trial.gain_ratio > 0
        ...         return jnp.where(accepted, state / 10, state * 10), accepted, {}
        >>> objective = gnlin.Objective.least_squares(lambda p: jnp.exp(p) - 2.0)
        >>> tx = gnlin.gauss_newton(objective, damping=UpAndDown())
        >>> _, state = tx.update(None, tx.init(jnp.zeros(1)), jnp.zeros(1))
        >>> round(float(state.damping), 4)
        0.001
    """

    def init(self, params: Params) -> tuple[Any, Stats]:
        """``(state, stats)`` before the first step."""
        ...

    def damping(self, state: Any, count: jax.Array) -> jax.Array:
        """λ of the update with this count."""
        ...

    def judge(self, state: Any, trial: Trial) -> tuple[Any, jax.Array, Stats]:
        """``(next state, whether the step is taken, stats)``."""
        ...


@runtime_checkable
class RadiusPolicy(Protocol):
    """A policy that bounds the length of a step; the solver then finds λ. See `TrustRegion`."""

    def init(self, params: Params) -> tuple[Any, Stats]: ...

    def bound(self, state: Any, size: jax.Array) -> jax.Array: ...

    def judge(self, state: Any, trial: Trial) -> tuple[Any, jax.Array, Stats]: ...


@dataclasses.dataclass(frozen=True)
class Given:
    """λ as it is given, a number or a schedule; steps that do not lower the loss are refused."""

    value: Damping

    def init(self, params: Params) -> tuple[tuple, Stats]:
        del params
        return (), {}

    def damping(self, state: tuple, count: jax.Array) -> jax.Array:
        del state
        value = self.value(count) if callable(self.value) else self.value
        return jnp.asarray(value, float)

    def judge(self, state: tuple, trial: Trial) -> tuple[tuple, jax.Array, Stats]:
        return state, trial.gain_ratio > ACCEPT, {}


class GainRatioState(NamedTuple):
    damping: jax.Array  # λ for the next step
    growth: jax.Array  # ν, the factor that λ takes at the next rejection


@shows_signature
@dataclasses.dataclass(frozen=True)
class GainRatio:
    r"""Damping that follows the gain ratio of a quadratic or linearised model (Nielsen's rule).

    With the gain ratio ρ = actual decrease / predicted decrease,

    .. math:: \lambda \leftarrow \begin{cases}
        \lambda \max\!\big(\tfrac13,\; 1 - (2\rho - 1)^3\big),\quad \nu \leftarrow 2
            & \rho > \text{accept} \\
        \lambda\,\nu,\quad \nu \leftarrow 2\nu & \text{otherwise (NaN included).}
        \end{cases}

    It is a continuous version of Marquardt's up and down factors. λ barely moves while ρ is near ½,
    and repeated failures raise it faster and faster.

    With ``relative=True`` λ has no units. `gauss_newton` multiplies it by a unit, measured on the
    first batch. There steepest descent with the best length takes a step c, and its model promises
    a decrease of Δ:

    .. math:: \text{unit} = \frac{2\Delta}{\|\theta\|^2 + \|c\|^2}, \qquad
              c = -\frac{g^\top g}{g^\top G g}\, g, \quad 2\Delta = -g^\top c.

    With λ = 1 a step as long as θ thus costs as much damping as steepest descent gains. A factor on
    the loss changes no step then.

    Args:
        initial: first λ.
        accept: least gain ratio of a step that counts as good.
        minimum: smallest λ, and at least the smallest normal number of its dtype.
        maximum: largest λ, and at most the largest number of its dtype that can still grow.
        relative: whether λ and its limits are in units of the problem, for `gauss_newton` only.
        minimum_again: smallest λ while each batch is the one before, and so no other can be
            forgotten; `None` for `minimum`.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Nielsen, Damping parameter in Marquardt's method, IMM-REP-1999-05, 1999.

    Example:
        >>> import gnlin
        >>> gnlin.GainRatio(1.0).minimum
        1e-20
    """

    initial: float
    accept: float = ACCEPT
    minimum: float = 1e-20
    maximum: float = 1e20
    relative: bool = False
    minimum_again: float | None = None

    def __post_init__(self):
        if not isinstance(self.relative, bool):
            raise TypeError(f"`relative` must be True or False; got {self.relative!r}")
        if self.minimum_again is not None:
            check_positive("minimum_again", self.minimum_again)
        limits = self.minimum, self.initial, self.maximum
        for name, limit in zip(("minimum", "initial", "maximum"), limits, strict=True):
            check_positive(name, limit)
        _check_acceptance(self.accept)
        known = not any(isinstance(limit, Tracer) for limit in limits)
        if known and not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"`initial` must lie between `minimum` and `maximum`; got {self.initial!r}, "
                f"{self.minimum!r} and {self.maximum!r}"
            )

    def init(self, params: Params) -> tuple[GainRatioState, Stats]:
        del params
        dtype = jnp.result_type(float)
        growth = jnp.asarray(2.0, dtype)
        return GainRatioState(_representable(self.initial, dtype), growth), {}

    def damping(self, state: GainRatioState, count: jax.Array) -> jax.Array:
        del count
        return state.damping

    def judge(self, state: GainRatioState, trial: Trial) -> tuple[GainRatioState, jax.Array, Stats]:
        good = trial.gain_ratio > self.accept  # false for NaN
        # ρ > 1 says no more than ρ = 1: the factor is ⅓ from ρ ≈ 0.94 on.
        bounded = jnp.clip(jnp.where(good, trial.gain_ratio, 0.0), 0.0, 1.0)
        bounded = bounded.astype(state.damping.dtype)
        # Nielsen's cubic: ρ = ½ leaves λ as it is, and ρ = 0 would double it.
        shrink = jnp.maximum(1 / 3, 1 - (2 * bounded - 1) ** 3)
        damping = state.damping * jnp.where(good, shrink, state.growth)
        # Without a bound ν itself would overflow in a long run of rejections.
        growth = jnp.where(good, 2.0, jnp.minimum(2 * state.growth, 2.0**20))
        least, most = (
            _representable(limit, damping.dtype) for limit in (self.minimum, self.maximum)
        )
        if self.minimum_again is not None:
            again = _representable(self.minimum_again, damping.dtype)
            least = jnp.where(trial.again, jnp.minimum(again, least), least)
        return GainRatioState(jnp.clip(damping, least, most), growth), good, {}


def _representable(limit: chex.Numeric, dtype) -> jax.Array:
    """`limit` as a normal number of `dtype` that can still grow.

    λ must neither vanish nor overflow for good.
    """
    info = jnp.finfo(dtype)
    least, most = float(info.tiny), float(info.max * info.eps)
    if isinstance(limit, Tracer):
        return jnp.clip(limit, least, most).astype(dtype)
    return jnp.asarray(min(max(float(limit), least), most), dtype)


class RadiusState(NamedTuple):
    radius: jax.Array  # Δ for the next step; 0 before the first


@shows_signature
@dataclasses.dataclass(frozen=True)
class TrustRegion:
    r"""Damping that keeps each step within a radius, which follows the gain ratio (Moré's rule).

    λ is the least value at which the step obeys

    .. math:: \|D^{1/2}\delta(\lambda)\| \le \Delta, \qquad (G + \lambda D)\,\delta = -\nabla\ell.

    In curve fits from poor starting values the curvature changes by orders of magnitude from one
    point to the next. There a length stays meaningful and the last λ does not. With the gain ratio
    ρ, the decrease d of the loss and :math:`s = \nabla\ell^\top\delta`,

    .. math:: \Delta \leftarrow \begin{cases}
        \max\!\big(\tfrac1{10},\; \tfrac12 s / (s + \min(d, 0))\big)\,
            \min(\Delta,\, 10\,\|D^{1/2}\delta\|) & \rho \le \tfrac14 \\
        2\,\|D^{1/2}\delta\| & \rho \ge \tfrac34 \text{ or the step ended inside} \\
        \Delta & \text{otherwise.}
        \end{cases}

    After a step uphill the factor is the place of the minimum of a parabola, the one through both
    losses with the slope s.

    Metric: ``radius``, Δ of the last step.

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
    accept: float = ACCEPT

    def __post_init__(self):
        check_positive("radius", self.radius)
        _check_acceptance(self.accept)

    def init(self, params: Params) -> tuple[RadiusState, Stats]:
        del params
        return RadiusState(jnp.asarray(0.0, float)), {"radius": jnp.asarray(0.0, float)}

    def bound(self, state: RadiusState, size: jax.Array) -> jax.Array:
        """Δ of the next step; `size` is ‖D^½ θ‖."""
        first = self.radius * jnp.where(size > 0, size, 1).astype(state.radius.dtype)
        # ‖D^½ θ‖ is known from the first update on. Until then the radius is 0.
        return jnp.where(state.radius > 0, state.radius, first)

    def judge(self, state: RadiusState, trial: Trial) -> tuple[RadiusState, jax.Array, Stats]:
        accepted = trial.gain_ratio > self.accept
        trial = tree.cast(trial, state.radius.dtype)
        uphill = jnp.minimum(trial.decrease, 0)  # −∞ or NaN count as the worst of steps
        # The minimum of the parabola with slope s and change −d lies at ½ s / (s + d) of the step.
        factor = jnp.maximum(0.5 * trial.slope / (trial.slope + uphill), 0.1)
        factor = jnp.where(jnp.isfinite(factor), factor, 0.1)
        # A first radius far beyond the reach of the model would take many rejections to come down.
        radius = jnp.where(state.radius > 0, trial.radius, jnp.minimum(trial.radius, trial.length))
        smaller = factor * jnp.minimum(radius, 10 * trial.length)
        inside = trial.length < 0.99 * trial.radius
        radius = jnp.where((trial.gain_ratio >= 0.75) | inside, 2 * trial.length, radius)
        radius = jnp.where(trial.gain_ratio > 0.25, radius, smaller)  # also where the ratio is NaN
        return RadiusState(radius), accepted, {"radius": jnp.asarray(trial.radius)}


# Checks.


def judged(policy: Any, state: Any, trial: Trial) -> tuple[Any, jax.Array, Stats]:
    """``(next state, whether the step is taken, stats)`` of a policy."""
    return returned("damping.judge", policy.judge(state, trial), object, object, Mapping)


def policy_of(damping: Any) -> Any:
    """The policy that the argument `damping` of `gauss_newton` stands for."""
    if isinstance(damping, RadiusPolicy) and not isinstance(damping, type):
        raise TypeError(
            f"`damping` must give λ; {type(damping).__name__} gives a radius, which is for "
            "gnlin.levenberg_marquardt(objective, damping=TrustRegion(), solver=gnlin.Dense())"
        )
    if callable(damping) or isinstance(damping, (int, float)) or hasattr(damping, "dtype"):
        check_damping(damping)
        value: Any = damping
        return Given(value)
    check_policy(damping)
    return damping


def check_policy(damping: Any) -> None:
    check_part(
        "damping",
        damping,
        ("init", "damping", "judge"),
        "a number, a schedule or a policy",
        "gnlin.GainRatio(1e-2)",
    )


def check_damping(damping: Any) -> None:
    """Raise unless `damping` is a number or a schedule."""
    if isinstance(damping, type):
        raise TypeError(
            f"`damping` must be a number, a schedule or a record, not a class; got {damping!r}"
        )
    if hasattr(damping, "judge"):
        raise TypeError(
            f"`damping` must be a number or a schedule here, for no step is compared with its "
            f"prediction; {damping!r} is for gnlin.gauss_newton or gnlin.levenberg_marquardt"
        )
    if not callable(damping):
        check_number("damping", damping)


def _check_acceptance(accept: float) -> None:
    if not isinstance(accept, Tracer) and not 0 <= accept < 1:
        raise ValueError(f"`accept` must lie in [0, 1); got {accept!r}")
