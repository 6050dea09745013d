"""Momentum and a conjugate direction: steps of one push-forward, or none.

`Momentum` is the default step rule of `gauss_newton`. `Subspace` in `step_length` takes two
push-forwards at every step.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import check_fraction, check_integer, shows_signature
from gnlin.solve.protocols import Stats
from gnlin.transforms.memory import Last
from gnlin.transforms.step_length import Search, Span, Step, best_weights, excess_slope
from gnlin.tree import Params

# So many first steps all have their length from the model.
_FRESH = 3


class MomentumState(NamedTuple):
    length: jax.Array  # α
    bound: jax.Array  # longest step until the length is looked up again
    age: jax.Array  # steps since it was


@shows_signature
@dataclasses.dataclass(frozen=True)
class Momentum:
    r"""Momentum, and a step length from the linearised model that is looked up now and then.

    On a batch that the last update had, too, the step goes along a conjugate direction (Hestenes &
    Stiefel). With the solver's M⁻¹ for the gradient u, the last step p, and the change y of the
    gradient by it,

    .. math:: \delta = \alpha\,\big(-M^{-1}u + \beta p\big), \qquad
              \beta = \max\Big(0, \frac{y^\top M^{-1} u}{y^\top p}\Big).

    On any other batch Nesterov's momentum enters the right-hand side of the solver. With its
    coefficient μ,

    .. math:: m \leftarrow u + \mu m, \qquad \delta = -\alpha\,M^{-1}(u + \mu m).

    α minimises the loss of the linearised model along the direction, damping included, as in
    `Subspace`. It costs one push-forward (0.6 gradients). The first three steps look it up. After
    them it is looked up at every step of the same batch, and else at every T-th (`every`). Three
    things ask for it out of turn: a direction that leads uphill, a loss well above its recent mean,
    and a step that was refused. A step between is no longer than the last one that was looked up.

    Metrics: ``momentum/length``, α; ``momentum/conjugate``, β.

    Args:
        coefficient: μ.
        every: T.
        check: most steps on other batches until one is tried by the loss, see `gauss_newton`.

    Raises:
        ValueError: an argument is out of its range.

    References: Hestenes & Stiefel, Methods of conjugate gradients for solving linear systems, 1952;
    Nesterov, A method of solving a convex programming problem with convergence rate O(1/k²), 1983.

    Example:
        >>> import gnlin
        >>> gnlin.Momentum()
        Momentum(coefficient=0.6, every=2, check=5)
    """

    coefficient: float = 0.6
    every: int = 2
    check: int = 5

    def __post_init__(self):
        check_fraction("coefficient", self.coefficient, one=False)
        check_integer("every", self.every)
        check_integer("check", self.check)

    def init(self, params: Params) -> tuple[MomentumState, Stats]:
        zero = jnp.zeros([], tree.accumulation_dtype(params))
        return MomentumState(zero, zero, jnp.zeros([], jnp.int32)), _stats(zero, zero)

    def remember(self, state: MomentumState, taken: Params) -> MomentumState:
        del taken  # the transform's memory has it
        return state

    def lead(self, rhs: Params, last: Last) -> tuple[Params, Params]:
        """``(right-hand side for the solver, gradient to be remembered)``."""
        # The first update has nothing to add.
        mu = jnp.where(last.count > 0, self.coefficient, 0.0)
        carried = tree.add_scaled(rhs, mu, last.gradient)
        ahead = tree.add_scaled(rhs, self.coefficient, carried)
        return tree.select(last.again, (rhs, rhs), (ahead, carried))

    def choose(self, search: Search, state: MomentumState) -> Step:
        assert search.last is not None  # `gauss_newton` has a memory for this rule
        last, dtype = search.last, state.length.dtype
        along = last.again & last.plain
        beta = jax.lax.cond(
            along, lambda: _conjugate(search).astype(dtype), lambda: jnp.zeros([], dtype)
        )
        direction = tree.add_scaled(tree.scale(-1, search.direction), beta, last.step)
        slope = tree.inner(search.rhs, direction).astype(dtype)
        rate = jnp.asarray(search.rate, dtype)
        size = tree.norm(direction).astype(dtype)
        unit = jnp.where(size > 0, size, 1)

        def look_up() -> tuple[jax.Array, jax.Array, jax.Array]:
            # Of unit size, because the squares of the image could vanish.
            image = search.model.linear.jvp(tree.scale(1 / unit, direction))
            excess = excess_slope(search, image, slope / unit, dtype)
            span = Span([image], excess[None], jnp.sign(size)[None, None])
            weights, change = best_weights(search, span, "exact")
            return weights[0] / unit, change(weights), jnp.isfinite(excess)

        def use_again() -> tuple[jax.Array, jax.Array, jax.Array]:
            length = jnp.minimum(state.length, state.bound / unit) * rate
            # Halfway between the slope and nothing, as at the minimum of a parabola.
            return length, length * slope / 2, jnp.isfinite(length * size)

        fresh = (last.count < _FRESH) | (state.age + 1 >= self.every) | (state.length <= 0)
        looks = fresh | last.again | last.alarm | ~(slope < 0)
        length, change, sound = jax.lax.cond(looks, look_up, use_again)
        # Where the loss along the direction is not finite there is no step, and λ will grow.
        usable = jnp.isfinite(length * size) & jnp.isfinite(change)
        length, change = jnp.where(usable, length, 0), jnp.where(usable, change, 0)
        step = tree.scale(length, direction)
        step = tree.select(usable, step, tree.zeros_like(step))
        alone = jnp.where(rate == 0, 0, length / jnp.where(rate == 0, 1, rate))
        looked_up = MomentumState(alone, jnp.abs(alone) * size, jnp.zeros([], jnp.int32))
        waiting = state._replace(age=state.age + 1)
        known = sound & jnp.isfinite(size) & (rate != 0)
        after = tree.select(known, tree.select(looks, looked_up, waiting), state)
        size = jnp.where(usable, jnp.abs(length) * size, 0)
        return Step(step, change, sound, _stats(length, beta), after, looks, size)


def _conjugate(search: Search) -> jax.Array:
    """β of Hestenes and Stiefel, at least 0; 0 where the curvature along p is not positive."""
    last = search.last
    assert last is not None  # a rule with `lead` is handed what `gauss_newton` recalls
    # In units of the gradient's largest entry, so that products of small numbers do not vanish.
    unit = tree.max_abs(search.rhs)
    change = tree.subtract(search.rhs, last.gradient)
    change = tree.scale(1 / jnp.where(unit > 0, unit, 1), change)
    along = tree.inner(change, last.step)
    against = tree.inner(change, search.direction)
    beta = jnp.where(along > 0, against / jnp.where(along > 0, along, 1), 0)
    return jnp.where(jnp.isfinite(beta), jnp.maximum(beta, 0), 0)


def _stats(length: jax.Array, beta: jax.Array) -> Stats:
    return {
        "momentum/length": jnp.asarray(length, float),
        "momentum/conjugate": jnp.asarray(beta, float),
    }
