"""Optimisers of other libraries, as they ship, driven through `Method`.

No library is imported before it is asked for. Every step can be traced, so that one compilation
serves a grid and work is counted from what was compiled and from how its loops turned.
"""

import functools
import importlib
import importlib.metadata
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from gnlin.compare.entrants.contestant import Options
from gnlin.compare.entrants.method import Method
from gnlin.compare.runs.cost import batch_shapes, params_shapes
from gnlin.compare.tasks.task import Task
from gnlin.tree import Batch, Params

# What is installed.


def somax_absent() -> str | None:
    """Its distribution is python-somax. Another, called somax, is for music, and is imported by the same name."""
    if _installed("python-somax") and _installed("somax"):
        remedy = "pip uninstall somax, then pip install --force-reinstall --no-deps python-somax"
        return f"the package somax, which is for music, is in the way of python-somax: {remedy}"
    return _absent("python-somax", "somax")


def kfac_absent() -> str | None:
    """Release 0.0.8 runs on JAX up to 0.9.0; its source on GitHub does on later ones, with the same number."""
    source = '"kfac-jax @ git+https://github.com/google-deepmind/kfac-jax"'
    return _absent(
        "kfac-jax", "kfac_jax", source, f"--force-reinstall --no-deps {source}", _trace_kfac_step
    )


def optimistix_absent() -> str | None:
    return _absent("optimistix", "optimistix", upgrade="--upgrade optimistix lineax equinox")


def jaxopt_absent() -> str | None:
    return _absent("jaxopt", "jaxopt")


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _absent(
    name: str,
    module: str,
    source: str = "",
    upgrade: str = "",
    attempt: Callable[[], Any] | None = None,
) -> str | None:
    version = _installed(name)
    if version is None:
        return f"{name} is not installed: pip install {source or name}"
    error = _error(module, attempt)
    if error is None:
        return None
    remedy = upgrade or f"--upgrade {name}"
    return f"{name} {version} does not run on JAX {jax.__version__} ({error}): pip install {remedy}"


@functools.cache
def _error(module: str, attempt: Callable[[], Any] | None) -> str | None:
    """Only the attempt tells: most libraries put no upper bound on the version of JAX."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
            return attempt() if attempt else None
    except Exception as error:
        return type(error).__name__


# What fits a task.


def least_squares_unfit(task: Task) -> str | None:
    return (
        None
        if task.residuals is not None
        else f"task {task.name!r} is not least squares: it has no `residuals`"
    )


def jaxopt_unfit(task: Task) -> str | None:
    """Both solvers are unbounded in effect: ten turns for each parameter where single precision
    does not converge.

    That is hours in one step on a wide network. The first λ, relative to diag JᵀJ, takes the
    products with all unit vectors at once, and with them the memory.
    """
    if reason := least_squares_unfit(task):
        return reason
    parameters, rows = _size(params_shapes(task)), _size(_output_shapes(task))
    if parameters * (parameters + rows) <= 2**27:
        return None
    return f"a step of jaxopt may take {10 * parameters} turns over {rows} residuals, and nothing interrupts it"


def somax_unfit(task: Task) -> str | None:
    return least_squares_unfit(task) and _softmax_unfit(task)


def somax_egn_unfit(task: Task) -> str | None:
    rows = _size(_output_shapes(task))
    return somax_unfit(task) or (
        f"EGN factorises a matrix of {rows} rows, one for each output" if rows > 4096 else None
    )


def kfac_unfit(task: Task) -> str | None:
    """Residuals must be one array with the examples on axis 0, from which curvature is estimated."""
    shapes = jax.tree.leaves(_output_shapes(task))
    if task.residuals is None or (len(shapes) == 1 and shapes[0].shape[:1] == (_examples(task),)):
        return least_squares_unfit(task) and _softmax_unfit(task)
    return f"the residuals of task {task.name!r} are not one array with the examples on axis 0"


def _softmax_unfit(task: Task) -> str | None:
    """The loss itself is tried."""
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[:8]), task.train)
    outputs, labels = _output_shapes(task), batch.get("y") if isinstance(batch, Mapping) else None
    if (
        getattr(outputs, "ndim", 0) == 2
        and labels is not None
        and labels.ndim == 1
        and labels.dtype.kind in "iu"
    ):
        logits = jax.random.normal(
            jax.random.key(0), (len(labels), outputs.shape[1]), outputs.dtype
        )
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        if jnp.allclose(task.objective.loss_of(logits, batch), expected, rtol=1e-4):
            return None
    return f'the loss of task {task.name!r} is not mean softmax cross-entropy of outputs (N, C) with labels batch["y"]'


def _examples(task: Task) -> int:
    return task.batch_size or task.train_size


def _output_shapes(task: Task) -> Any:
    """Of the residuals, where there are any."""
    model = task.residuals or (
        lambda params, batch: task.objective.outputs_and_aux(params, batch)[0]
    )
    return jax.eval_shape(model, params_shapes(task), batch_shapes(task, _examples(task)))


def _size(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


# Somax: https://github.com/cor3bit/somax.


def somax_sgn(task: Task, options: Options) -> Method:
    """Damped Gauss-Newton by warm-started conjugate gradients, with the tolerance and the turns of its README."""
    solver = {"tol": options.get("rtol", 1e-4), "maxiter": options.get("max_steps", 20)}
    return _somax("sgn", task, options, **solver)


def somax_egn(task: Task, options: Options) -> Method:
    """Damped Gauss-Newton by a Cholesky factorisation with a row for each output of the batch.

    On softmax, version 1.0.1 does not solve the Gauss-Newton system: of the factors LLᵀ of the
    curvature of the loss it puts LᵀL in its place. Its steps on squared loss are exact.
    """
    return _somax("egn", task, options)


def _somax(name: str, task: Task, options: Options, **solver: Any) -> Method:
    """All residuals r, M of them, become one regression of √M r on zero, whose loss is ½ mean over M: ½ Σ r²."""
    somax = importlib.import_module("somax")
    squared, adapts = (
        task.residuals is not None,
        options.get("control", "constant") == "trust-region",
    )

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
    """K-FAC that adapts damping, momentum and learning rate as in its README, without burn-in;
    tuned: first damping.

    Of the count of steps, which it wants in Python, it uses only whether damping is due: a
    conditional between two staged steps can be traced.
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

    optimizer = _kfac_optimizer(loss)

    def init(params, batch, key):
        state = optimizer.init(params, key, batch)
        state.damping = jnp.asarray(options["damping"], state.damping.dtype)
        return state

    def step(params, state, batch, key):
        jax.eval_shape(
            optimizer.init, params, key, batch
        )  # finds the layers, for an instance whose `init` is not used

        def staged(count, params, state):
            return optimizer.step(params, state, key, batch=batch, global_step_int=count)[:2]

        due = (state.step_counter + 1) % _DAMPING_PERIOD == 0
        branches = [
            functools.partial(staged, count) for count in (_DAMPING_PERIOD - 1, _DAMPING_PERIOD)
        ]
        return jax.lax.cond(due, *branches, params, state)

    return Method(init, step)


def _kfac_optimizer(loss: Callable[[Params, Batch], jax.Array]) -> Any:
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


def _trace_kfac_step() -> None:
    kfac_jax = importlib.import_module("kfac_jax")

    def loss(params, batch):
        kfac_jax.register_squared_error_loss(batch @ params)
        return jnp.square(batch @ params).sum() / len(batch)

    def first_step(params, batch, key):
        optimizer = _kfac_optimizer(loss)
        return optimizer.step(
            params, optimizer.init(params, key, batch), key, batch=batch, global_step_int=0
        )[0]

    jax.eval_shape(first_step, jnp.zeros((2, 1)), jnp.zeros((3, 2)), jax.random.key(0))


# Optimistix: https://docs.kidger.site/optimistix.


def optimistix_gn(task: Task, options: Options) -> Method:
    """Undamped Gauss-Newton steps of a fixed length, which is 1 by default; by QR where the Jacobian is small."""
    optimistix, equinox = importlib.import_module("optimistix"), importlib.import_module("equinox")
    parameters, rows = _size(params_shapes(task)), _size(_output_shapes(task))
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
    dense = _is_dense(options, _size(params_shapes(task)) <= 512)
    solver = optimistix.LevenbergMarquardt(0.0, 0.0, linear_solver=_linear_solver(options, dense))

    def start(state):
        return equinox.tree_at(
            lambda state: state.search_state.step_size,
            state,
            jnp.asarray(1 / options["damping"], float),
        )

    return _optimistix(task, solver, start)


def _is_dense(options: Options, small: bool) -> bool:
    return {"auto": small, "qr": True, "cg": False}[options.get("solver", "auto")]


def _linear_solver(options: Options, dense: bool) -> Any:
    """QR, or conjugate gradients on the normal equations, or on JJᵀ where residuals are fewer than unknowns."""
    lineax = importlib.import_module("lineax")
    limits = {
        "rtol": options.get("rtol", 1e-3),
        "atol": 1e-8,
        "max_steps": options.get("max_steps", 100),
    }
    if dense:
        return lineax.QR()
    return (
        lineax.Normal(lineax.CG(**limits))
        if hasattr(lineax, "Normal")
        else lineax.NormalCG(**limits)
    )


def _optimistix(
    task: Task,
    solver: Any,
    start: Callable[[Any], Any] = lambda state: state,
    jac: str = "fwd",
) -> Method:
    """Its tolerances are zero: a run ends with its budget. The first step evaluates and does not move."""
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
        # Functions in its state do not pass through a compiled loop; those of any first state are
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
    """Levenberg-Marquardt by conjugate gradients, its default; tuned: first λ over the largest element of diag JᵀJ."""
    return _jaxopt("LevenbergMarquardt", task, options, damping_parameter=options["damping"])


def _jaxopt(name: str, task: Task, options: Options, **settings: Any) -> Method:
    """It wants parameters and residuals as vectors."""
    unravel = ravel_pytree(
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params_shapes(task))
    )[1]
    residuals: Any = task.residuals

    def flat_residuals(flat, batch):
        return ravel_pytree(residuals(unravel(flat), batch))[0]

    solver = getattr(importlib.import_module("jaxopt"), name)(flat_residuals, **settings)

    def init(params, batch, key):
        flat = ravel_pytree(params)[0]
        state = solver.init_state(flat, batch)
        later = jax.eval_shape(
            solver.update, flat, state, batch
        ).state  # its first state has other dtypes
        return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), state, later)

    def step(params, state, batch, key):
        flat, state = solver.update(ravel_pytree(params)[0], state, batch)
        return unravel(flat), state

    return Method(init, step)
