"""Why a peer cannot take part: its library is absent or broken, or the task does not suit it.

A reason is one line with the remedy. `None` says that there is nothing in the way.
"""

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gnlin import tree
from gnlin.compare.entrants.peers import kfac_optimizer, output_shapes
from gnlin.compare.tasks.task import Task

# The libraries.


def somax_absent() -> str | None:
    """The distribution is python-somax. Another one, for music, has the same top module."""
    if _installed("python-somax") and _installed("somax"):
        remedy = "pip uninstall somax, then pip install --force-reinstall --no-deps python-somax"
        return f"the package somax, which is for music, is in the way of python-somax: {remedy}"
    return _absent("python-somax", "somax")


def kfac_absent() -> str | None:
    """Release 0.0.8 runs on JAX up to 0.9.0. Its source on GitHub runs on later ones.

    Both have the same version number.
    """
    source = '"kfac-jax @ git+https://github.com/google-deepmind/kfac-jax"'
    return _absent(
        "kfac-jax",
        "kfac_jax",
        source=source,
        upgrade=f"--force-reinstall --no-deps {source}",
        attempt=_trace_kfac_step,
    )


def optimistix_absent() -> str | None:
    return _absent("optimistix", "optimistix", upgrade="--upgrade optimistix lineax equinox")


def jaxopt_absent() -> str | None:
    return _absent("jaxopt", "jaxopt")


def _installed(distribution: str) -> str | None:
    """The version of a distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _absent(
    name: str,
    module: str,
    *,
    source: str = "",
    upgrade: str = "",
    attempt: Callable[[], Any] | None = None,
) -> str | None:
    """Why a library cannot be used.

    Args:
        name: its distribution.
        module: its top module.
        source: the argument of ``pip install``, where it is not the name.
        upgrade: the arguments of ``pip install`` that mend a broken version.
        attempt: something that fails where the version is broken.
    """
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
    """The error of an import and an attempt. Most libraries put no upper bound on JAX's version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
            return attempt() if attempt else None
    except Exception as error:
        return type(error).__name__


def _trace_kfac_step() -> None:
    """Trace a first step on a small regression."""
    kfac_jax = importlib.import_module("kfac_jax")

    def loss(params, batch):
        kfac_jax.register_squared_error_loss(batch @ params)
        return jnp.square(batch @ params).sum() / len(batch)

    def first_step(params, batch, key):
        optimizer = kfac_optimizer(loss)
        state = optimizer.init(params, key, batch)
        return optimizer.step(params, state, key, batch=batch, global_step_int=0)[0]

    jax.eval_shape(first_step, jnp.zeros((2, 1)), jnp.zeros((3, 2)), jax.random.key(0))


# The tasks.


def least_squares_unfit(task: Task) -> str | None:
    """The task must be least squares."""
    if task.residuals is not None:
        return None
    return f"task {task.name!r} is not least squares: it has no `residuals`"


def jaxopt_unfit(task: Task) -> str | None:
    """The task must be least squares and small.

    In effect both solvers are unbounded: they make ten iterations for each parameter where single
    precision does not converge. That is hours in one step on a wide network. The first λ, relative
    to diag JᵀJ, takes the products with all unit vectors at once, and with them the memory.
    """
    if reason := least_squares_unfit(task):
        return reason
    parameters, residuals = tree.size(task.params_shapes()), tree.size(output_shapes(task))
    if parameters * (parameters + residuals) <= 2**27:
        return None
    return (
        f"a step of jaxopt may take {10 * parameters} iterations over {residuals} residuals, "
        "and nothing interrupts it"
    )


def somax_unfit(task: Task) -> str | None:
    """The task must be least squares or softmax."""
    return least_squares_unfit(task) and _softmax_unfit(task)


def somax_egn_unfit(task: Task) -> str | None:
    """The task must also have few outputs: EGN factorises a matrix with a row for each."""
    if reason := somax_unfit(task):
        return reason
    outputs = tree.size(output_shapes(task))
    if outputs <= 4096:
        return None
    return f"EGN factorises a matrix of {outputs} rows, one for each output"


def kfac_unfit(task: Task) -> str | None:
    """The residuals must be one array with the examples on axis 0: curvature is estimated there."""
    if task.residuals is None:
        return _softmax_unfit(task)
    shapes = jax.tree.leaves(output_shapes(task))
    examples = task.batch_size or task.train_size
    if len(shapes) == 1 and shapes[0].shape[:1] == (examples,):
        return None
    return f"the residuals of task {task.name!r} are not one array with the examples on axis 0"


def _softmax_unfit(task: Task) -> str | None:
    """The loss must equal softmax cross-entropy on random logits of a few examples."""
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[:8]), task.train)
    outputs, labels = output_shapes(task), _labels(batch)
    if labels is not None and getattr(outputs, "ndim", 0) == 2:
        shape = (len(labels), outputs.shape[1])
        logits = jax.random.normal(jax.random.key(0), shape, outputs.dtype)
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        if jnp.allclose(task.objective.loss_of(logits, batch), expected, rtol=1e-4):
            return None
    return (
        f"the loss of task {task.name!r} is not mean softmax cross-entropy of outputs (N, C) "
        'with labels batch["y"]'
    )


def _labels(batch: Any) -> Any:
    """Integer labels (N,) ``batch["y"]``, if there are any."""
    labels = batch.get("y") if isinstance(batch, Mapping) else None
    is_vector = labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu"
    return labels if is_vector else None
