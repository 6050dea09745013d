"""Layers at their own pace: the layers that are linearised, and a period for each group.

`LayerPeriods` takes the place of a period rule. `iterative_linearisation` then moves the anchor
leaf by leaf. The gradient comes from `partly_linearised_loss` in `problem/curvature.py`.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlin import tree
from gnlin.checks import shows_signature
from gnlin.solve.protocols import Stats
from gnlin.transforms.period import check_period, count_down, is_rule
from gnlin.tree import Params


class LayersState(NamedTuple):
    moves: Any  # a flag for each leaf, a tree like the parameters: a mask hides both alike
    remaining: tuple[jax.Array, ...]  # for each label, in the order of `periods`
    refreshes: tuple[jax.Array, ...]  # times that the anchor of a label moved
    age: tuple[jax.Array, ...]  # updates since then


class LayersServed(NamedTuple):
    """One update, as `LayerPeriods` sees it."""

    count: jax.typing.ArrayLike
    anchor: Params


@shows_signature
@dataclasses.dataclass(frozen=True)
class LayerPeriods:
    r"""A period for each group of layers: which layers learn features, and how often.

    A group of period 1 is not linearised at all. Let θ = (a, b), where a are the parameters that
    are linearised and b are the others:

    .. math:: f_\mathrm{lin}(a, b) = f(\phi, b)
              + \frac{\partial f}{\partial a}(\phi, b)\,(a - \phi).

    Both follow the gradient of :math:`\ell(f_\mathrm{lin}(a, b))`. For each group of a longer
    period φ moves to θ by itself. An update costs between 5/3 and 1.9 gradients, and more where the
    first layers are exact than where the last are.

    A group without any training is one for Optax: put
    ``optax.partition({"train": inner, "freeze": optax.set_to_zero()}, labels)`` after the
    linearised gradient.

    Metrics: ``linearise/refreshes/<label>`` and ``linearise/age/<label>``.

    Args:
        periods: label ↦ K ≥ 1, `None` for never, or a schedule.
        labels: the label of each leaf, as for `optax.partition`. It is a tree like the parameters
            or like its upper part, or a function from parameters to such a tree. A mask is a tree
            of the labels True and False.

    Raises:
        ValueError, TypeError: there are no periods, or one is below 1; when used: a leaf has no
            label with a period.

    Reference: after Goldwaser & Ge, arXiv 2211.12345, who linearise all layers at once.

    Example:
        >>> import gnlin, jax.numpy as jnp, optax
        >>> objective = gnlin.Objective(
        ...     lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"], lambda z, x: jnp.sum(z ** 2))
        >>> layers = gnlin.LayerPeriods(
        ...     {"features": 64, "readout": 1}, {"in": "features", "out": "readout"})
        >>> tx = optax.chain(gnlin.linearise_gradients(objective, layers), optax.sgd(0.1))
        >>> params = {"in": jnp.ones((2, 3)), "out": jnp.ones((3, 1))}
        >>> _, state = tx.update(None, tx.init(params), params, batch=jnp.ones((4, 2)))
        >>> metrics = gnlin.metrics(state)
        >>> {name: int(value) for name, value in metrics.items() if "refreshes" in name}
        {'linearise/refreshes/features': 1, 'linearise/refreshes/readout': 1}
    """

    periods: Mapping[Hashable, Any]
    labels: Any

    def __post_init__(self):
        if not isinstance(self.periods, Mapping) or not self.periods:
            raise ValueError(f"`periods` must map each label to its period; got {self.periods!r}")
        # Labels end the names of metrics, which must differ.
        if len(set(map(str, self.periods))) < len(self.periods):
            raise ValueError(f"`periods` has labels that are written alike: {list(self.periods)!r}")
        for label, period in self.periods.items():
            if is_rule(period):
                raise TypeError(
                    "`periods` of layers must be integers, None or schedules; got "
                    f"{period!r} for {label!r}: a rule is asked of the whole network"
                )
            try:
                check_period(period)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{error} (of {label!r} in `periods`)") from None

    def exact(self, params: Params) -> Any:
        """A tree like `params`: which leaves have period 1, so that they are not linearised."""
        return self._each_leaf(params, lambda label: check_period(self.periods[label]) == 1)

    def init(self, params: Params) -> tuple[LayersState, Stats]:
        moves = self._each_leaf(params, lambda label: jnp.asarray(True))
        none = tuple(jnp.zeros([], jnp.int32) for _ in self.periods)
        return LayersState(moves, none, none, none), self._stats(none, none)

    def after(self, state: LayersState, served: LayersServed) -> tuple[LayersState, Stats]:
        labels = self.label_of_leaves(served.anchor)
        # The flags of one label are equal. A label without leaves keeps its zeros.
        moved = dict(zip(labels, jax.tree.leaves(state.moves), strict=True))
        remaining, refreshes, age = [], [], []
        for place, (label, period) in enumerate(self.periods.items()):
            before = state.remaining[place], state.refreshes[place], state.age[place]
            if label in moved:
                now = moved[label]
                before = (
                    count_down(period, now, before[0], served.count),
                    before[1] + now.astype(jnp.int32),
                    jnp.where(now, 0, optax.safe_increment(before[2])),
                )
            remaining.append(before[0])
            refreshes.append(before[1])
            age.append(before[2])
        left_of = dict(zip(self.periods, remaining, strict=True))
        moves = self._each_leaf(served.anchor, lambda label: left_of[label] == 0)
        next_state = LayersState(moves, tuple(remaining), tuple(refreshes), tuple(age))
        return next_state, self._stats(next_state.refreshes, next_state.age)

    def _stats(self, refreshes: tuple[jax.Array, ...], age: tuple[jax.Array, ...]) -> Stats:
        stats = {}
        for place, label in enumerate(self.periods):
            stats[f"linearise/refreshes/{label}"] = refreshes[place]
            stats[f"linearise/age/{label}"] = age[place]
        return stats

    def _each_leaf(self, params: Params, value: Callable[[Any], Any]) -> Any:
        """A tree like `params` of the values of the labels."""
        values = [value(label) for label in self.label_of_leaves(params)]
        return jax.tree.unflatten(jax.tree.structure(params), values)

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
        # Of equal labels, such as 1 and True, those of `periods`.
        known = {label: label for label in self.periods}
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
