"""The period of an anchor: a number of updates, a schedule, or a rule.

A rule sees every update as a `Served`. Its state says whether the next update moves the anchor.
`iterative_linearisation` calls it at the end of an update. `layer_periods` has a period for each
group of layers instead.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gnlin import tree
from gnlin.checks import check_integer, check_part, check_positive, is_integer, shows_signature
from gnlin.solve.protocols import Stats
from gnlin.tree import Outputs, Params

FOREVER = -1  # updates left of an anchor that never moves: below 0, and so never counted down


class Served(NamedTuple):
    """One update, as a period rule sees it.

    Attributes:
        count: updates before this one.
        age: updates since the anchor moved, 0 at the one that moved it.
        params: θ.
        anchor: φ.
        outputs: f(φ).
        displacement: J(φ)(θ − φ).
        network: () ↦ f(θ). A call costs a forward pass.
    """

    count: jax.typing.ArrayLike
    age: jax.Array
    params: Params
    anchor: Params
    outputs: Outputs
    displacement: Outputs
    network: Callable[[], Outputs]


@runtime_checkable
class PeriodRule(Protocol):
    """A frozen record that decides when the anchor moves.

    Its state is a named tuple with a flag ``moves``: whether the next update moves the anchor. The
    first update always does.

    Example:
        >>> import dataclasses, gnlin, jax, jax.numpy as jnp, optax
        >>> from typing import Any, NamedTuple
        >>> class Moves(NamedTuple):
        ...     moves: Any
        >>> @dataclasses.dataclass(frozen=True)
        ... class Distance:   # re-linearise once θ is so far from φ
        ...     limit: float
        ...     def init(self, params):
        ...         return Moves(jnp.asarray(True)), {}
        ...     def after(self, state, served):
        ...         moved = optax.tree.norm(optax.tree.sub(served.params, served.anchor))
        ...         return Moves(moved > self.limit), {}
        >>> objective = gnlin.Objective.least_squares(lambda p: p ** 2 - 2.0)
        >>> tx = optax.chain(gnlin.linearise_gradients(objective, Distance(0.2)), optax.sgd(0.1))
        >>> params = jnp.ones(1); state = tx.init(params); update = jax.jit(tx.update)
        >>> for _ in range(40):
        ...     updates, state = update(None, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> int(gnlin.metrics(state)["linearise/refreshes"])
        2
    """

    def init(self, params: Params) -> tuple[Any, Stats]:
        """``(state, stats)`` before the first update."""
        ...

    def after(self, state: Any, served: Served) -> tuple[Any, Stats]:
        """``(next state, stats)``, once the gradient of an update is known."""
        ...


# A number of updates.


class EveryState(NamedTuple):
    moves: jax.Array
    remaining: jax.Array  # updates that the anchor still serves


@dataclasses.dataclass(frozen=True)
class Every:
    """A number K, `None` for never, or a schedule that is evaluated when the anchor moves."""

    period: Any

    def init(self, params: Params) -> tuple[EveryState, Stats]:
        del params
        return EveryState(jnp.asarray(True), jnp.zeros([], jnp.int32)), {}

    def after(self, state: EveryState, served: Served) -> tuple[EveryState, Stats]:
        remaining = count_down(self.period, state.moves, state.remaining, served.count)
        return EveryState(remaining == 0, remaining), {}


def count_down(
    period: Any, moved: jax.Array, remaining: jax.Array, count: jax.typing.ArrayLike
) -> jax.Array:
    """Updates that are left after one; `moved` says whether it moved the anchor."""
    # The length of a cycle is fixed at its first update, whatever a schedule says later.
    left = jnp.where(moved, _cycle_length(period, count), remaining)
    return jnp.where(left > 0, left - 1, left)


def _cycle_length(period: Any, count: jax.typing.ArrayLike) -> jax.Array:
    """Updates that an anchor serves that is moved at this one."""
    if period is None:
        return jnp.asarray(FOREVER, jnp.int32)
    length = period(count) if callable(period) else period
    # A schedule may return any number, and 0 would be no cycle.
    return jnp.maximum(jnp.round(jnp.asarray(length, float)), 1).astype(jnp.int32)


# A rule that checks the linearisation.


class GapState(NamedTuple):
    moves: jax.Array
    remaining: jax.Array  # updates until the longest cycle ends
    exceeded: jax.Array  # checks in a row that found the gap beyond the limit
    gap: jax.Array  # result of the last check


@shows_signature
@dataclasses.dataclass(frozen=True)
class RelativeGap:
    r"""Keep the anchor as long as the linearisation holds.

    It holds on a batch where the network differs from the linearised model by no more than a share
    of the movement of the outputs:

    .. math:: \frac{\|f(\theta) - f_\mathrm{lin}(\theta)\|}{\|J(\phi)(\theta - \phi)\|}
              \le \text{limit}.

    Once `patience` checks in a row have found the gap beyond the limit, the next update moves the
    anchor. One odd batch does not move it. It moves in any case after `longest` updates. The gap is
    0 at a new anchor, so no second limit says when it is small again. A check costs a forward pass:
    an update with one takes the work of 2 gradients, others that of 5/3. Near the anchor the gap is
    proportional to the distance. So half the limit makes cycles about half as long.

    Metric: ``linearise/gap``, the result of the last check, 0 before the first at an anchor.

    Args:
        limit: largest relative gap.
        patience: checks in a row that must exceed it.
        every: updates from one check to the next.
        longest: most updates that an anchor serves, more than patience · every; `None` for no
            bound.

    Raises:
        ValueError, TypeError: an argument is out of its range.

    Reference: the rule is ours. It takes the place of the fixed period of Goldwaser & Ge, arXiv
    2211.12345.

    Example:
        >>> import gnlin, jax, jax.numpy as jnp, optax
        >>> objective = gnlin.Objective.least_squares(lambda p: p ** 2 - 2.0)
        >>> period = gnlin.RelativeGap(0.1)
        >>> tx = optax.chain(gnlin.linearise_gradients(objective, period), optax.sgd(0.1))
        >>> params = jnp.ones(1); state = tx.init(params); update = jax.jit(tx.update)
        >>> for _ in range(40):
        ...     updates, state = update(None, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> params.round(3), int(gnlin.metrics(state)["linearise/refreshes"])
        (Array([1.414], dtype=float32), 2)
    """

    limit: float
    patience: int = 2
    every: int = 1
    longest: int | None = None

    def __post_init__(self):
        check_positive("limit", self.limit)
        for name in ("patience", "every", "longest"):
            if name != "longest" or self.longest is not None:
                check_integer(name, getattr(self, name))
        least = self.patience * self.every
        if self.longest is not None and self.longest <= least:
            raise ValueError(
                f"`longest` must be more than patience * every = {least}, or the gap never "
                f"decides; got {self.longest}"
            )

    def init(self, params: Params) -> tuple[GapState, Stats]:
        del params
        none = jnp.zeros([], jnp.int32)
        state = GapState(jnp.asarray(True), none, none, jnp.asarray(0.0, float))
        return state, {"linearise/gap": state.gap}

    def after(self, state: GapState, served: Served) -> tuple[GapState, Stats]:
        def check(_):
            linearised = tree.add(served.outputs, served.displacement)
            return _relative_gap(served.network(), linearised, served.displacement).astype(float)

        fresh = served.age == 0
        due = ~fresh & (served.age % self.every == 0)
        # A branch, so that an update without a check does no forward pass of the network.
        gap = jax.lax.cond(due, check, lambda state: state.gap, state)
        longer = jnp.where(gap > self.limit, state.exceeded + 1, 0)
        exceeded = jnp.where(due, longer, state.exceeded)
        stale = due & (exceeded >= self.patience)
        remaining = count_down(self.longest, state.moves, state.remaining, served.count)
        next_state = GapState(
            moves=stale | (remaining == 0),
            remaining=remaining,
            exceeded=jnp.where(stale | fresh, 0, exceeded),
            gap=jnp.where(fresh, 0, gap),
        )
        return next_state, {"linearise/gap": next_state.gap}


def _relative_gap(outputs: Outputs, linearised: Outputs, displacement: Outputs) -> jax.Array:
    """The gap, and 0 where the two differ by rounding alone.

    It is infinite where the network is not finite, so that this anchor is left.
    """
    gap = tree.norm(tree.subtract(outputs, linearised))
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(outputs))
    # A few units in the last place of the outputs are rounding, however small their movement.
    seen = gap > 8 * eps * tree.norm(linearised)
    return jnp.where(jnp.isfinite(gap), jnp.where(seen, gap / tree.norm(displacement), 0), jnp.inf)


# The argument.


def rule_of(period: Any) -> Any:
    """The rule that the argument `period` stands for."""
    period = check_period(period)
    return period if is_rule(period) else Every(period)


def check_period(period: Any) -> Any:
    """The period, with whole numbers as `int`."""
    # A class is callable, and would pass for a schedule below.
    if isinstance(period, type):
        raise TypeError(
            f"`period` must be a record, not a class: RelativeGap(0.1), say; got {period!r}"
        )
    if period is None or callable(period) or isinstance(period, Tracer):
        return period
    if is_rule(period):
        check_part("period", period, ("init", "after"), "a period rule", "gnlin.RelativeGap(0.1)")
        return period
    whole = is_integer(period)
    # optax.inject_hyperparams turns the values of a schedule into floats; the length of a cycle is
    # rounded anyway.
    whole |= (
        isinstance(period, jax.Array)
        and period.ndim == 0
        and jnp.issubdtype(period.dtype, jnp.number)
    )
    if not whole:
        raise TypeError(
            "`period` must be an integer of at least 1, None (never), a schedule, a RelativeGap or "
            f"another period rule, or LayerPeriods; got {period!r}"
        )
    if not period >= 1:  # true for NaN
        raise ValueError(
            f"`period` must be at least 1; got {period!r}. Use None to never re-linearise."
        )
    return int(period) if isinstance(period, (int, np.integer)) else period


def is_rule(period: Any) -> bool:
    # One of the methods is enough: `check_period` then says which one is missing.
    return hasattr(period, "init") or hasattr(period, "after")
