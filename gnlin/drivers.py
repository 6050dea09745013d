"""Running a deterministic problem to convergence.

`minimise` gives JAXopt's loop the update of any transform. Through the solution it differentiates
with the Hessian, in `_solve_hessian`.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlin import tree
from gnlin.checks import check_integer, check_number, check_transformation, shows_signature
from gnlin.problem.objective import Objective, check_objective, check_params
from gnlin.solve.dense import materialise
from gnlin.tree import Batch, Params

with warnings.catch_warnings():
    # JAXopt announces at import that it is no longer developed; it is depended on for what it is.
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt
    from jaxopt.linear_solve import solve_cg


class MinimiseInfo(NamedTuple):
    """The report of `minimise`.

    Attributes:
        steps: updates done, int32.
        value: loss at the parameters returned.
        gradient_norm: Euclidean norm of the gradient there.
        converged: whether `gradient_norm` is at most `tol`.
        opt_state: the optimiser's last state, for `gnlin.metrics`.
    """

    steps: jax.Array
    value: jax.Array
    gradient_norm: jax.Array
    converged: jax.Array
    opt_state: Any


@shows_signature
def minimise(
    objective: Objective,
    params: Params,
    tx: optax.GradientTransformation,
    *,
    batch: Batch = None,
    max_steps: int,
    tol: float,
    implicit_diff: bool = True,
) -> tuple[Params, MinimiseInfo]:
    r"""Run an optimiser on one batch until the gradient vanishes.

    It is a thin driver over `jaxopt.OptaxSolver`, compiled as one loop: for curve fits, full-batch
    training. With `implicit_diff` the result is differentiable with respect to `batch`, by the
    implicit function theorem:

    .. math:: \partial\theta^\star = -(\nabla^2_{\theta\theta}\ell)^{-1}\,
              \nabla^2_{\theta,\text{batch}}\ell\;\partial\text{batch}.

    The cost does not grow with the number of steps. The solution must be a strict minimum, solved
    accurately. The Hessian is formed and factorised up to 1000 parameters; beyond, conjugate
    gradients solve with it.

    Every call compiles the loop anew, so wrap repeated calls in one `jax.jit`.

    Args:
        objective: the problem.
        params: where to start.
        tx: any Optax optimiser, of this package or not. It receives ``batch``, ``value``, ``grad``
            and ``value_fn``.
        batch: the data; not needed where the objective is bound. Differentiate with respect to this
            argument, for data inside a bound objective is a constant.
        max_steps: most updates.
        tol: stop once the Euclidean norm of the gradient is at most this; with 0 only a gradient of
            exact zeros stops.
        implicit_diff: whether to differentiate through the solution; `False` cuts the derivative.

    Returns:
        ``(params, info)``, see `MinimiseInfo`. Not reaching `tol` is no error: check
            ``info.converged``.
        ``info.converged``.

    Raises:
        ValueError, TypeError: `max_steps` or `tol` is out of range; `batch` is missing.

    Reference: Blondel et al., Efficient and modular implicit differentiation, arXiv 2105.15183.

    Example:
        >>> import gnlin, jax, jax.numpy as jnp
        >>> objective = gnlin.Objective.least_squares(lambda p, batch: batch["y"] - p * batch["x"])
        >>> tx = gnlin.levenberg_marquardt(objective)
        >>> def slope(y):
        ...     batch = {"x": jnp.array([1.0, 2.0]), "y": y}
        ...     params, _ = gnlin.minimise(
        ...         objective, jnp.zeros(1), tx, batch=batch, max_steps=20, tol=1e-5)
        ...     return params[0]
        >>> slopes = jax.grad(slope)(jnp.array([1.0, 2.0]))   # x / Σx²
        >>> [round(float(value), 4) for value in slopes]
        [0.2, 0.4]
    """
    check_objective(objective)
    check_transformation("tx", tx)
    check_params(params)
    objective.check_batch(batch)
    check_integer("max_steps", max_steps)
    check_number("tol", tol)
    tx = optax.with_extra_args_support(tx)

    def run(init, batch):
        def update(updates, state, params=None):
            # The driver hands over gradients alone; under its jit the value is the one it computed
            # already.
            extra = {
                "value": objective.value(params, batch),
                "grad": updates,
                "value_fn": objective.value,
            }
            step, state = tx.update(updates, state, params, batch=batch, **extra)
            # The driver checks the gradient only after the update that used it. Where it was small
            # enough, the parameters stay.
            done = tree.norm(updates) <= tol
            return tree.select(done, tree.zeros_like(step), step), state

        solver = jaxopt.OptaxSolver(
            fun=lambda params: objective.value(params, batch),
            opt=optax.GradientTransformation(tx.init, update),
            maxiter=int(max_steps),
            tol=tol,
            implicit_diff=False,
            unroll=False,
        )
        return solver.run(init)

    if implicit_diff:
        # The optimality condition is ∇ℓ = 0, and its Jacobian in the parameters is the Hessian.
        run = jaxopt.implicit_diff.custom_root(
            jax.grad(objective.value), has_aux=True, solve=_solve_hessian
        )(run)
    solution, state = run(params, batch)
    if not implicit_diff:
        # A while loop has no reverse mode, so the derivative is cut.
        solution, state = jax.lax.stop_gradient((solution, state))
    value, grads = jax.value_and_grad(objective.value)(solution, batch)
    gradient_norm = tree.norm(grads)
    return solution, MinimiseInfo(
        state.iter_num, value, gradient_norm, gradient_norm <= tol, state.internal_state
    )


# A float64 Hessian of this size is 8 MB, and factorising it takes less time than conjugate
# gradients would.
_LARGEST_DENSE = 1000


def _solve_hessian(matvec: Callable[[Params], Params], rhs: Params) -> Params:
    """Solve with the Hessian at a minimum.

    It is symmetric and positive definite, and its diagonal is often of many magnitudes.
    """
    dtype = tree.accumulation_dtype(rhs)
    if tree.size(rhs) > _LARGEST_DENSE:
        # Tighter than the driver's default, which is meant for well-scaled systems.
        return solve_cg(matvec, rhs, tol=10 * float(jnp.finfo(dtype).eps), maxiter=tree.size(rhs))
    hessian = materialise(matvec, rhs, dtype)
    size = jnp.sqrt(jnp.abs(jnp.diag(hessian)))
    unit = jnp.where(size > 0, size, 1)
    # With a diagonal of ones the solution does not depend on the units of the parameters.
    scaled = jnp.linalg.solve(
        hessian / unit[:, None] / unit[None, :], tree.flatten(rhs, dtype) / unit
    )
    return tree.unflatten(scaled / unit, rhs)
