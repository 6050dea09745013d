"""Full Gauss-Newton and prox-linear steps: all inner steps inside one update, on one batch.

The linearisation comes from `problem/linearisation.py`, and the model of the loss from
`problem/curvature.py`. The offset θ − φ after the last inner step is the update.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlin import tree
from gnlin.checks import check_integer, check_transformation, shows_signature, shows_update
from gnlin.problem.curvature import LOSS_MODELS, LossModel, check_loss_model, linearised_loss
from gnlin.problem.linearisation import linearise
from gnlin.problem.masking import problem_of_update
from gnlin.problem.objective import Objective, check_objective, check_params
from gnlin.tree import Params


class ProxLinearState(NamedTuple):
    count: jax.typing.ArrayLike
    metrics: dict[str, jax.Array]


@shows_signature
def prox_linear(
    inner: optax.GradientTransformation,
    objective: Objective,
    steps: int,
    *,
    loss_model: LossModel = "exact",
) -> optax.GradientTransformationExtraArgs:
    r"""All inner steps inside one update, on one batch, with one linearisation.

    It minimises :math:`Q(\theta) = \ell(f(\phi) + J(\phi)(\theta - \phi))` from θ = φ by `steps`
    steps of `inner`, started afresh, and returns θ − φ. That is full Gauss-Newton with
    ``loss_model="quadratic"``, and prox-linear with the exact loss. Beside the one linearisation a
    step costs 4/3 of a gradient. The result is that of `iterative_linearisation` with
    ``period=steps`` and ``reset_inner=True``, fed one batch for a whole cycle.

    Follow it by a line search on the true loss to be safe:
    ``optax.chain(prox_linear(...), optax.scale_by_backtracking_linesearch(...))``.

    The incoming updates are ignored. Metrics: ``prox/loss`` (ℓ at φ) and ``prox/linearised_loss``
    (Q before the last step).

    Args:
        inner: optimiser of the linearised problem, its learning rate included. It receives
            ``value``, ``grad`` and ``value_fn`` of Q.
        objective: the problem.
        steps: inner steps, at least 1.
        loss_model: as in `linearise_gradients`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; `update` takes ``batch`` and ``all_params``.

    Raises:
        ValueError, TypeError: `steps` is below 1 or no integer, `loss_model` is unknown; at update:
            `params` or `batch` is missing.

    References: Abreu et al., arXiv 2510.09378; Drusvyatskiy & Paquette, Efficiency of minimizing
    compositions of convex functions and smooth maps, 2019 (prox-linear).

    Example:
        >>> import gnlin, jax, jax.numpy as jnp, optax
        >>> objective = gnlin.Objective.least_squares(lambda p: p ** 2 - 2.0)
        >>> tx = gnlin.prox_linear(optax.sgd(0.1), objective, steps=20)
        >>> params = jnp.ones(1); state = tx.init(params); update = jax.jit(tx.update)
        >>> for _ in range(5):
        ...     updates, state = update(None, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> params.round(3)
        Array([1.414], dtype=float32)
    """
    check_transformation("inner", inner)
    check_objective(objective)
    check_loss_model(loss_model)
    check_integer("steps", steps)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        check_params(params, allow_holes=True)
        zero = jnp.asarray(0.0, float)
        # Two buffers: one that appears twice could not be donated.
        metrics = {"prox/loss": zero, "prox/linearised_loss": tree.copy(zero)}
        return ProxLinearState(jnp.zeros([], jnp.int32), metrics)

    @shows_update
    def update_fn(
        updates, state, params: Params = None, *, batch=None, all_params=None, **extra_args
    ):
        del updates
        problem = problem_of_update(objective, params, all_params, state, init_fn)
        linear = linearise(problem, params, batch)
        loss = LOSS_MODELS[loss_model](problem, linear.outputs, batch)
        value_fn = linearised_loss(linear, loss)

        def inner_step(now, _):
            offset, inner_state = now
            # ∇Q = Jᵀ∇ℓ at the linearised outputs f(φ) + J(θ − φ): one push-forward, one pull-back.
            value, cotangent = loss(linear.jvp(offset))
            grads = linear.vjp(cotangent)
            extras = {"value": value, "grad": grads, "value_fn": value_fn, "batch": batch}
            at = tree.add(params, offset)
            # Later names win: the inner optimiser sees Q, whatever the caller passed.
            updates, inner_state = inner.update(grads, inner_state, at, **{**extra_args, **extras})
            # Updates add up in the offset, where small ones are not lost beside large parameters.
            return (tree.add_scaled(offset, 1.0, updates), inner_state), value

        start = (tree.zeros_like(params), inner.init(params))
        (offset, _), values = jax.lax.scan(inner_step, start, length=steps)
        # A sum that is not finite is no step, as in any solve; the metrics tell.
        offset = tree.select(jnp.all(jnp.isfinite(values)), offset, tree.zeros_like(offset))
        metrics = {
            "prox/loss": values[0].astype(float),
            "prox/linearised_loss": values[-1].astype(float),
        }
        return offset, ProxLinearState(optax.safe_increment(state.count), metrics)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
