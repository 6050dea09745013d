"""Damped Gauss-Newton: (JᵀHJ + λI) d = updates, solved afresh at every step.

One update, in the order in which it is read below:

* ``model = quadratic_model(problem, params, batch)``: one linearisation (`problem/curvature.py`).
* ``ρ = (ℓ(θ') − ℓ(θ)) / predicted decrease``: the gain ratio of the last step, where the batch is
  that of the last update (`memory`).
* ``λ = damping.judge(ρ)``, and δ = θ' − θ where the policy refuses the last step (`damping`).
* ``d = solver.solve(model.system(λ), updates)``: the direction (`solve/`).
* ``δ = step.choose(d)``: the step along it (`momentum`, `step_length`).
* Now and then ``ρ = (ℓ(θ) − ℓ(θ + δ)) / predicted decrease``, and δ = 0 where it is refused.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlin import tree
from gnlin.checks import check_metrics, check_number, shows_signature, shows_update
from gnlin.problem.curvature import QuadraticModel, quadratic_model
from gnlin.problem.masking import problem_of_update
from gnlin.problem.objective import Objective, check_like_params, check_objective, check_params
from gnlin.solve import CG, Eigenbasis, Kronecker, Solver
from gnlin.solve.protocols import begin, check_solver, check_solves, solved
from gnlin.transforms.damping import (
    Damping,
    DampingPolicy,
    GainRatio,
    Given,
    check_damping,
    policy_of,
)
from gnlin.transforms.memory import begin_memory
from gnlin.transforms.momentum import Momentum
from gnlin.transforms.step_length import Search, StepRule, check_step_rule, returned_step
from gnlin.transforms.unit import damping_unit
from gnlin.transforms.verdict import past_of, settle, try_step
from gnlin.tree import Batch, Params


class GaussNewtonState(NamedTuple):
    count: jax.typing.ArrayLike
    solver: Any
    damping: Any  # state of the policy, such as λ
    step: Any  # state of the step rule, such as the last step
    memory: Any  # what the last update left; () where every step is tried at once
    unit: Any  # of a λ without units, 0 until it is known; () where λ has them
    metrics: dict[str, jax.Array]


class ScaleByGaussNewtonState(NamedTuple):
    count: jax.typing.ArrayLike
    solver: Any
    metrics: dict[str, jax.Array]


@shows_signature
def gauss_newton(
    objective: Objective,
    *,
    learning_rate: optax.ScalarOrSchedule | Literal["auto"] = "auto",
    damping: Damping | DampingPolicy = GainRatio(
        1.0, minimum=0.1, relative=True, minimum_again=1e-3
    ),
    solver: Solver = Kronecker(refresh=5),
    step: StepRule | Literal["auto"] = "auto",
) -> optax.GradientTransformationExtraArgs:
    r"""Damped Gauss-Newton descent, with defaults that are meant to be used as they are.

    ``gauss_newton(objective)`` takes the direction from `Kronecker` factors of the Gauss-Newton
    matrix, with `Momentum`. The linearised model gives its length. λ follows the gain ratio
    (`GainRatio`) and has no units. All this takes about two gradients for each step. Factors,
    length and trial are not paid for at every step.

    A step is tried by the loss of its batch:

    * Where the next update has the same batch, its own loss is the trial, and costs nothing. A step
      that did not lower it is taken back by that update.
    * Else the first three steps are tried before they are taken, by a forward pass. So is at least
      every fifth after them (`Momentum`), and one where the loss is alarming. A step that does not
      lower the loss is not taken. Steps between are taken untried.

    With ``step=Subspace()`` every step is tried before it is taken.

    ``gauss_newton(objective, solver=Eigenbasis())`` is for transformers on small batches. Rate and
    step rule are then those of `Eigenbasis`. Where one of them is given, the other stays.

    Each argument changes one thing. A number or a schedule for `damping` gives λ and leaves solver,
    step rule and the test of the loss as they are. The textbook's method takes full steps of
    :math:`\theta \leftarrow \theta - \eta\,(G + \lambda I)^{-1} u` by conjugate gradients. It is
    ``optax.chain(scale_by_gauss_newton(objective, λ), optax.scale_by_learning_rate(η))``.

    Metrics: ``damping`` (λ used), ``gain_ratio`` (the latest), ``accepted``, ``loss`` (at the
    parameters given), and those of solver, step rule and policy. ``accepted`` is false where a step
    was refused or taken back. A batch whose loss or gradient is not finite gives no step and leaves
    λ as it is.

    The update takes, beside ``batch``:

    * ``curvature_batch``: other data for G and for the linearised model of the step rule; the loss
      that accepts the step is that of `batch`;
    * ``all_params``: as in `scale_by_gauss_newton`.

    Args:
        objective: the problem.
        learning_rate: η, a number or a schedule, which multiplies the step that the rule found.
            ``"auto"`` is 0.3 with `Eigenbasis`, and 1 with other solvers.
        damping: λ: a number, a schedule of the count, or a policy. A number has the units of the
            curvature. The minimum of the default is for mini-batches. The gain ratio knows the
            batch and not the problem, and would let λ fall too far.
        solver: a record from `gnlin.solve`, or any `Solver`.
        step: how far to go along the direction of the solver, any `StepRule`. ``"auto"`` is
            ``Momentum(0.0, every=10, check=10)`` with `Eigenbasis`, which has a momentum of its
            own, and ``Momentum()`` with other solvers.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        ValueError, TypeError: an argument is out of its range, or a part lacks a method; at update:
            `params` or `batch` is missing.

    References: Schraudolph 2002; Martens & Grosse 2015 (the direction and the plane); Nielsen 1999
    (λ).

    Example:
        >>> import gnlin, jax, jax.numpy as jnp, optax
        >>> objective = gnlin.Objective.least_squares(lambda p: jnp.exp(p) - 2.0)
        >>> tx = gnlin.gauss_newton(objective)
        >>> params = jnp.zeros(1); state = tx.init(params); update = jax.jit(tx.update)
        >>> for _ in range(8):
        ...     updates, state = update(None, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(abs(params[0] - jnp.log(2.0)) < 1e-6)
        True
    """
    check_objective(objective)
    check_solver("solver", solver)
    learning_rate, rule = _chosen(solver, learning_rate, step)
    check_step_rule(rule)
    policy = policy_of(damping)
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate)
    lead, check = getattr(rule, "lead", None), getattr(rule, "check", 1)
    relative = getattr(policy, "relative", False)

    def init_fn(params):
        check_params(params, allow_holes=True)
        solver_state, solver_stats = begin("solver", solver, params)
        damping_state, damping_stats = begin("damping", policy, params)
        step_state, step_stats = begin("step", rule, params)
        zero = jnp.asarray(0.0, float)
        # The same names and dtypes from here on, so `jax.lax.scan` accepts the state.
        own = {"damping": zero, "gain_ratio": zero, "loss": zero, "accepted": jnp.asarray(False)}
        state = GaussNewtonState(
            count=jnp.zeros([], jnp.int32),
            solver=solver_state,
            damping=damping_state,
            step=step_state,
            memory=begin_memory(params) if lead else (),
            unit=zero if relative else (),
            metrics={**own, **solver_stats, **step_stats, **damping_stats},
        )
        return tree.copy(state)  # a buffer that appears twice could not be donated

    @shows_update
    def update_fn(
        updates,
        state,
        params: Params = None,
        *,
        batch=None,
        curvature_batch=None,
        all_params=None,
        **extra_args,
    ):
        del extra_args
        problem = problem_of_update(objective, params, all_params, state, init_fn)
        rate: Any = learning_rate(state.count) if callable(learning_rate) else learning_rate
        models = _models(problem, updates, params, batch, curvature_batch)
        value = models.loss.value

        past = past_of(policy, state.damping, state.memory, params, batch, value)
        last = None if past is None else past.last
        before = state.damping if past is None else past.damping
        damping, unit = policy.damping(before, state.count), ()
        if relative:
            factor, unit = _unit(models, updates is None, params, state.unit)
            damping = damping * factor

        rhs, gradient = lead(models.rhs, last) if lead else (models.rhs, models.rhs)
        solution, solver_state = solved(solver, models.curvature.system(damping), rhs, state.solver)
        direction, curvature = solution.direction, models.curvature
        search = Search(problem, models.data, curvature, damping, direction, models.rhs, rate, last)
        chosen = returned_step(rule.choose(search, state.step))

        outcome = try_step(policy, before, models, chosen, past, check, problem, params, batch)
        # Neither a batch that is not finite nor a rate of zero says anything about the damping.
        telling = jnp.isfinite(value) & chosen.sound & (jnp.asarray(rate) != 0)
        adapted = tree.select(telling & outcome.tried, outcome.damping, before)
        ends = settle(past, outcome, chosen, params, gradient, models, telling, state.metrics)
        own = tree.cast({"damping": damping, "gain_ratio": ends.gain_ratio, "loss": value}, float)
        metrics = {**own, **solution.stats, **chosen.stats, **ends.stats}
        # A loss that is not finite leaves no trace, nor does a place that is left again.
        step_state = state.step if chosen.state is None else chosen.state
        stays = jnp.isfinite(value) if past is None else jnp.isfinite(value) & ~past.back
        return ends.step, GaussNewtonState(
            count=optax.safe_increment(state.count),
            solver=_kept(stays, solver_state, state.solver),
            damping=adapted,
            # A refused step leaves zeros behind, so momentum begins anew.
            step=rule.remember(tree.select(stays, step_state, state.step), ends.step),
            memory=ends.memory,
            unit=unit,
            metrics=check_metrics({**metrics, "accepted": ends.accepted}, state.metrics),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@shows_signature
def scale_by_gauss_newton(
    objective: Objective, damping: Damping, *, solver: Solver = CG()
) -> optax.GradientTransformationExtraArgs:
    r"""Precondition the incoming updates by the damped Gauss-Newton matrix.

    .. math:: (G + \lambda I)\, d = u, \qquad G = J^\top H J,

    where u are the incoming updates. Clipping or weight decay placed before it in a chain is
    honoured. With ``updates=None`` u is the gradient on `batch`. Follow it by a learning rate. A
    full step with a small constant λ and a well-converged solve diverges on softmax losses. So a
    line search should follow, too, unless λ is large.

    The update takes, beside ``batch``:

    * ``curvature_batch``: other data for G (a smaller or an independent batch);
    * ``all_params``: the whole parameter tree, where `optax.masked` or `optax.partition` hides
      leaves. G is then that of the visible leaves, the others held fixed.

    Metrics: ``damping`` and those of the solver.

    Args:
        objective: the problem.
        damping: λ ≥ 0: a number, a schedule of the count, or a hyperparameter injected by Optax.
        solver: a record from `gnlin.solve` that solves the system, or any `Solver`. The direction
            of `Kronecker` has no length, and is for `gauss_newton`.

    Returns:
        An `optax.GradientTransformationExtraArgs`. A NaN batch gives a zero direction and a metric
        ``converged`` that is false, and nothing of it stays in the state.

    Raises:
        ValueError, TypeError: `damping` is negative, NaN or no number; `solver` gives a direction
            only; at update: `params` or `batch` is missing.

    Reference: Schraudolph 2002; Martens 2010.

    Example:
        >>> import gnlin, jax.numpy as jnp, optax
        >>> objective = gnlin.Objective.least_squares(lambda p: jnp.array([2.0, 1.0]) * p - 1)
        >>> solve = gnlin.scale_by_gauss_newton(objective, damping=0.0)
        >>> tx = optax.chain(solve, optax.scale_by_learning_rate(1.0))
        >>> params = jnp.zeros(2)
        >>> updates, _ = tx.update(objective.value_and_grad(params)[1], tx.init(params), params)
        >>> optax.apply_updates(params, updates).round(4)
        Array([0.5, 1. ], dtype=float32)
    """
    check_objective(objective)
    check_solver("solver", solver)
    check_solves("solver", solver)
    check_damping(damping)
    policy = Given(damping)

    def init_fn(params):
        check_params(params, allow_holes=True)
        solver_state, stats = begin("solver", solver, params)
        metrics = {"damping": jnp.asarray(0.0, float), **stats}
        return ScaleByGaussNewtonState(jnp.zeros([], jnp.int32), solver_state, metrics)

    @shows_update
    def update_fn(
        updates,
        state,
        params: Params = None,
        *,
        batch=None,
        curvature_batch=None,
        all_params=None,
        **extra_args,
    ):
        del extra_args
        problem = problem_of_update(objective, params, all_params, state, init_fn)
        damping = policy.damping((), state.count)
        models = _models(problem, updates, params, batch, curvature_batch)
        system = models.curvature.system(damping)
        solution, solver_state = solved(solver, system, models.rhs, state.solver)
        count = optax.safe_increment(state.count)
        metrics = check_metrics({"damping": damping, **solution.stats}, state.metrics)
        # Uphill, as a gradient: the learning rate that follows has the sign.
        return solution.direction, ScaleByGaussNewtonState(count, solver_state, metrics)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _kept(condition: jax.Array, after: Any, before: Any) -> Any:
    """One of two states of a solver."""
    # A choice by entries reads both, which takes time where a state is large. But it has a dtype
    # for a solver of a user's that widens its state.
    if jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, before):
        return jax.lax.cond(condition, lambda: after, lambda: before)
    return tree.select(condition, after, before)


def _chosen(solver: Solver, learning_rate: Any, step: Any) -> tuple[Any, Any]:
    """Learning rate and step rule, where they are left to the solver."""
    # The best length for a small batch is too long for the others. `Kronecker` meets that with λ,
    # and `Eigenbasis`, whose direction does not know λ, with a rate.
    by_eigenbasis = isinstance(solver, Eigenbasis)
    if isinstance(learning_rate, str) and learning_rate == "auto":
        learning_rate = 0.3 if by_eigenbasis else 1.0
    if isinstance(step, str) and step == "auto":
        step = Momentum(0.0, every=10, check=10) if by_eigenbasis else Momentum()
    return learning_rate, step


class _Models(NamedTuple):
    """The quadratic models of one update, and its right-hand side."""

    loss: QuadraticModel  # on the batch
    curvature: QuadraticModel  # on the batch of the curvature, the same unless another is given
    data: Batch  # that batch
    rhs: Params  # the incoming updates, or the gradient


def _models(
    objective: Objective,
    updates: Params | None,
    params: Params,
    batch: Batch,
    curvature_batch: Batch,
) -> _Models:
    if updates is not None:
        check_like_params("updates", updates, params, "pass the gradient at `params`")
    model = quadratic_model(objective, params, batch)
    curvature, data = model, batch
    if curvature_batch is not None:
        curvature, data = quadratic_model(objective, params, curvature_batch), curvature_batch
    # One linearisation serves gradient and products. Under jit, unused parts are never computed.
    rhs = model.gradient() if updates is None else updates
    return _Models(model, curvature, data, tree.cast_like(rhs, params))


def _unit(
    models: _Models, has_gradient: bool, params: Params, unit: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``(unit of λ now, unit to be kept)``; other updates than the gradient say nothing on it."""

    def gradient() -> Params:
        return models.rhs if has_gradient else models.loss.gradient()

    return damping_unit(unit, models.curvature, gradient, params)
