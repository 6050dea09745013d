"""How far to go: the best step in the span of the direction and of the last step, on the linearised model."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import check_positive
from gnlin.problem.curvature import OutputLoss, QuadraticModel, check_loss_model
from gnlin.transforms.damping import resolution
from gnlin.tree import Params


class Step(NamedTuple):
    step: Params  # δ, what is added to the parameters
    change: jax.Array  # the model's change of the loss by δ, damping aside
    sound: jax.Array  # whether the right-hand side and the linearisation were finite
    stats: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Subspace:
    r"""Step length, and momentum, from the linearised model.

    With d the direction a solver found and p the last step, α and β minimise

    .. math:: \ell\big(f(\theta) + J\delta\big) + (u - \nabla\ell)^\top \delta
              + \tfrac{\lambda}{2} \|\delta\|^2, \qquad \delta = -\alpha d + \beta p,

    where u are the incoming updates: for a convex loss a convex problem in two unknowns, for one
    push-forward of d and one of p (0.6 gradients each) and a few evaluations of the loss on known
    outputs. With ``loss_model="quadratic"`` the loss is its second-order expansion, and α and β are
    in closed form. The exact loss keeps confident predictions, where the curvature of a softmax
    vanishes, from promising too much.

    Metrics: ``subspace/length``, α, and ``subspace/momentum``, β. They are negative where the
    direction leads uphill (that of another batch, for example), and as large as the direction is
    short.

    Args:
        momentum: whether p takes part; one vector is then kept in the state.
        loss_model: ``"exact"`` or ``"quadratic"``.
        max_norm: longest ‖δ‖; a longer step is shortened to it. `None` for no bound.

    Raises:
        ValueError, TypeError: an argument is out of its range.

    Reference: Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate
    curvature, 2015, sections 6.4 and 7 (with the quadratic model).

    Example:
        >>> import gnlin
        >>> gnlin.Subspace(momentum=False)
        Subspace(momentum=False, loss_model='exact', max_norm=None)
    """

    momentum: bool = True
    loss_model: str = "exact"
    max_norm: float | None = None

    def __post_init__(self):
        if not isinstance(self.momentum, bool):
            raise TypeError(f"`momentum` must be True or False; got {self.momentum!r}")
        check_loss_model(self.loss_model)
        if self.max_norm is not None:
            check_positive("max_norm", self.max_norm)

    def init(self, params: Params) -> tuple[Any, dict[str, jax.Array]]:
        """``(state, statistics)`` before the first step."""
        return (tree.zeros_like(params) if self.momentum else ()), _stats(jnp.zeros([2]))

    def choose(
        self,
        model: QuadraticModel,
        loss: OutputLoss,
        damping: chex.Numeric,
        direction: Params,
        rhs: Params,
        last: Any,
        rate: chex.Numeric,
    ) -> Step:
        """The best step, times `rate`; `loss` is that of a displacement of the outputs, as `loss_model` has it."""
        dtype = tree.accumulation_dtype(rhs)
        ahead = tree.scale(-1, direction)
        directions, units = zip(
            *(_of_unit_size(each, dtype) for each in ([ahead, last] if self.momentum else [ahead])),
            strict=True,
        )
        moved = [model.linear.jvp(tree.cast_like(each, rhs)) for each in directions]
        value = jnp.asarray(model.value, dtype)
        slopes = jnp.stack(
            [
                tree.inner(rhs, d).astype(dtype) - tree.inner(model.cotangent, m).astype(dtype)
                for d, m in zip(directions, moved, strict=True)
            ]
        )
        gram = jnp.stack([jnp.stack([tree.inner(a, b) for b in directions]) for a in directions])

        def change(weights):
            return loss(_combined(weights, moved))[0].astype(dtype) - value + slopes @ weights

        def damped(weights):
            return change(weights) + jnp.asarray(damping, dtype) * weights @ gram @ weights / 2

        # The quadratic model's second evaluation only confirms the first.
        evaluations = 10 if self.loss_model == "exact" else 1
        weights = _minimise(
            damped, len(directions), dtype, evaluations, resolution(model.value).astype(dtype)
        )
        weights = weights * jnp.asarray(rate, dtype)
        if self.max_norm is not None:
            length = jnp.sqrt(jnp.maximum(weights @ gram @ weights, 0))
            weights = weights * jnp.minimum(1, self.max_norm / jnp.where(length > 0, length, 1))
        step = tree.cast_like(_combined(weights, directions), rhs)
        usable = jnp.all(jnp.isfinite(weights)) & tree.all_finite(step)
        step, weights = tree.select(usable, (step, weights), tree.zeros_like((step, weights)))
        change_of_loss, sound = jnp.where(usable, change(weights), 0), jnp.all(jnp.isfinite(slopes))
        return Step(
            step, change_of_loss, sound, _stats(jnp.append(weights / jnp.stack(units), 0)[:2])
        )


def _of_unit_size(vector: Params, dtype) -> tuple[Params, jax.Array]:
    """``(v / max |v|, max |v|)``: at large λ the squares of a direction's entries would vanish."""
    size = tree.max_abs(vector)
    unit = jnp.where(size > 0, size, 1).astype(dtype)
    return jax.tree.map(lambda leaf: leaf.astype(dtype) / unit, vector), unit


def _combined(weights: jax.Array, trees: Sequence[Any]) -> Any:
    """Σ wᵢ tᵢ, in the dtypes of the trees."""
    return jax.tree.map(
        lambda *parts: sum(w.astype(p.dtype) * p for w, p in zip(weights, parts, strict=True)),
        *trees,
    )


def _minimise(
    function, count: int, dtype, evaluations: int, resolution: chex.Numeric = 0.0
) -> jax.Array:
    """Newton's method from zero for a smooth convex function of one or two numbers that is 0 there.

    A step that leads up by more than `resolution`, that of the function's values, is shortened.
    Below it the slope decides, which is accurate for longer than the values are.
    """
    eps = float(jnp.finfo(dtype).eps)
    units = jnp.eye(count, dtype=dtype)

    def newton(weights):
        (value, slope), pull_back = jax.vjp(jax.value_and_grad(function), weights)
        hessian = jax.vmap(lambda unit: pull_back((jnp.zeros_like(value), unit))[0])(units)
        # Directions may differ in curvature by orders of magnitude, may be parallel, and may be
        # zero.
        size = jnp.abs(jnp.diagonal(hessian))
        scale = jnp.sqrt(jnp.where(size > jnp.finfo(dtype).tiny, size, 1))
        step = (
            -_solve_unit_diagonal(hessian / jnp.outer(scale, scale), slope / scale, 10 * eps)
            / scale
        )
        return value, jnp.where(jnp.all(jnp.isfinite(step)), step, 0), -slope @ step

    def unfinished(now):
        _, value, _, decrement, _, count = now
        return (count < evaluations) & (decrement > 1e-3 * jnp.abs(value))

    def turn(now):
        weights, value, step, decrement, length, count = now
        trial = weights + length * step
        new_value, new_step, new_decrement = newton(trial)
        new_value = jnp.where(count == 0, 0, new_value)
        good = new_value <= value + resolution  # false for NaN
        kept = tree.select(
            good, (trial, new_value, new_step, new_decrement), (weights, value, step, decrement)
        )
        return (*kept, jnp.where(good, 1, length / 4), count + 1)

    zero, nothing = jnp.zeros([count], dtype), jnp.zeros([], dtype)
    if evaluations == 1:
        return newton(zero)[1]
    # The first turn evaluates at zero: compiled once, and not once more before the loop.
    first = (
        zero,
        nothing,
        zero,
        jnp.full_like(nothing, jnp.inf),
        jnp.ones([], dtype),
        jnp.zeros([], jnp.int32),
    )
    return jax.lax.while_loop(unfinished, turn, first)[0]


def _solve_unit_diagonal(matrix: jax.Array, rhs: jax.Array, jitter: float) -> jax.Array:
    """Solution for a symmetric matrix with ones on its diagonal, to which `jitter` is added, of one or two rows."""
    diagonal = 1 + jitter
    if len(rhs) == 1:
        return rhs / diagonal
    # The eigenvectors are (1, 1) and (1, −1).
    along, across = (rhs[0] + rhs[1]) / 2, (rhs[0] - rhs[1]) / 2
    along, across = along / (diagonal + matrix[0, 1]), across / (diagonal - matrix[0, 1])
    return jnp.stack([along + across, along - across])


def _stats(weights: jax.Array) -> dict[str, jax.Array]:
    return {
        "subspace/length": jnp.asarray(weights[0], float),
        "subspace/momentum": jnp.asarray(weights[1], float),
    }
