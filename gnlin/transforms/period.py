"""How long an anchor is kept: a number of updates, a schedule, or a rule that looks how well the
linearisation holds.

Each may be said of the whole network, and numbers and schedules of some layers, others moving at
their own pace.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gnlin import tree
from gnlin.checks import check_integer, check_positive, is_integer
from gnlin.tree import Outputs, Params

FOREVER = -1  # updates left of an anchor that never moves


class GapState(NamedTuple):
    exceeded: jax.Array  # looks in a row that found the gap beyond the limit
    gap: jax.Array  # what the last look found


@dataclasses.dataclass(frozen=True)
class RelativeGap:
    r"""Keep the anchor as long as the linearisation holds.

    It holds on a batch where the network is off the linearised model by no more than a share of
    what that has moved,

    .. math:: \frac{\|f(\theta) - f_\mathrm{lin}(\theta)\|}{\|J(\phi)(\theta - \phi)\|} \le \text{limit}.

    The anchor moves at the update after one that found the gap beyond the limit `patience` times in
    a row, so that one odd batch does not move it, and in any case after `longest` updates. The gap
    is 0 at a new anchor, so that a second limit, from which on it would count as small again, is
    not needed. A look costs a forward pass: an update with one takes the work of 2 gradients,
    others that of 5/3. Near the anchor the gap is proportional to the distance: half the limit is
    about half as long a cycle.

    Args:
        limit: largest relative gap.
        patience: looks in a row that must exceed it.
        every: updates from one look to the next.
        longest: most updates that an anchor serves, more than patience · every; `None` for no
            bound.

    Raises:
        ValueError, TypeError: an argument is out of its range.

    Reference: the fixed period of Goldwaser & Ge, arXiv 2211.12345, is what it takes the place of;
        the rule is ours.

    Example:
        >>> import gnlin, jax.numpy as jnp, optax
        >>> objective = gnlin.Objective.least_squares(lambda p: p ** 2 - 2.0)
        >>> tx = optax.chain(gnlin.linearise_gradients(objective, gnlin.RelativeGap(0.1)), optax.sgd(0.1))
        >>> params = jnp.ones(1); state = tx.init(params)
        >>> for _ in range(40):
        ...     updates, state = tx.update(None, state, params)
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
        if self.longest is not None and self.longest <= self.patience * self.every:
            raise ValueError(
                f"`longest` must be more than patience * every = {self.patience * self.every}, or the gap never has a "
                f"say; got {self.longest}"
            )

    def init(self) -> GapState:
        return GapState(jnp.zeros([], jnp.int32), jnp.asarray(0.0, float))

    def look(
        self,
        state: GapState,
        age: jax.Array,
        moved: Outputs,
        outputs: Callable[[], Outputs],
        at_anchor: Outputs,
    ) -> tuple[GapState, jax.Array]:
        """State after an update, and whether the anchor has to move at the next.

        Args:
            state: before it.
            age: updates since the anchor moved, 0 at the one that moved it.
            moved: J(φ)(θ − φ).
            outputs: f(θ), computed when it is looked at.
            at_anchor: f(φ).
        """

        def found(_):
            return _relative_gap(outputs(), tree.add(at_anchor, moved), moved).astype(float)

        due = (age > 0) & (age % self.every == 0)
        gap = jax.lax.cond(due, found, lambda state: state.gap, state)
        exceeded = jnp.where(
            due, jnp.where(gap > self.limit, state.exceeded + 1, 0), state.exceeded
        )
        stale = due & (exceeded >= self.patience)
        return GapState(
            jnp.where(stale | (age == 0), 0, exceeded), jnp.where(age == 0, 0, gap)
        ), stale


def _relative_gap(outputs: Outputs, linearised: Outputs, moved: Outputs) -> jax.Array:
    """0 where the two agree but for rounding; infinite where the network is not finite, so that it is left."""
    gap = tree.norm(tree.subtract(outputs, linearised))
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(outputs))
    seen = gap > 8 * eps * tree.norm(linearised)
    return jnp.where(jnp.isfinite(gap), jnp.where(seen, gap / tree.norm(moved), 0), jnp.inf)


@dataclasses.dataclass(frozen=True)
class LayerPeriods:
    r"""A period for each group of layers: which layers learn features, and how often.

    A group of period 1 is not linearised at all: with θ = (a, b), where a are the parameters that
    are linearised and b those that are not,

    .. math:: f_\mathrm{lin}(a, b) = f(\phi, b) + \frac{\partial f}{\partial a}(\phi, b)\,(a - \phi),

    and both follow the gradient of :math:`\ell(f_\mathrm{lin}(a, b))`. For each group of a longer
    period φ moves to θ by itself. An update costs between 5/3 and 1.9 gradients, and more where the
    first layers are exact than the last. A group that is not to be trained at all is one for Optax:
    ``optax.partition({"train": inner, "freeze": optax.set_to_zero()}, labels)`` after the
    linearised gradient.

    Args:
        periods: label ↦ K ≥ 1, `None` for never, or a schedule.
        labels: the label of each leaf, as `optax.partition` has it: a tree like the parameters, or
            one of its upper part, or a function from parameters to such a tree. A mask is a tree of
            the labels True and False.

    Raises:
        ValueError, TypeError: there are no periods, or one is below 1; when used: a leaf has no
        label with a period.

    Reference: after Goldwaser & Ge, arXiv 2211.12345, who linearise all layers at once.

    Example:
        >>> import gnlin, jax.numpy as jnp, optax
        >>> objective = gnlin.Objective(lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"], lambda z, x: jnp.sum(z ** 2))
        >>> layers = gnlin.LayerPeriods({"features": 64, "readout": 1}, {"in": "features", "out": "readout"})
        >>> tx = optax.chain(gnlin.linearise_gradients(objective, layers), optax.sgd(0.1))
        >>> params = {"in": jnp.ones((2, 3)), "out": jnp.ones((3, 1))}
        >>> _, state = tx.update(None, tx.init(params), params, batch=jnp.ones((4, 2)))
        >>> {name: int(value) for name, value in gnlin.metrics(state).items() if "refreshes" in name}
        {'linearise/refreshes/features': 1, 'linearise/refreshes/readout': 1}
    """

    periods: Mapping[Hashable, Any]
    labels: Any

    def __post_init__(self):
        if not isinstance(self.periods, Mapping) or not self.periods:
            raise ValueError(f"`periods` must map each label to its period; got {self.periods!r}")
        if len(set(map(str, self.periods))) < len(self.periods):
            raise ValueError(f"`periods` has labels that are written alike: {list(self.periods)!r}")
        for label, period in self.periods.items():
            if isinstance(period, RelativeGap | LayerPeriods):
                raise TypeError(
                    f"`periods` of layers must be integers, None or schedules; got {period!r} for {label!r}: how well "
                    "the linearisation holds is a question to the whole network"
                )
            try:
                check_period(period)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{error} (of {label!r} in `periods`)") from None

    def label_of_leaves(self, params: Params) -> list[Hashable]:
        """Labels in the order of the leaves of `params`."""
        labels = self.labels(params) if callable(self.labels) else self.labels
        try:
            found = tree.spread(labels, params)
        except (ValueError, TypeError) as error:
            raise ValueError(
                "`labels` must be a tree like the parameters, or of their upper part; got "
                f"{jax.tree.structure(labels)} for {jax.tree.structure(params)}"
            ) from error
        known = {
            label: label for label in self.periods
        }  # of equal labels, such as 1 and True, those of `periods`
        try:
            unknown = dict.fromkeys(label for label in found if label not in known)
        except TypeError as error:
            raise TypeError(
                f"`labels` must be names, numbers or other constants: {error}"
            ) from error
        if unknown:
            lacking = ", ".join(map(repr, unknown))
            raise ValueError(
                f"`labels` has {lacking}, which `periods` lacks: {dict(self.periods)!r}"
            )
        return [known[label] for label in found]


Period = int | None | Callable[[Any], chex.Numeric] | RelativeGap | LayerPeriods


def cycle_length(period: Any, count: jax.typing.ArrayLike) -> jax.Array:
    """Updates that an anchor serves that is moved at this one."""
    if isinstance(period, RelativeGap):
        period = period.longest
    if period is None:
        return jnp.asarray(FOREVER, jnp.int32)
    length = period(count) if callable(period) else period
    return jnp.maximum(jnp.round(jnp.asarray(length, float)), 1).astype(jnp.int32)


def check_period(period: Any) -> Any:
    """The period, with whole numbers as `int`."""
    if isinstance(period, type):
        raise TypeError(
            f"`period` must be a record, not a class: RelativeGap(0.1), say; got {period!r}"
        )
    if (
        period is None
        or callable(period)
        or isinstance(period, Tracer | RelativeGap | LayerPeriods)
    ):
        return period
    whole = is_integer(period)
    # optax.inject_hyperparams turns what a schedule returns into floats; the cycle's length is
    # rounded anyway.
    whole |= (
        isinstance(period, jax.Array)
        and period.ndim == 0
        and jnp.issubdtype(period.dtype, jnp.number)
    )
    if not whole:
        raise TypeError(
            "`period` must be an integer of at least 1, None (never), a schedule, a RelativeGap or LayerPeriods; got "
            f"{period!r}"
        )
    if not period >= 1:  # true for NaN
        raise ValueError(
            f"`period` must be at least 1; got {period!r}. Use None to never re-linearise."
        )
    return int(period) if isinstance(period, (int, np.integer)) else period
