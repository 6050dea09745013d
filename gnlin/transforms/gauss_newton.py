"""Damped Gauss-Newton: (JᵀHJ + λI) d = updates, solved afresh at every step."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from gnlin import tree
from gnlin.checks import check_number
from gnlin.problem.curvature import LOSS_MODELS, QuadraticModel, quadratic_model
from gnlin.problem.objective import (
    Objective,
    check_like_params,
    check_objective,
    check_params,
    visible_objective,
)
from gnlin.solve import CG, Kronecker, Solution, Solver, System
from gnlin.solve.system import check_solver
from gnlin.transforms.damping import Damping, GainRatio, check_damping, damping_at, gain_ratio
from gnlin.transforms.step_length import Subspace
from gnlin.tree import Params


class ScaleByGaussNewtonState(NamedTuple):
    count: jax.typing.ArrayLike
    solver: Any  # what the solver carries, such as its last solution
    metrics: dict[str, jax.Array]


class GaussNewtonState(NamedTuple):
    count: jax.typing.ArrayLike
    solver: Any
    damping: Any  # λ and what its policy remembers; () where it is given
    last: Params  # the last step; () without momentum
    metrics: dict[str, jax.Array]


def scale_by_gauss_newton(
    objective: Objective, damping: Damping, *, solver: Solver = CG()
) -> optax.GradientTransformationExtraArgs:
    r"""Precondition the incoming updates by the damped Gauss-Newton matrix.

    .. math:: (G + \lambda I)\, d = u, \qquad G = J^\top H J,

    where u is whatever arrives: clipping or weight decay placed before it in a chain is honoured.
    With ``updates=None`` it is the gradient on `batch`. Follow it by a learning rate and, unless λ
    is large, by a line search: a full step with a small constant λ and a well-converged solve
    diverges on softmax losses.

    The update takes, beside ``batch``:

    * ``curvature_batch``: other data for G (a smaller or an independent batch);
    * ``all_params``: the whole parameter tree, where `optax.masked` or `optax.partition` hides
      leaves. G is then that of the visible leaves, the others held fixed.

    Metrics: ``damping`` and those of the solver.

    Args:
        objective: the problem.
        damping: λ ≥ 0: a number, a schedule of the count, or a hyperparameter injected by Optax.
        solver: a record from `gnlin.solve`. `Kronecker` does not solve the system: it gives a
            direction without a length, which is for `gauss_newton`.

    Returns:
        An `optax.GradientTransformationExtraArgs`. A NaN batch gives a zero direction and a metric
        ``converged`` that is false, and nothing of it stays in the state.

    Raises:
        ValueError, TypeError: `damping` is negative, NaN or no number; at update: `params` or
        `batch` is missing.

    Reference: Schraudolph 2002; Martens 2010.

    Example:
        >>> import gnlin, jax.numpy as jnp, optax
        >>> objective = gnlin.Objective.least_squares(lambda p: jnp.array([2.0, 1.0]) * p - 1)
        >>> tx = optax.chain(gnlin.scale_by_gauss_newton(objective, damping=0.0), optax.scale_by_learning_rate(1.0))
        >>> params = jnp.zeros(2)
        >>> updates, _ = tx.update(objective.value_and_grad(params)[1], tx.init(params), params)
        >>> optax.apply_updates(params, updates).round(4)
        Array([0.5, 1. ], dtype=float32)
    """
    check_objective(objective)
    check_solver("solver", solver)
    check_damping(damping)

    def init_fn(params):
        check_params(params, allow_holes=True)
        carry, stats = solver.init(params)
        return ScaleByGaussNewtonState(
            jnp.zeros([], jnp.int32), carry, {"damping": jnp.asarray(0.0, float), **stats}
        )

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
        problem = visible_objective(objective, params, all_params)
        check_params(params, allow_holes=True)
        strength = damping_at(damping, state.count)
        batches = (batch, curvature_batch)
        solution, carry, *_ = _direction(
            problem, solver, strength, updates, params, batches, state.solver
        )
        metrics = {"damping": strength, **solution.stats}
        return solution.step, ScaleByGaussNewtonState(
            optax.safe_increment(state.count), carry, metrics
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def gauss_newton(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    damping: Damping | GainRatio | None = None,
    *,
    solver: Solver | None = None,
    step: Subspace | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Damped Gauss-Newton descent, with defaults that are meant to be used as they are.

    ``gauss_newton(1.0, objective)`` takes the direction from `Kronecker` factors of the
    Gauss-Newton matrix, its length and some momentum from the linearised model (`Subspace`), and
    adapts λ to the `GainRatio`; a step that does not lower the loss of its batch is not taken. That
    is three to four gradients for each step.

    With a number or a schedule for `damping` it is the textbook's method, :math:`\theta \leftarrow
    \theta - \eta\,(G + \lambda I)^{-1} u`: `CG` solves the system, and every step is taken in full.
    A small constant λ then diverges on softmax losses.

    Metrics: ``damping``, those of the solver and of the step and, where λ is adapted,
    ``gain_ratio``, ``accepted`` and ``loss`` (at the old parameters). A batch whose loss or
    gradient is not finite gives no step and leaves λ as it is.

    Args:
        learning_rate: η, a number or a schedule; 1 is the full step.
        objective: the problem.
        damping: λ, a number, a schedule or a `GainRatio`. `None` is ``GainRatio(1e-2,
            minimum=1e-3)``: on mini-batches the gain ratio hears the batch and not the problem, and
            would let λ fall too far.
        solver: a record from `gnlin.solve`; `None` is `Kronecker` where λ is adapted and `CG` where
            it is given.
        step: how far to go along the solver's direction; `None` is `Subspace` where λ is adapted or
            the solver is `Kronecker`, and the full step otherwise.

    Returns:
        An `optax.GradientTransformationExtraArgs`; extra arguments as in `scale_by_gauss_newton`.

    Raises:
        ValueError, TypeError: as `scale_by_gauss_newton`.

    Example:
        >>> import gnlin, jax, jax.numpy as jnp, optax
        >>> objective = gnlin.Objective.least_squares(lambda p: jnp.exp(p) - 2.0)
        >>> tx = gnlin.gauss_newton(1.0, objective)
        >>> params = jnp.zeros(1); state = tx.init(params)
        >>> for _ in range(8):
        ...     updates, state = tx.update(None, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(abs(params[0] - jnp.log(2.0)) < 1e-6)
        True
    """
    adaptive = damping is None or isinstance(damping, GainRatio)
    policy: Any = GainRatio(1e-2, minimum=1e-3) if damping is None else damping
    chosen = solver if solver is not None else Kronecker() if adaptive else CG()
    rule = (
        step
        if step is not None
        else Subspace()
        if adaptive or isinstance(chosen, Kronecker)
        else None
    )
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate)
    if rule is None:
        return optax.chain(
            scale_by_gauss_newton(objective, policy, solver=chosen),
            optax.scale_by_learning_rate(learning_rate),
        )
    check_objective(objective)
    check_solver("solver", chosen)
    if isinstance(rule, type) or not (hasattr(rule, "init") and hasattr(rule, "choose")):
        raise TypeError(f"`step` must be a record such as gnlin.Subspace(); got {step!r}")
    if not adaptive:
        check_damping(damping)
    return _with_step(learning_rate, objective, policy, chosen, rule)


def _with_step(
    learning_rate, objective, policy, solver, rule
) -> optax.GradientTransformationExtraArgs:
    adaptive = isinstance(policy, GainRatio)

    def init_fn(params):
        check_params(params, allow_holes=True)
        carry, solver_stats = solver.init(params)
        last, step_stats = rule.init(params)
        zero = jnp.asarray(0.0, float)
        metrics = {"damping": zero, **solver_stats, **step_stats}
        if adaptive:
            metrics |= {"gain_ratio": zero, "loss": zero, "accepted": jnp.asarray(False)}
        return GaussNewtonState(
            jnp.zeros([], jnp.int32),
            carry,
            policy.init() if adaptive else (),
            tree.copy(last),
            tree.copy(metrics),
        )

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
        problem = visible_objective(objective, params, all_params)
        check_params(params, allow_holes=True)
        if rule.momentum:
            check_like_params("opt_state", state.last, params, "call `init` with these parameters")
        strength = state.damping.damping if adaptive else damping_at(policy, state.count)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        solution, carry, model, curvature, rhs = _direction(
            problem, solver, strength, updates, params, (batch, curvature_batch), state.solver
        )
        data = batch if curvature_batch is None else curvature_batch
        loss = LOSS_MODELS[rule.loss_model](problem, curvature.linear.outputs, data)
        chosen = rule.choose(curvature, loss, strength, solution.step, rhs, state.last, rate)
        step, metrics, damping = (
            chosen.step,
            {"damping": strength, **solution.stats, **chosen.stats},
            state.damping,
        )
        if adaptive:
            new_value = problem.value(tree.add(params, step), batch)
            ratio = gain_ratio(model.value, new_value, chosen.change, step, rhs)
            accepted = ratio > policy.accept
            metrics |= {
                "gain_ratio": ratio.astype(float),
                "loss": model.value.astype(float),
                "accepted": accepted,
            }
            step = tree.select(accepted, step, tree.zeros_like(step))
            # Neither a batch that is not finite nor a rate of zero says anything about the damping.
            telling = jnp.isfinite(model.value) & chosen.sound & (jnp.asarray(rate) != 0)
            damping = tree.select(telling, policy.update(damping, ratio), damping)
        last = step if rule.momentum else ()
        return step, GaussNewtonState(
            optax.safe_increment(state.count), carry, damping, last, metrics
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def solve_damped(
    model: QuadraticModel,
    solver: Solver,
    damping: chex.Numeric,
    rhs: Params,
    carry: Any,
    scaling: Params | None = None,
) -> tuple[Solution, Any]:
    """Solve (G + λD) d = rhs; a carry that is not finite is not kept."""
    system = System(model.linear.jvp, model.linear.vjp, model.hessian, damping, scaling)
    solution, new_carry = solver.solve(system, tree.cast_like(rhs, model.linear.anchor), carry)
    return solution, tree.select(tree.all_finite(new_carry), new_carry, carry)


def _direction(objective, solver, damping, updates, params, batches, carry):
    """``(solution, carry, model, model of the curvature, rhs)``; of two `batches` the curvature's may be `None`."""
    if updates is not None:
        check_like_params("updates", updates, params, "pass the gradient at `params`")
    batch, curvature_batch = batches
    model = quadratic_model(objective, params, batch)
    curvature = (
        model if curvature_batch is None else quadratic_model(objective, params, curvature_batch)
    )
    # The one linearisation serves gradient and products; what is not used is never computed under
    # jit.
    rhs = tree.cast_like(model.gradient() if updates is None else updates, params)
    return *solve_damped(curvature, solver, damping, rhs, carry), model, curvature, rhs
