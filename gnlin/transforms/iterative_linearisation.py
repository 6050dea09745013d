r"""Iterative linearisation: train the model linearised at an anchor φ, and move the anchor every K
steps.

Written as two loops, over cycles and over the steps of a cycle,

    repeat:                                         # a cycle
        φ ← θ
        repeat K times:                             # each on its own mini-batch
            g ← ∇Q_φ(θ),  Q_φ(θ) = ℓ(f(φ) + J(φ)(θ − φ))
            θ ← θ − inner(g)

A gradient transformation is asked for one update at a time, so the loops are flattened: the state
carries φ and the number of steps that φ still has to serve, and the head of the outer loop becomes
a test at the head of the update,

    φ, remaining ← (θ, K) if remaining = 0 else (φ, remaining)
    g ← ∇Q_φ(θ);  remaining ← remaining − 1

It stands at the head and not at the end because a chain element does not know the parameters that
its update will lead to: later elements still change the step. Hence, between two updates, remaining
= 0 says that the next update will start from the true model at θ, and `predict` then evaluates the
true model. K = 1 has φ = θ always, where ∇Q_φ(θ) = Jᵀ∇ℓ(f(θ)) is the true gradient; K = ∞ never
returns to the head.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlin import tree
from gnlin.jaxprs import primitive_names
from gnlin.problem.curvature import (
    LOSS_MODELS,
    LossModel,
    check_loss_model,
    linearised_loss,
    partly_linearised_loss,
)
from gnlin.problem.linearisation import Linearisation, linearise
from gnlin.problem.objective import (
    Objective,
    check_like_params,
    check_line_search,
    check_objective,
    check_params,
    check_transformation,
    visible_objective,
    without_loss,
)
from gnlin.transforms.period import LayerPeriods, Period, RelativeGap, check_period, cycle_length
from gnlin.tree import Batch, Params

# A cycle of K steps saves one push-forward, a fraction 2/(5K) of its work; beyond this K that is
# not worth a branch.
_LONGEST_SKIPPING_PERIOD = 10


class LinearisedGradientsState(NamedTuple):
    count: jax.typing.ArrayLike
    remaining: Any  # updates that the anchor still serves, 0: the next one moves it; of `LayerPeriods` for each leaf
    anchor: Params
    gap: Any  # `GapState` of a `RelativeGap`
    metrics: dict[str, jax.Array]


class IterativeLinearisationState(NamedTuple):
    linearised: LinearisedGradientsState
    inner: optax.OptState
    metrics: dict[str, jax.Array]


def linearise_gradients(
    objective: Objective, period: Period, *, loss_model: LossModel = "exact"
) -> optax.GradientTransformationExtraArgs:
    r"""Replace the incoming gradient by that of the linearised problem: the chain element of
    iterative linearisation.

    .. math:: \nabla Q_\phi(\theta) = J(\phi)^\top \nabla\ell\big(f(\phi) + J(\phi)(\theta - \phi)\big)

    The anchor φ is moved to θ at the first update and then every `period` updates. What follows in
    the chain (Adam, momentum, ...) descends on it:
    ``optax.chain(gnlin.linearise_gradients(objective, 16), optax.adam(1e-3))``. The incoming
    gradient is ignored, may be `None`, and costs nothing under `jit`. To accumulate micro-batches
    put this element outside: ``optax.chain(linearise_gradients(...), optax.MultiSteps(inner,
    k).gradient_transformation())``, so that each micro-batch is linearised.

    A step costs 5/3 of a gradient, and with ``period=1`` exactly a gradient.

    Metrics: ``linearise/loss`` (Q at the parameters given), ``linearise/refreshes`` (times the
    anchor moved), ``linearise/age`` (updates since then); with `RelativeGap` also ``linearise/gap``
    (what its last look found, 0 before the first at an anchor); with `LayerPeriods` refreshes and
    age for each label, ``linearise/refreshes/<label>``.

    Args:
        objective: the problem.
        period: K ≥ 1; `None` for never (linearised training); a schedule, evaluated at the count of
            updates each time the anchor moves and rounded to at least 1; a `RelativeGap`, to move
            the anchor when the linearisation no longer holds; or `LayerPeriods`, to linearise some
            layers only, or each group at its own pace.
        loss_model: ``"exact"`` keeps the loss; ``"quadratic"`` expands it too, to second order at
            f(φ): the Gauss-Newton model of Abreu et al.

    Returns:
        An `optax.GradientTransformationExtraArgs`; `update` takes ``batch`` and ``all_params``.

    Raises:
        ValueError, TypeError: `period` is below 1 or no integer, `loss_model` is unknown; at
            update: `params` or `batch` is missing.

    References: Goldwaser & Ge, arXiv 2211.12345, section 3; Abreu et al., arXiv 2510.09378.

    Example:
        >>> import gnlin, jax, jax.numpy as jnp, optax
        >>> objective = gnlin.Objective.least_squares(lambda p: p ** 2 - 2.0)
        >>> tx = optax.chain(gnlin.linearise_gradients(objective, period=4), optax.sgd(0.1))
        >>> params = jnp.ones(1); state = tx.init(params)
        >>> for _ in range(40):
        ...     updates, state = tx.update(None, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> params.round(3)
        Array([1.414], dtype=float32)
    """
    check_objective(objective)
    period = check_period(period)
    check_loss_model(loss_model)

    def init_fn(params):
        check_params(params, allow_holes=True)
        return LinearisedGradientsState(
            count=jnp.zeros([], jnp.int32),
            remaining=_each_leaf(period, params, lambda label: jnp.zeros([], jnp.int32)),
            anchor=tree.copy(params),
            gap=period.init() if isinstance(period, RelativeGap) else (),
            metrics={
                "linearise/loss": jnp.asarray(0.0, float),
                **{
                    name + suffix: jnp.zeros([], jnp.int32)
                    for suffix in _suffixes(period)
                    for name in ("linearise/refreshes", "linearise/age")
                },
                **(
                    {"linearise/gap": jnp.asarray(0.0, float)}
                    if isinstance(period, RelativeGap)
                    else {}
                ),
            },
        )

    def update_fn(
        updates, state, params: Params = None, *, batch=None, all_params=None, **extra_args
    ):
        del updates, extra_args
        problem = visible_objective(objective, params, all_params)
        _, grads, _, state = _linearised_step(problem, period, loss_model, state, params, batch)
        return grads, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def iterative_linearisation(
    inner: optax.GradientTransformation,
    objective: Objective,
    period: Period,
    *,
    loss_model: LossModel = "exact",
    reset_inner: bool = False,
    line_search: Sequence[float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Iterative linearisation around an inner optimiser that it owns.

    As `linearise_gradients` followed by `inner`, and able to do what a chain element cannot: start
    the inner optimiser afresh with each anchor, and choose how far to go at the end of a cycle,
    where θ is replaced by the best of

    .. math:: \phi + \alpha\,(\theta - \phi), \qquad \alpha \in \{0\} \cup \text{line\_search},

    on the true loss of the last batch, so never worse on it than not having moved, as far as θ can
    still resolve φ: an update is added to θ, and is lost where θ has become too large. With a line
    search stand last in a chain.

    The inner optimiser also receives ``value``, ``grad`` and ``value_fn`` of the linearised problem
    (and ``batch``), so that ``optax.lbfgs()`` works.

    Metrics: as `linearise_gradients`, and with a line search ``line_search/alpha``, the last α
        chosen.

    Args:
        inner: optimiser of the linearised problem, its learning rate included.
        objective: the problem.
        period: as in `linearise_gradients`.
        loss_model: as in `linearise_gradients`.
        reset_inner: whether `inner` forgets its state each time the anchor moves.
        line_search: values of α to try at the end of each cycle, such as ``(1.0, 0.5, 0.25)``;
            `None` for none. Each costs a forward pass.

    Returns:
        An `optax.GradientTransformationExtraArgs`; `update` takes ``batch`` and ``all_params``.

    Raises:
        ValueError, TypeError: as `linearise_gradients`; `line_search` is empty or has an α that is
        not positive.

    References: Goldwaser & Ge, arXiv 2211.12345; Abreu et al., arXiv 2510.09378 (the line search).

    Example:
        >>> import gnlin, jax.numpy as jnp, optax
        >>> objective = gnlin.Objective.least_squares(lambda p: p ** 2 - 2.0)
        >>> tx = gnlin.iterative_linearisation(
        ...     optax.sgd(0.1, momentum=0.5), objective, period=5, reset_inner=True, line_search=(1.0, 0.5))
        >>> params = jnp.ones(1); state = tx.init(params)
        >>> for _ in range(60):
        ...     updates, state = tx.update(None, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(objective.value(params) < 1e-3)
        True
    """
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    alphas = check_line_search(line_search)
    if isinstance(period, LayerPeriods) and (reset_inner or alphas is not None):
        name = "reset_inner" if reset_inner else "line_search"
        raise ValueError(
            f"`{name}` wants cycles that end for all layers at once; give one `period`, not LayerPeriods"
        )
    linearised = linearise_gradients(objective, period, loss_model=loss_model)

    def init_fn(params):
        metrics = {} if alphas is None else {"line_search/alpha": jnp.asarray(0.0, float)}
        state: Any = linearised.init(params)
        # L-BFGS holds one array twice, and a buffer can be donated only once.
        return IterativeLinearisationState(state, tree.copy(inner.init(params)), metrics)

    def update_fn(
        updates, state, params: Params = None, *, batch=None, all_params=None, **extra_args
    ):
        del updates
        extra_args = without_loss(extra_args)
        problem = visible_objective(objective, params, all_params)
        value, grads, value_fn, after = _linearised_step(
            problem, period, loss_model, state.linearised, params, batch
        )
        inner_state = state.inner
        if reset_inner:
            inner_state = tree.select(
                state.linearised.remaining == 0, inner.init(params), inner_state
            )
        updates, inner_state = inner.update(
            grads,
            inner_state,
            params,
            value=value,
            grad=grads,
            value_fn=value_fn,
            batch=batch,
            **extra_args,
        )
        metrics = state.metrics
        if alphas is not None:

            def at_end(updates, alphas=alphas):
                return _best_along(problem, after.anchor, params, updates, alphas, batch)

            def within(updates):
                return updates, metrics["line_search/alpha"]

            updates, alpha = jax.lax.cond(
                after.remaining == 0, at_end, within, tree.cast_like(updates, params)
            )
            metrics = {"line_search/alpha": alpha}
        return updates, IterativeLinearisationState(after, inner_state, metrics)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# The head of the flattened loops.


def _linearised_step(
    objective: Objective,
    period: Period,
    loss_model: LossModel,
    state: LinearisedGradientsState,
    params: Params,
    batch: Batch,
) -> tuple[jax.Array, Params, Callable, LinearisedGradientsState]:
    """``(Q(θ), ∇Q(θ), Q, state)`` of one update."""
    check_params(params, allow_holes=True)
    check_like_params(
        "opt_state", state.anchor, params, "call tx.init(params) for these parameters"
    )
    always = isinstance(period, int) and period == 1
    anchor = params if always else next_anchor(state, params)
    if isinstance(period, LayerPeriods):
        exact = _each_leaf(period, anchor, lambda label: check_period(period.periods[label]) == 1)
        value_fn = partly_linearised_loss(objective, anchor, exact, loss_model, batch)
        value, grads = jax.value_and_grad(value_fn)(params)
        return value, grads, value_fn, _after(period, state, anchor, value)
    fresh = state.remaining == 0
    linear = linearise(objective, anchor, batch)
    loss = LOSS_MODELS[loss_model](objective, linear.outputs, batch)
    if always:
        # θ = φ: the displacement is zero, and both models of the loss have the gradient of the loss
        # itself.
        value, cotangent = jax.value_and_grad(objective.loss_of)(linear.outputs, batch)
    else:
        moved = _displacement(linear, params, fresh, period)
        value, cotangent = loss(moved)
    after = _after(period, state, anchor, value)
    if isinstance(period, RelativeGap):
        gap, stale = period.look(
            state.gap,
            after.metrics["linearise/age"],
            moved,
            lambda: objective.outputs_and_aux(params, batch)[0],
            linear.outputs,
        )
        remaining = jnp.where(stale, 0, after.remaining)
        after = after._replace(
            remaining=remaining, gap=gap, metrics={**after.metrics, "linearise/gap": gap.gap}
        )
    return value, linear.vjp(cotangent), linearised_loss(linear, loss), after


def next_anchor(state: LinearisedGradientsState, params: Params) -> Params:
    """The anchor of an update at `params`; what it was not seen of, through a mask, is there."""
    anchor = tree.fill_holes(state.anchor, params)
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(state.remaining)):
        return tree.select(state.remaining == 0, params, anchor)
    remaining = tree.fill_holes(
        state.remaining, params
    )  # any number will do where both are the same
    return jax.tree.map(
        lambda left, new, old: jnp.where(left == 0, new, old), remaining, params, anchor
    )


def linearised_state(opt_state: Any) -> LinearisedGradientsState | None:
    """The state of iterative linearisation in `opt_state`, however nested; `None` where there is none."""
    nodes = jax.tree.leaves(
        opt_state, is_leaf=lambda node: isinstance(node, LinearisedGradientsState)
    )
    found = [node for node in nodes if isinstance(node, LinearisedGradientsState)]
    if len(found) > 1:
        raise ValueError(
            f"`opt_state` holds {len(found)} anchors, so the model being trained is not one linearisation. "
            "Pass the part of the state that belongs to one transform."
        )
    return found[0] if found else None


def _after(period: Period, state: LinearisedGradientsState, anchor: Params, value: jax.Array):
    """State after an update with this anchor, at which Q was `value`."""

    def count_down(period, left):
        served = jnp.where(left == 0, cycle_length(period, state.count), left)
        return jnp.where(served > 0, served - 1, served)

    metrics = {**state.metrics, "linearise/loss": value.astype(float)}
    if isinstance(period, LayerPeriods):
        labels, left = period.label_of_leaves(anchor), jax.tree.leaves(state.remaining)
        counters = dict(zip(labels, left, strict=True))  # those of one label are equal
        remaining = jax.tree.unflatten(
            jax.tree.structure(anchor),
            [
                count_down(period.periods[label], each)
                for label, each in zip(labels, left, strict=True)
            ],
        )
    else:
        counters, remaining = {"": state.remaining}, count_down(period, state.remaining)
    for label, left in counters.items():
        suffix = f"/{label}" if isinstance(period, LayerPeriods) else ""
        refreshes, age = f"linearise/refreshes{suffix}", f"linearise/age{suffix}"
        metrics[refreshes] += (left == 0).astype(jnp.int32)
        metrics[age] = jnp.where(left == 0, 0, optax.safe_increment(metrics[age]))
    return state._replace(
        count=optax.safe_increment(state.count), remaining=remaining, anchor=anchor, metrics=metrics
    )


def _displacement(linear: Linearisation, params: Params, fresh: jax.Array, period: Period) -> Any:
    """J(φ)(θ − φ), not computed right after a re-linearisation (θ = φ) where leaving it out pays."""
    offset = tree.subtract(params, linear.anchor)
    if not _skipping_pays(linear, period):
        return linear.jvp(offset)
    return jax.lax.cond(fresh, lambda _: tree.zeros_like(linear.outputs), linear.jvp, offset)


def _skipping_pays(linear: Linearisation, period: Period) -> bool:
    if not isinstance(period, int) or period > _LONGEST_SKIPPING_PERIOD:
        return False
    # XLA on CPU runs a convolution inside `cond` several times slower than outside.
    names = primitive_names(jax.make_jaxpr(linear.jvp)(linear.anchor).jaxpr)
    return "conv_general_dilated" not in names


# Layers at their own pace.


def _suffixes(period: Period) -> list[str]:
    """What the names of metrics end with."""
    return [f"/{label}" for label in period.periods] if isinstance(period, LayerPeriods) else [""]


def _each_leaf(period: Period, params: Params, value: Callable[[Any], Any]) -> Any:
    """A value for the whole network, or for each leaf by its label."""
    if not isinstance(period, LayerPeriods):
        return value(None)
    return jax.tree.unflatten(
        jax.tree.structure(params), [value(each) for each in period.label_of_leaves(params)]
    )


def _best_along(
    objective: Objective,
    anchor: Params,
    params: Params,
    updates: Params,
    alphas: Sequence[float],
    batch: Batch,
) -> tuple[Params, jax.Array]:
    """Updates that lead to the best φ + α(θ' − φ), θ' = params + updates, on the true loss; and its
    α.

    The losses are those where the updates, rounded, lead. α = 0 is φ itself and no product with
    what may be infinite.
    """
    direction = tree.subtract(tree.add(params, updates), anchor)
    best, best_alpha = tree.subtract(anchor, params), jnp.asarray(0.0, float)
    lowest = objective.value(tree.add(params, best), batch)
    for alpha in alphas:
        candidate = tree.subtract(tree.add_scaled(anchor, alpha, direction), params)
        loss = objective.value(tree.add(params, candidate), batch)
        better = loss < lowest  # false for NaN; of equals the first stays
        best, best_alpha, lowest = tree.select(
            better, (candidate, jnp.asarray(alpha, float), loss), (best, best_alpha, lowest)
        )
    return best, best_alpha
