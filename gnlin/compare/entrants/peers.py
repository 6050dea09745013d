"""Optimisers of other libraries, as they ship, driven through `Method`.

No library is imported before it is asked for. Every step can be traced, so that one compilation
serves a grid. Work is counted from the compiled program and from the turns of its loops.
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from gnlin import tree
from gnlin.compare.entrants.contestant import Options
from gnlin.compare.entrants.method import Method
from gnlin.compare.tasks.task import Task
from gnlin.tree import Batch, Params


def output_shapes(task: Task) -> Any:
    """Shapes of the residuals of a batch where there are any, otherwise of the model's outputs."""

    def outputs(params, batch):
        if task.residuals is not None:
            return task.residuals(params, batch)
        return task.objective.outputs_and_aux(params, batch)[0]

    batch = task.batch_shapes(task.batch_size or task.train_size)
    return jax.eval_shape(outputs, task.params_shapes(), batch)


# Somax: https://github.com/cor3bit/somax.


def somax_sgn(task: Task, options: Options) -> Method:
    """Damped Gauss-Newton by warm-started conjugate gradients, with the limits of its README."""
    solver = {"tol": options.get("rtol", 1e-4), "maxiter": options.get("max_iterations", 20)}
    return _somax("sgn", task, options, **solver)


def somax_egn(task: Task, options: Options) -> Method:
    """Damped Gauss-Newton by a Cholesky factorisation with a row for each output of the batch.

    On softmax, version 1.0.1 does not solve the Gauss-Newton system. It factorises the curvature of
    the loss as LLᵀ and uses LᵀL in its place. Its steps on squared loss are exact.
    """
    return _somax("egn", task, options)


def _somax(name: str, task: Task, options: Options, **solver: Any) -> Method:
    """A method of somax.

    Least squares with M residuals r become one regression of √M r on zero. The loss of somax, ½ the
    mean of the squares, is then ½ Σ r².
    """
    somax = importlib.import_module("somax")
    squared = task.residuals is not None
    adapts = options.get("control", "constant") == "trust-region"

    def predict(params, batch):
        if not task.residuals:
            return task.objective.outputs_and_aux(params, batch)[0]
        residuals = ravel_pytree(task.residuals(params, batch))[0]
        return math.sqrt(residuals.size) * residuals

    method = getattr(somax, f"{name}_{'mse' if squared else 'ce'}")(
        predict_fn=predict,
        learning_rate=options["learning_rate"],
        lam_policy="trust_region" if adapts else "const",
        record_rho_every_k=1 if adapts else -1,
        **solver,
    )

    def init(params, batch, key):
        state = method.init(params)
        damping = jnp.asarray(options["damping"], state.damp_state.lam.dtype)
        return state.replace(damp_state=state.damp_state.replace(lam=damping))

    def step(params, state, batch, key):
        targets = jnp.zeros_like(jax.eval_shape(predict, params, batch)) if squared else batch["y"]
        return method.step(params, {"x": batch, "y": targets}, state, key)[:2]

    return Method(init, step)


# Kfac-jax: https://github.com/google-deepmind/kfac-jax.

_DAMPING_PERIOD = 5  # its default


def kfac(task: Task, options: Options) -> Method:
    """K-FAC that adapts damping, momentum and learning rate as in its README, without burn-in.

    Tuned: first damping. It wants the count of steps in Python, and uses it only to decide whether
    damping is due. So a conditional between two staged steps can be traced.
    """
    kfac_jax = importlib.import_module("kfac_jax")

    def loss(params, batch):
        if not task.residuals:
            logits = task.objective.outputs_and_aux(params, batch)[0]
            kfac_jax.register_softmax_cross_entropy_loss(logits, batch["y"])
            return task.objective.loss_of(logits, batch)
        (residuals,) = jax.tree.leaves(task.residuals(params, batch))
        errors = math.sqrt(len(residuals)) * residuals
        kfac_jax.register_squared_error_loss(errors, jnp.zeros_like(errors), weight=0.5)
        return 0.5 * jnp.square(errors).sum() / len(errors)

    optimizer = kfac_optimizer(loss)

    def init(params, batch, key):
        state = optimizer.init(params, key, batch)
        state.damping = jnp.asarray(options["damping"], state.damping.dtype)
        return state

    def step(params, state, batch, key):
        # This finds the layers, for an instance whose `init` is not used.
        jax.eval_shape(optimizer.init, params, key, batch)

        def staged(count, params, state):
            return optimizer.step(params, state, key, batch=batch, global_step_int=count)[:2]

        due = (state.step_counter + 1) % _DAMPING_PERIOD == 0
        adapting = functools.partial(staged, _DAMPING_PERIOD - 1)
        ordinary = functools.partial(staged, _DAMPING_PERIOD)
        return jax.lax.cond(due, adapting, ordinary, params, state)

    return Method(init, step)


def kfac_optimizer(loss: Callable[[Params, Batch], jax.Array]) -> Any:
    """The optimiser of kfac-jax for a loss, with everything adapted."""
    return importlib.import_module("kfac_jax").Optimizer(
        jax.value_and_grad(loss),
        l2_reg=0.0,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=1.0,
        damping_adaptation_interval=_DAMPING_PERIOD,
        num_burnin_steps=0,
    )


# Optimistix: https://docs.kidger.site/optimistix.


def optimistix_gn(task: Task, options: Options) -> Method:
    """Undamped Gauss-Newton steps of a fixed length, 1 by default; by QR where J is small."""
    optimistix, equinox = importlib.import_module("optimistix"), importlib.import_module("equinox")
    parameters, rows = tree.size(task.params_shapes()), tree.size(output_shapes(task))
    dense = _is_dense(options, min(parameters, rows) <= 1024 and parameters * rows <= 2**24)
    solver = optimistix.GaussNewton(0.0, 0.0, linear_solver=_linear_solver(options, dense))
    rate = jnp.asarray(options["learning_rate"], float)
    solver = equinox.tree_at(lambda solver: solver.search.learning_rate, solver, rate)
    # A dense Jacobian takes a product for each of its columns forwards, of its rows backwards.
    return _optimistix(task, solver, jac="bwd" if dense and rows < parameters else "fwd")


def optimistix_lm(task: Task, options: Options) -> Method:
    """Levenberg-Marquardt; tuned: first λ, the inverse of its step size, which is 1 by default.

    By QR, its default, where the square matrix of √λ below the Jacobian is small.
    """
    optimistix, equinox = importlib.import_module("optimistix"), importlib.import_module("equinox")
    dense = _is_dense(options, tree.size(task.params_shapes()) <= 512)
    solver = optimistix.LevenbergMarquardt(0.0, 0.0, linear_solver=_linear_solver(options, dense))

    def start(state):
        size = jnp.asarray(1 / options["damping"], float)
        return equinox.tree_at(lambda state: state.search_state.step_size, state, size)

    return _optimistix(task, solver, start)


def _is_dense(options: Options, small: bool) -> bool:
    return {"auto": small, "qr": True, "cg": False}[options.get("solver", "auto")]


def _linear_solver(options: Options, dense: bool) -> Any:
    """QR, or conjugate gradients on JᵀJ, or on JJᵀ where residuals are fewer than unknowns."""
    lineax = importlib.import_module("lineax")
    if dense:
        return lineax.QR()
    limits = {
        "rtol": options.get("rtol", 1e-3),
        "atol": 1e-8,
        "max_steps": options.get("max_iterations", 100),
    }
    if hasattr(lineax, "Normal"):
        return lineax.Normal(lineax.CG(**limits))
    return lineax.NormalCG(**limits)  # older versions


def _optimistix(
    task: Task,
    solver: Any,
    start: Callable[[Any], Any] = lambda state: state,
    jac: str = "fwd",
) -> Method:
    """A method of optimistix. The first step evaluates and does not move.

    The tolerances of the solver are zero, so that a run ends with its budget.
    """
    equinox = importlib.import_module("equinox")
    residuals: Any = task.residuals

    def with_aux(params, batch):
        return residuals(params, batch), None

    def begin(params, batch):
        shapes = jax.eval_shape(residuals, params, batch)
        return start(solver.init(with_aux, params, batch, {"jac": jac}, shapes, None, frozenset()))

    def init(params, batch, key):
        return equinox.filter(begin(params, batch), equinox.is_array)

    def step(params, state, batch, key):
        # Functions in its state do not pass through a compiled loop. Those of any first state are
        # the same.
        shapes = equinox.filter_eval_shape(begin, params, batch)
        functions = equinox.filter(shapes, lambda leaf: not isinstance(leaf, jax.ShapeDtypeStruct))
        state = equinox.combine(state, functions)
        params, state, _ = solver.step(with_aux, params, batch, {"jac": jac}, state, frozenset())
        return params, equinox.filter(state, equinox.is_array)

    return Method(init, step)


# Jaxopt: https://jaxopt.github.io.


def jaxopt_gn(task: Task, options: Options) -> Method:
    """Undamped full Gauss-Newton steps by conjugate gradients; it has nothing to tune."""
    return _jaxopt("GaussNewton", task, options)


def jaxopt_lm(task: Task, options: Options) -> Method:
    """Levenberg-Marquardt by conjugate gradients, its default.

    Tuned: first λ over the largest element of diag JᵀJ.
    """
    return _jaxopt("LevenbergMarquardt", task, options, damping_parameter=options["damping"])


def _jaxopt(name: str, task: Task, options: Options, **settings: Any) -> Method:
    """A method of jaxopt, which wants parameters and residuals as vectors."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), task.params_shapes())
    unravel = ravel_pytree(zeros)[1]
    residuals: Any = task.residuals

    def flat_residuals(flat, batch):
        return ravel_pytree(residuals(unravel(flat), batch))[0]

    solver = getattr(importlib.import_module("jaxopt"), name)(flat_residuals, **settings)

    def init(params, batch, key):
        flat = ravel_pytree(params)[0]
        state = solver.init_state(flat, batch)
        # The first state has other dtypes than the later ones.
        later = jax.eval_shape(solver.update, flat, state, batch).state
        return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), state, later)

    def step(params, state, batch, key):
        flat, state = solver.update(ravel_pytree(params)[0], state, batch)
        return unravel(flat), state

    return Method(init, step)
