"""Levenberg-Marquardt: damped Gauss-Newton steps that are taken only when the loss agrees."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlin import tree
from gnlin.jaxprs import primitive_names
from gnlin.problem.curvature import QuadraticModel, quadratic_model
from gnlin.problem.objective import Objective, check_objective, check_params, visible_objective
from gnlin.solve import CG, RadiusSolver, Solver, System
from gnlin.solve.system import check_solver
from gnlin.transforms.damping import (
    DampingState,
    GainRatio,
    RadiusState,
    Trial,
    TrustRegion,
    check_number,
    check_positive,
    gain_ratio,
)
from gnlin.transforms.gauss_newton import solve_damped
from gnlin.tree import Batch, Params


class LevenbergMarquardtState(NamedTuple):
    count: jax.typing.ArrayLike
    damping: DampingState | RadiusState
    scaling: (
        Any  # largest diagonal of G seen so far, shaped like the parameters; () for the identity
    )
    solver: Any
    metrics: dict[str, jax.Array]


def levenberg_marquardt(
    objective: Objective,
    *,
    initial_damping: float | GainRatio | TrustRegion | None = None,
    scaling: Literal["identity", "marquardt"] = "identity",
    solver: Solver = CG(),
    geodesic_acceleration: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Damped Gauss-Newton with real acceptance.

    Each update solves :math:`(G + \lambda D)\,\delta = -\nabla\ell(\theta)` at the current
    parameters and compares the loss at θ + δ with what the quadratic model promised. A step whose
    gain ratio is too small is rejected inside the update: the updates returned are exact zeros, and
    the next step is shorter. Otherwise δ is returned. λ follows the gain ratio, by itself
    (`GainRatio`) or through a radius for the step (`TrustRegion`). The incoming updates are
    ignored, and the transform must stand last in a chain: scaling its step afterwards would undo
    the comparison. Under `jit` the ignored gradient is never computed.

    The batch of an update decides its acceptance, so use the full batch or a large one.

    Metrics: ``loss`` (at the parameters given), ``accepted``, ``gain_ratio``, ``damping`` (λ used),
    ``rejections`` (since the last accepted step), those of the solver, with a `TrustRegion`
    ``radius`` and with acceleration ``acceleration`` (its size relative to the step's). Rejections
    say nothing about convergence; the gradient does.

    Args:
        objective: the problem.
        initial_damping: first λ (relative to the diagonal of G with ``scaling="marquardt"``), or a
            policy: `GainRatio`, which a number stands for, or `TrustRegion`, which needs `Dense`
            and copes with poor starting values. `None` is ``TrustRegion()`` with `Dense` and
            ``GainRatio(1e-3)`` with other solvers.
        scaling: D. ``"identity"``, or ``"marquardt"``: the largest diagonal of G seen so far, which
            makes the iterates independent of the units of the parameters (Moré 1978). The diagonal
            costs one push-forward for each parameter, so it is for small problems.
        solver: a record from `gnlin.solve`; `Dense` for small classical problems.
        geodesic_acceleration: largest size, relative to the step, of a second-order correction
            along the step, 0.75 being usual; `None` for none. It costs a second solve and needs a
            model with forward-mode derivatives.

    Returns:
        An `optax.GradientTransformationExtraArgs`; `update` takes ``batch`` and ``all_params``.

    Raises:
        ValueError, TypeError: an argument is out of its range; at update: `params` or `batch` is
        missing.

    References: Levenberg 1944; Marquardt 1963; Moré, The Levenberg-Marquardt algorithm:
    implementation and theory, 1978; Nielsen 1999; Transtrum & Sethna, arXiv 1201.5885
    (acceleration).

    Example:
        >>> import gnlin, jax.numpy as jnp, optax
        >>> rosenbrock = gnlin.Objective.least_squares(
        ...     lambda p: jnp.stack([10 * (p[1] - p[0] ** 2), 1 - p[0]]))
        >>> tx = gnlin.levenberg_marquardt(rosenbrock, solver=gnlin.Dense())
        >>> params, info = gnlin.minimise(rosenbrock, jnp.array([-1.2, 1.0]), tx, max_steps=50, tol=1e-6)
        >>> params.round(4)
        Array([1., 1.], dtype=float32)
    """
    check_objective(objective)
    check_solver("solver", solver)
    policy = _policy(initial_damping, solver)
    if scaling not in ("identity", "marquardt"):
        raise ValueError(f'`scaling` must be "identity" or "marquardt"; got {scaling!r}')
    if geodesic_acceleration is not None:
        check_number("geodesic_acceleration", geodesic_acceleration)

    def init_fn(params):
        check_params(params, allow_holes=True)
        carry, stats = solver.init(params)
        zero = jnp.asarray(0.0, float)
        metrics = {
            "loss": zero,
            "accepted": jnp.asarray(False),
            "gain_ratio": zero,
            "damping": zero,
            "rejections": jnp.zeros([], jnp.int32),
            **({"radius": zero} if isinstance(policy, TrustRegion) else {}),
            **({"acceleration": zero} if geodesic_acceleration is not None else {}),
            **stats,
        }
        metrics = tree.copy(metrics)
        largest = (
            tree.zeros_like(params, tree.accumulation_dtype(params))
            if scaling == "marquardt"
            else ()
        )
        return LevenbergMarquardtState(
            jnp.zeros([], jnp.int32), policy.init(), largest, carry, metrics
        )

    def update_fn(
        updates, state, params: Params = None, *, batch=None, all_params=None, **extra_args
    ):
        del updates, extra_args
        problem = visible_objective(objective, params, all_params)
        model = quadratic_model(problem, params, batch)
        largest, diagonal = state.scaling, None
        if scaling == "marquardt":
            largest = jax.tree.map(jnp.maximum, largest, _ggn_diagonal(model))
            # A parameter without influence so far is damped as if its diagonal were 1.
            diagonal = jax.tree.map(lambda d: jnp.where(d > 0, d, 1), largest)

        rhs = model.gradient()
        extra_metrics = {}
        if isinstance(policy, TrustRegion) and isinstance(solver, RadiusSolver):
            radius = policy.bound(state.damping, _length(params, diagonal))
            system = System(model.linear.jvp, model.linear.vjp, model.hessian, 0.0, diagonal)
            solution, carry, strength = solver.solve_within(system, rhs, state.solver, radius)
            extra_metrics["radius"] = radius
        else:
            strength = state.damping.damping
            solution, carry = solve_damped(model, solver, strength, rhs, state.solver, diagonal)
        step = tree.scale(-1, solution.step)
        if geodesic_acceleration is not None:
            correction, size = _acceleration(
                problem, model, batch, step, solver, strength, diagonal
            )
            step = tree.select(size <= geodesic_acceleration, tree.add(step, correction), step)
            extra_metrics["acceleration"] = size.astype(float)

        new_value = problem.value(tree.add(params, step), batch)
        ratio = gain_ratio(model.value, new_value, model.change(step), step, rhs)
        if isinstance(policy, TrustRegion):
            trial = Trial(
                ratio,
                model.value - new_value,
                tree.inner(rhs, step),
                _length(solution.step, diagonal),
                radius,
            )
            adapted = policy.update(state.damping, trial)
        else:
            adapted = policy.update(state.damping, ratio)
        accepted = ratio > policy.accept
        # A loss or gradient that is not finite here is the batch's fault, not the step's: the state
        # stays as it is.
        sound = jnp.isfinite(model.value) & tree.all_finite(rhs)
        damping = tree.select(sound, adapted, state.damping)
        largest = tree.select(sound & tree.all_finite(largest), largest, state.scaling)
        metrics = {
            "loss": model.value.astype(float),
            "accepted": accepted,
            "gain_ratio": ratio.astype(float),
            "damping": strength.astype(float),
            "rejections": jnp.where(accepted, 0, state.metrics["rejections"] + 1),
            **extra_metrics,
            **solution.stats,
        }
        step = tree.select(accepted, step, tree.zeros_like(step))
        return step, LevenbergMarquardtState(
            optax.safe_increment(state.count), damping, largest, carry, metrics
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _policy(initial_damping, solver: Solver) -> GainRatio | TrustRegion:
    if initial_damping is None:
        return TrustRegion() if isinstance(solver, RadiusSolver) else GainRatio(1e-3)
    if isinstance(initial_damping, TrustRegion) and not isinstance(solver, RadiusSolver):
        raise TypeError(
            f"`initial_damping=TrustRegion(...)` needs a solver that finds λ from a radius, such as gnlin.Dense(); "
            f"got {solver!r}. Take `Dense`, or a number for `initial_damping`"
        )
    if isinstance(initial_damping, (GainRatio, TrustRegion)):
        return initial_damping
    check_positive("initial_damping", initial_damping)
    return GainRatio(initial_damping)


def _length(step: Params, diagonal: Params | None) -> jax.Array:
    """‖D^½ δ‖."""
    if diagonal is None:
        return tree.norm(step)
    return tree.norm(jax.tree.map(lambda d, v: jnp.sqrt(d) * v.astype(d.dtype), diagonal, step))


def _ggn_diagonal(model: QuadraticModel) -> Params:
    """diag(JᵀHJ): entry i is <Je_i, HJe_i>, by one push-forward for each parameter."""
    anchor = model.linear.anchor
    dtype = tree.accumulation_dtype(anchor)

    def entry(basis_vector):
        column = model.linear.jvp(tree.cast_like(tree.unflatten(basis_vector, anchor), anchor))
        return tree.inner(column, model.hessian(column)).astype(dtype)

    diagonal = jax.vmap(entry)(jnp.eye(tree.size(anchor), dtype=dtype))
    return tree.unflatten(jnp.maximum(diagonal, 0), tree.zeros_like(anchor, dtype))


def _acceleration(
    objective: Objective,
    model: QuadraticModel,
    batch: Batch,
    velocity: Params,
    solver: Solver,
    damping,
    scaling,
) -> tuple[Params, jax.Array]:
    """``(½a, 2|a|/|v|)`` with (G + λD) a = −JᵀH ∂²f[v, v], the curvature of the model's path along v."""
    anchor = model.linear.anchor

    def outputs(params):
        return objective.outputs_and_aux(params, batch)[0]

    if any(
        name.startswith("custom_vjp_call")
        for name in primitive_names(jax.make_jaxpr(outputs)(anchor).jaxpr)
    ):
        raise TypeError(
            "`geodesic_acceleration` needs forward-mode derivatives, and `model` has a custom_vjp; use None"
        )

    def push_forward(params):
        return jax.jvp(outputs, (params,), (velocity,))[1]

    bend = jax.jvp(push_forward, (anchor,), (velocity,))[1]
    rhs = tree.scale(-1, model.linear.vjp(model.hessian(bend)))
    solution, _ = solve_damped(model, solver, damping, rhs, solver.init(anchor)[0], scaling)
    length = tree.norm(velocity)
    size = 2 * tree.norm(solution.step) / jnp.where(length > 0, length, 1)
    return tree.scale(0.5, solution.step), size
