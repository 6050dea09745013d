"""Levenberg-Marquardt: damped Gauss-Newton steps that are taken only when the loss agrees.

The flow is that of `gauss_newton`, with the full direction in place of a step rule. The model comes
from `problem/curvature.py`, the direction from `solve/`, and the acceptance from `damping`.
"""

from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from gnlin import tree
from gnlin.checks import check_metrics, check_number, check_positive, shows_signature, shows_update
from gnlin.jaxprs import primitive_names
from gnlin.problem.curvature import QuadraticModel, System, quadratic_model
from gnlin.problem.masking import problem_of_update
from gnlin.problem.objective import Objective, check_objective, check_params
from gnlin.solve import CG, RadiusSolver, Solution, Solver
from gnlin.solve.protocols import begin, check_solver, check_solves, solved
from gnlin.transforms.damping import (
    DampingPolicy,
    GainRatio,
    RadiusPolicy,
    TrustRegion,
    check_policy,
    judged,
)
from gnlin.transforms.gain import trial_of
from gnlin.tree import Batch, Params


class LevenbergMarquardtState(NamedTuple):
    count: jax.typing.ArrayLike
    damping: Any  # state of the policy: λ, or a radius
    scaling: Any  # largest diagonal of G so far, shaped like the parameters; () for the identity
    solver: Any
    metrics: dict[str, jax.Array]


@shows_signature
def levenberg_marquardt(
    objective: Objective,
    *,
    damping: float | DampingPolicy | TrustRegion | None = None,
    scaling: Literal["identity", "marquardt"] = "identity",
    solver: Solver = CG(),
    geodesic_acceleration: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Damped Gauss-Newton with real acceptance.

    Each update solves :math:`(G + \lambda D)\,\delta = -\nabla\ell(\theta)` at the current
    parameters. It compares the loss at θ + δ with the promise of the quadratic model. A step whose
    gain ratio is too small is rejected inside the update. The updates returned are then exact
    zeros, and the next step is shorter. Otherwise δ is returned. λ follows the gain ratio, by
    itself (`GainRatio`) or through a radius for the step (`TrustRegion`).

    The incoming updates are ignored; under `jit` the ignored gradient is never computed. The
    transform must stand last in a chain: scaling its step afterwards would undo the comparison. The
    batch of an update decides its acceptance, so use the full batch or a large one.

    Metrics: ``loss`` (at the parameters given), ``accepted``, ``gain_ratio``, ``damping`` (λ used),
    ``rejections`` (since the last accepted step) and those of the solver. A `TrustRegion` adds
    ``radius``. Acceleration adds ``acceleration``, its size relative to that of the step.
    Rejections say nothing about convergence; the gradient does.

    Args:
        objective: the problem.
        damping: the first λ (relative to the diagonal of G with ``scaling="marquardt"``), or a
            policy. A number stands for ``GainRatio(number)``. `TrustRegion` needs `Dense` and copes
            with poor starting values. `None` is ``TrustRegion()`` with `Dense` and
            ``GainRatio(1e-3)`` with other solvers.
        scaling: D. ``"identity"``, or ``"marquardt"``: the largest diagonal of G so far (Moré
            1978). It makes the iterates independent of the units of the parameters. The diagonal
            costs one push-forward for each parameter, so it is for small problems.
        solver: a record from `gnlin.solve` that solves the system, or any `Solver`; `Dense` for
            small classical problems.
        geodesic_acceleration: largest size, relative to the step, of a second-order correction
            along the step; 0.75 is usual, `None` is none. It costs a second solve and needs a model
            with forward-mode derivatives.

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
        >>> start = jnp.array([-1.2, 1.0])
        >>> params, info = gnlin.minimise(rosenbrock, start, tx, max_steps=50, tol=1e-6)
        >>> params.round(4)
        Array([1., 1.], dtype=float32)
    """
    check_objective(objective)
    check_solver("solver", solver)
    check_solves("solver", solver)
    policy = _policy(damping, solver)
    if scaling not in ("identity", "marquardt"):
        raise ValueError(f'`scaling` must be "identity" or "marquardt"; got {scaling!r}')
    if geodesic_acceleration is not None:
        check_number("geodesic_acceleration", geodesic_acceleration)

    def init_fn(params):
        check_params(params, allow_holes=True)
        solver_state, solver_stats = begin("solver", solver, params)
        damping_state, damping_stats = begin("damping", policy, params)
        zero = jnp.asarray(0.0, float)
        metrics = {
            "loss": zero,
            "accepted": jnp.asarray(False),
            "gain_ratio": zero,
            "damping": zero,
            "rejections": jnp.zeros([], jnp.int32),
            **({} if geodesic_acceleration is None else {"acceleration": zero}),
            **damping_stats,
            **solver_stats,
        }
        largest: Any = ()
        if scaling == "marquardt":
            largest = tree.zeros_like(params, tree.accumulation_dtype(params))
        count = jnp.zeros([], jnp.int32)
        state = LevenbergMarquardtState(count, damping_state, largest, solver_state, metrics)
        return tree.copy(state)  # a buffer that appears twice could not be donated

    @shows_update
    def update_fn(
        updates, state, params: Params = None, *, batch=None, all_params=None, **extra_args
    ):
        del updates, extra_args
        problem = problem_of_update(objective, params, all_params, state, init_fn)
        model = quadratic_model(problem, params, batch)
        rhs = model.gradient()
        largest, diagonal = state.scaling, None
        if scaling == "marquardt":
            largest = jax.tree.map(jnp.maximum, largest, _ggn_diagonal(model))
            # A parameter without influence so far is damped as if its diagonal were 1.
            diagonal = jax.tree.map(lambda d: jnp.where(d > 0, d, 1), largest)
        solved = _solve(policy, solver, model, rhs, diagonal, params, state)
        # The right-hand side is +∇ℓ, so the solution leads uphill.
        step = tree.scale(-1, solved.solution.direction)
        metrics = {}
        if geodesic_acceleration is not None:
            system = model.system(solved.damping, diagonal)
            correction, size = _acceleration(problem, model, batch, step, solver, system)
            # Too large a correction says that the expansion along the step does not hold.
            step = tree.select(size <= geodesic_acceleration, tree.add(step, correction), step)
            metrics["acceleration"] = size.astype(float)

        new_value = problem.value(tree.add(params, step), batch)
        # Of the part that the radius bounds: the correction is not in it.
        length = _length(solved.solution.direction, diagonal)
        # The prediction leaves λ out: both decreases are those of the loss.
        change = model.change(step)
        trial = trial_of(model.value, new_value, change, step, rhs, length, solved.radius)
        adapted, accepted, damping_stats = judged(policy, state.damping, trial)
        # A loss or gradient that is not finite here is the fault of the batch and not of the step:
        # the state stays as it is.
        sound = jnp.isfinite(model.value) & tree.all_finite(rhs)
        metrics |= {
            "loss": model.value.astype(float),
            "accepted": accepted,
            "gain_ratio": trial.gain_ratio.astype(float),
            "damping": jnp.asarray(solved.damping, float),
            "rejections": jnp.where(accepted, 0, state.metrics["rejections"] + 1),
            **damping_stats,
            **solved.solution.stats,
        }
        taken = tree.select(accepted, step, tree.zeros_like(step))
        return taken, LevenbergMarquardtState(
            count=optax.safe_increment(state.count),
            damping=tree.select(sound, adapted, state.damping),
            scaling=tree.select(sound & tree.all_finite(largest), largest, state.scaling),
            solver=solved.state,
            metrics=check_metrics(metrics, state.metrics),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _policy(damping: Any, solver: Solver) -> Any:
    """The policy that the argument `damping` stands for with this solver."""
    if damping is None:
        return TrustRegion() if isinstance(solver, RadiusSolver) else GainRatio(1e-3)
    if isinstance(damping, RadiusPolicy):
        if not isinstance(solver, RadiusSolver):
            name = type(damping).__name__
            raise TypeError(
                f"`damping={name}(...)` needs a solver that finds λ from a radius, such as "
                f"gnlin.Dense(); got {solver!r}. Take `Dense`, or a number for `damping`"
            )
        return damping
    if isinstance(damping, (bool, int, float)) or hasattr(damping, "dtype"):
        check_positive("damping", damping)
        return GainRatio(damping)
    # A schedule, or a class.
    if callable(damping):
        raise TypeError(
            "`damping` must be the first λ or a policy such as gnlin.GainRatio(1e-3): λ then "
            f"follows the gain ratio, and no schedule; got {damping!r}"
        )
    check_policy(damping)
    if getattr(damping, "relative", False):
        raise ValueError("`damping` must be absolute here; `relative` is for gnlin.gauss_newton")
    return damping


class _Solved(NamedTuple):
    """The solve of one update."""

    solution: Solution
    state: Any  # the solver's
    damping: chex.Numeric  # λ, given or found
    radius: chex.Numeric  # Δ


def _solve(policy, solver, model, rhs, diagonal, params, state) -> _Solved:
    """Solve with the λ of the policy, or with the least one that keeps within its radius."""
    if isinstance(policy, RadiusPolicy):
        radius = policy.bound(state.damping, _length(params, diagonal))
        system = model.system(0.0, diagonal)
        solution, solver_state, damping = solver.solve_within(system, rhs, state.solver, radius)
        return _Solved(solution, solver_state, damping, radius)
    damping = policy.damping(state.damping, state.count)
    system = model.system(damping, diagonal)
    solution, solver_state = solved(solver, system, rhs, state.solver)
    return _Solved(solution, solver_state, damping, jnp.inf)


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
        return tree.inner(column, model.output_hessian(column)).astype(dtype)

    diagonal = jax.vmap(entry)(jnp.eye(tree.size(anchor), dtype=dtype))
    # G is positive semi-definite: below 0 there is only rounding.
    return tree.unflatten(jnp.maximum(diagonal, 0), tree.zeros_like(anchor, dtype))


def _acceleration(
    objective: Objective,
    model: QuadraticModel,
    batch: Batch,
    velocity: Params,
    solver: Solver,
    system: System,
) -> tuple[Params, jax.Array]:
    """``(½a, 2‖a‖/‖v‖)`` with (G + λD) a = −JᵀH ∂²f[v, v].

    The right-hand side is the curvature of the path of the model along v.
    """
    anchor = model.linear.anchor

    def outputs(params):
        return objective.outputs_and_aux(params, batch)[0]

    # JAX would fail at the derivatives below, with an error that does not name the option.
    names = primitive_names(jax.make_jaxpr(outputs)(anchor).jaxpr)
    if any(name.startswith("custom_vjp_call") for name in names):
        raise TypeError(
            "`geodesic_acceleration` needs forward-mode derivatives, and `model` has a custom_vjp; "
            "use None"
        )

    def push_forward(params):
        return jax.jvp(outputs, (params,), (velocity,))[1]

    # ∂²f[v, v]: the derivative along v of the push-forward of v.
    bend = jax.jvp(push_forward, (anchor,), (velocity,))[1]
    rhs = tree.scale(-1, model.linear.vjp(model.output_hessian(bend)))
    # With a fresh state: the one of the update belongs to the first system.
    solution, _ = solved(solver, system, rhs, solver.init(anchor)[0])
    length = tree.norm(velocity)
    # 2‖a‖/‖v‖, the ratio of Transtrum & Sethna, for a step v + ½a.
    size = 2 * tree.norm(solution.direction) / jnp.where(length > 0, length, 1)
    return tree.scale(0.5, solution.direction), size
