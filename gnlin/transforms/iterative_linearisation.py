r"""Iterative linearisation: train the linearised model, and move its anchor every K steps.

Let Q_φ(θ) = ℓ(f(φ) + J(φ)(θ − φ)). The method is two loops, over cycles and over their steps:

    repeat:
        φ ← θ
        repeat K times:                             # each on its own mini-batch
            θ ← θ − inner(∇Q_φ(θ))

A gradient transformation makes one update at a time, so the loops are flattened. The state has φ
and a flag: whether the next update moves it. The head of the outer loop becomes a test at the head
of the update,

    φ ← θ  if moves  else φ
    g ← ∇Q_φ(θ);   moves ← rule

The test stands at the head and not at the end. A chain element does not know the parameters that
its update will lead to: later elements still change the step. Between two updates, `moves` says
that the next one starts from the true model at θ, and `predict` then evaluates the true model.
K = 1 has φ = θ always, where ∇Q_φ(θ) = Jᵀ∇ℓ(f(θ)) is the true gradient. K = ∞ never returns to the
head.

`linearise_gradients` is the update. `iterative_linearisation` adds an inner optimiser, and the
search of `line_search`. The rules are in `period` and `layer_periods`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from gnlin import checks, tree
from gnlin.jaxprs import primitive_names
from gnlin.problem.curvature import (
    LOSS_MODELS,
    LossModel,
    check_loss_model,
    linearised_loss,
    partly_linearised_loss,
)
from gnlin.problem.linearisation import Linearisation, linearise
from gnlin.problem.masking import problem_of_update
from gnlin.problem.objective import Objective, check_objective, check_params
from gnlin.solve.protocols import begin
from gnlin.transforms.layer_periods import LayerPeriods, LayersServed
from gnlin.transforms.line_search import best_along, check_line_search
from gnlin.transforms.period import Every, PeriodRule, Served, rule_of
from gnlin.tree import Batch, Outputs, Params

# A cycle of K steps saves one push-forward, a fraction 2/(5K) of its work. Beyond this K that is
# not worth a branch.
_LONGEST_SKIPPING_PERIOD = 10

Period = int | None | Callable[[Any], chex.Numeric] | PeriodRule | LayerPeriods


class LinearisedGradientsState(NamedTuple):
    count: jax.typing.ArrayLike
    anchor: Params  # φ
    period: Any  # of the rule; its `moves` says whether the next update moves the anchor
    metrics: dict[str, jax.Array]


class IterativeLinearisationState(NamedTuple):
    linearised: LinearisedGradientsState
    inner: optax.OptState
    metrics: dict[str, jax.Array]


@checks.shows_signature
def linearise_gradients(
    objective: Objective, period: Period, *, loss_model: LossModel = "exact"
) -> optax.GradientTransformationExtraArgs:
    r"""Replace the incoming gradient by that of the linearised problem.

    This is the chain element of iterative linearisation:

    .. math:: \nabla Q_\phi(\theta) =
              J(\phi)^\top \nabla\ell\big(f(\phi) + J(\phi)(\theta - \phi)\big)

    The anchor φ moves to θ at the first update and then every `period` updates. The rest of the
    chain (Adam, momentum, ...) descends on it:
    ``optax.chain(gnlin.linearise_gradients(objective, 16), optax.adam(1e-3))``. The incoming
    gradient is ignored, may be `None`, and costs nothing under `jit`.

    To accumulate micro-batches put this element outside, so that each micro-batch is linearised:
    ``optax.chain(linearise_gradients(...), optax.MultiSteps(inner, k).gradient_transformation())``.
    A step costs 5/3 of a gradient, and with ``period=1`` exactly a gradient.

    Metrics: ``linearise/loss`` (Q at the parameters given), ``linearise/refreshes`` (times the
    anchor moved), ``linearise/age`` (updates since then), and those of the rule. With
    `LayerPeriods`, refreshes and age have the label at their end, ``linearise/refreshes/<label>``.

    Args:
        objective: the problem.
        period: K ≥ 1, or `None` for never (linearised training). A schedule of the count of updates
            is evaluated each time the anchor moves, and rounded to at least 1. A rule such as
            `RelativeGap`, or any `PeriodRule`, decides by itself. `LayerPeriods` linearises some
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
        >>> params = jnp.ones(1); state = tx.init(params); update = jax.jit(tx.update)
        >>> for _ in range(40):
        ...     updates, state = update(None, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> params.round(3)
        Array([1.414], dtype=float32)
    """
    check_objective(objective)
    rule: Any = rule_of(period)
    check_loss_model(loss_model)
    update_of = _update_for(rule)

    def init_fn(params):
        check_params(params, allow_holes=True)
        period_state, stats = begin("period", rule, params)
        if not hasattr(period_state, "moves"):
            raise TypeError(
                "`period` must have an `init` whose state is a named tuple with the field `moves`; "
                f"{period!r} returned {period_state!r}"
            )
        metrics = {"linearise/loss": jnp.asarray(0.0, float)}
        if not isinstance(rule, LayerPeriods):
            metrics["linearise/refreshes"] = jnp.zeros([], jnp.int32)
            metrics["linearise/age"] = jnp.zeros([], jnp.int32)
        return LinearisedGradientsState(
            count=jnp.zeros([], jnp.int32),
            anchor=tree.copy(params),  # a buffer of its own, for donation
            period=tree.copy(period_state),
            metrics={**metrics, **tree.copy(stats)},
        )

    @checks.shows_update
    def update_fn(
        updates, state, params: Params = None, *, batch=None, all_params=None, **extra_args
    ):
        del updates, extra_args
        problem = problem_of_update(objective, params, all_params, state, init_fn)
        update = update_of(problem, rule, loss_model, state, params, batch)
        return update.grads, update.state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@checks.shows_signature
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

    It is `linearise_gradients` followed by `inner`, and does two things more than a chain can. It
    can start the inner optimiser afresh with each anchor. It can choose how far to go at the end of
    a cycle, where θ is replaced by the best of

    .. math:: \phi + \alpha\,(\theta - \phi), \qquad \alpha \in \{0\} \cup \text{line\_search},

    on the true loss of the last batch. The result is never worse on it than φ, as far as θ can
    resolve φ. An update is added to θ, and is lost where θ has become too large. With a line search
    the transform must stand last in a chain.

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
        >>> import gnlin, jax, jax.numpy as jnp, optax
        >>> objective = gnlin.Objective.least_squares(lambda p: p ** 2 - 2.0)
        >>> tx = gnlin.iterative_linearisation(
        ...     optax.sgd(0.1, momentum=0.5), objective, period=5, reset_inner=True,
        ...     line_search=(1.0, 0.5))
        >>> params = jnp.ones(1); state = tx.init(params); update = jax.jit(tx.update)
        >>> for _ in range(60):
        ...     updates, state = update(None, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(objective.value(params) < 1e-3)
        True
    """
    checks.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    check_objective(objective)
    rule: Any = rule_of(period)
    alphas = check_line_search(line_search)
    if isinstance(rule, LayerPeriods) and (reset_inner or alphas is not None):
        name = "reset_inner" if reset_inner else "line_search"
        raise ValueError(
            f"`{name}` wants cycles that end for all layers at once; give one `period`, "
            "not LayerPeriods"
        )
    update_of = _update_for(rule)
    linearised = linearise_gradients(objective, rule, loss_model=loss_model)

    def init_fn(params):
        metrics = {} if alphas is None else {"line_search/alpha": jnp.asarray(0.0, float)}
        state: Any = linearised.init(params)
        # L-BFGS holds one array twice, and a buffer can be donated only once.
        return IterativeLinearisationState(state, tree.copy(inner.init(params)), metrics)

    @checks.shows_update
    def update_fn(
        updates, state, params: Params = None, *, batch=None, all_params=None, **extra_args
    ):
        del updates
        problem = problem_of_update(objective, params, all_params, state, init_fn)
        update = update_of(problem, rule, loss_model, state.linearised, params, batch)
        inner_state = state.inner
        if reset_inner:
            moved = state.linearised.period.moves
            inner_state = tree.select(moved, inner.init(params), inner_state)
        # Q in place of the true loss that a driver may pass: the inner optimiser descends on Q.
        of_problem = {"value": update.value, "grad": update.grads, "value_fn": update.value_fn}
        extra_args = {**extra_args, **of_problem, "batch": batch}
        updates, inner_state = inner.update(update.grads, inner_state, params, **extra_args)
        metrics, after = state.metrics, update.state
        if alphas is not None:

            def at_end(updates, alphas=alphas):
                return best_along(problem, after.anchor, params, updates, alphas, batch)

            def within(updates):
                return updates, metrics["line_search/alpha"]

            updates = tree.cast_like(updates, params)
            # The next update moves the anchor, so this one ends the cycle.
            updates, alpha = jax.lax.cond(after.period.moves, at_end, within, updates)
            metrics = {"line_search/alpha": alpha}
        return updates, IterativeLinearisationState(after, inner_state, metrics)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# One update of the flattened loops.


class _Update(NamedTuple):
    value: jax.Array  # Q(θ)
    grads: Params  # ∇Q(θ)
    value_fn: Callable[..., jax.Array]  # Q
    state: LinearisedGradientsState


def _update_for(rule: Any) -> Callable[..., _Update]:
    return _update_by_layers if isinstance(rule, LayerPeriods) else _update_of_network


def _update_of_network(
    objective: Objective,
    rule: PeriodRule,
    loss_model: LossModel,
    state: LinearisedGradientsState,
    params: Params,
    batch: Batch,
) -> _Update:
    """One update with one anchor for the whole network."""
    always = _fixed_period(rule) == 1
    # K = 1 needs no choice, and costs no more than a gradient.
    anchor = params if always else next_anchor(state, params)
    linear = linearise(objective, anchor, batch)
    loss = LOSS_MODELS[loss_model](objective, linear.outputs, batch)
    if always:
        # θ = φ: the displacement is zero, and both models of the loss have the gradient of the loss
        # itself.
        displacement = tree.zeros_like(linear.outputs)
        value, cotangent = jax.value_and_grad(objective.loss_of)(linear.outputs, batch)
    else:
        displacement = _displacement(linear, params, state.period.moves, rule)
        value, cotangent = loss(displacement)
    moved, metrics = state.period.moves, dict(state.metrics)
    metrics["linearise/refreshes"] += moved.astype(jnp.int32)
    metrics["linearise/age"] = jnp.where(moved, 0, optax.safe_increment(metrics["linearise/age"]))
    served = Served(
        count=state.count,
        age=metrics["linearise/age"],
        params=params,
        anchor=anchor,
        outputs=linear.outputs,
        displacement=displacement,
        network=lambda: objective.outputs_and_aux(params, batch)[0],
    )
    after = _state_after(rule, state._replace(metrics=metrics), served, value)
    return _Update(value, linear.vjp(cotangent), linearised_loss(linear, loss), after)


def _update_by_layers(
    objective: Objective,
    rule: LayerPeriods,
    loss_model: LossModel,
    state: LinearisedGradientsState,
    params: Params,
    batch: Batch,
) -> _Update:
    """One update with an anchor for each group of layers, which the rule counts by itself."""
    anchor = next_anchor(state, params)
    value_fn = partly_linearised_loss(objective, anchor, rule.exact(anchor), loss_model, batch)
    value, grads = jax.value_and_grad(value_fn)(params)
    served = LayersServed(state.count, anchor)
    return _Update(value, grads, value_fn, _state_after(rule, state, served, value))


def _state_after(
    rule: Any, state: LinearisedGradientsState, served: Any, value: jax.Array
) -> LinearisedGradientsState:
    """State after an update at which Q was `value`."""
    result = rule.after(state.period, served)
    period_state, stats = checks.returned("period.after", result, object, Mapping)
    metrics = {**state.metrics, "linearise/loss": value.astype(float), **stats}
    return LinearisedGradientsState(
        count=optax.safe_increment(state.count),
        anchor=served.anchor,
        period=period_state,
        metrics=checks.check_metrics(metrics, state.metrics),
    )


def next_anchor(state: LinearisedGradientsState, params: Params) -> Params:
    """The anchor of an update at `params`; leaves that a mask hid from `state` are those there."""
    anchor, moves = tree.fill_holes(state.anchor, params), state.period.moves
    # One flag for the whole network, or with `LayerPeriods` one for each leaf.
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(moves)):
        return tree.select(moves, params, anchor)
    # Where the anchor has a hole, both choices are the same, and any flag will do.
    moves = tree.fill_holes(moves, jax.tree.map(lambda leaf: True, params))
    return jax.tree.map(jnp.where, moves, params, anchor)


def linearised_state(opt_state: Any) -> LinearisedGradientsState | None:
    """The state of iterative linearisation in `opt_state`, however nested; `None` for none."""

    def is_state(node):
        return isinstance(node, LinearisedGradientsState)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if len(found) > 1:
        raise ValueError(
            f"`opt_state` holds {len(found)} anchors, so the model being trained is not one "
            "linearisation. Pass the part of the state that belongs to one transform."
        )
    return found[0] if found else None


def _fixed_period(rule: PeriodRule) -> int | None:
    """K, where it is known when the update is traced."""
    return rule.period if isinstance(rule, Every) and isinstance(rule.period, int) else None


def _displacement(
    linear: Linearisation, params: Params, fresh: jax.Array, rule: PeriodRule
) -> Outputs:
    """J(φ)(θ − φ); right after the anchor moved it is zero, and not computed where that pays."""
    offset, period = tree.subtract(params, linear.anchor), _fixed_period(rule)
    if period is None or period > _LONGEST_SKIPPING_PERIOD:
        return linear.jvp(offset)
    # XLA on CPU runs a convolution inside `cond` several times slower than outside.
    names = primitive_names(jax.make_jaxpr(linear.jvp)(offset).jaxpr)
    if "conv_general_dilated" in names:
        return linear.jvp(offset)
    # Only the push-forward is in the branch, so all iterates stay the same to the bit.
    return jax.lax.cond(fresh, lambda _: tree.zeros_like(linear.outputs), linear.jvp, offset)
