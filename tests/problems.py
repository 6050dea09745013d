"""Small problems that the tests share, and how closely numbers should agree.

Problems are built once for a process: do not donate their arrays.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gnlin

try:
    from jax import enable_x64
except ImportError:  # where older versions of JAX have it
    from jax.experimental import enable_x64

__all__ = [
    "MLP",
    "Dtypes",
    "Problem",
    "classifier",
    "enable_x64",
    "full_steps",
    "host_copy",
    "linear_regression",
    "logistic_regression",
    "third_party",
    "third_party_model",
    "tolerance",
    "train",
]


def tolerance(dtype, scale: float = 8.0) -> dict[str, float]:
    """Keywords ``rtol`` and ``atol`` for `numpy.testing.assert_allclose` and chex: `scale` times
    the dtype's eps.

    The default suits quantities of order one that took a handful of roundings; a larger `scale`
    wants a reason.
    """
    bound = scale * float(jnp.finfo(dtype).eps)
    return {"rtol": bound, "atol": bound}


@dataclasses.dataclass(frozen=True)
class Dtypes:
    """Dtypes of the two layers of the `MLP`, whether its loss is computed in at least float32, and
    the mode of JAX.
    """

    hidden: Any
    readout: Any
    wide_loss: bool = True
    x64: bool = False


FLOAT32 = Dtypes(jnp.float32, jnp.float32)


class Problem(NamedTuple):
    objective: gnlin.Objective
    params: Any
    batches: tuple[Any, ...]

    @property
    def stacked(self):
        """All batches along a new leading axis, for `jax.lax.scan`."""
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *self.batches)


@dataclasses.dataclass(frozen=True)
class MLP:
    """tanh network on a tree with a tuple and a None leaf; each layer computes in the dtype of its
    weights.
    """

    def __call__(self, params, batch):
        weights, bias = params["hidden"]
        hidden = jnp.tanh(_affine(batch["x"], weights, bias))
        return _affine(hidden, params["readout"]["w"], params["readout"]["b"])


def _affine(inputs, weights, bias):
    outputs = inputs.astype(weights.dtype) @ weights
    return outputs if bias is None else outputs + bias[None]


@functools.cache
def classifier(dtypes: Dtypes = FLOAT32, *, examples: int = 48, batches: int = 6) -> Problem:
    """Softmax classification of points labelled by a linear teacher: 3 features, 4 hidden units, 3
    classes.
    """
    draw = _Normals(0)
    teacher = draw(3, 3)
    params = {
        "hidden": (
            jnp.asarray(draw(3, 4) / np.sqrt(3), dtypes.hidden),
            jnp.zeros(4, dtypes.hidden),
        ),
        "readout": {"w": jnp.asarray(draw(4, 3) / np.sqrt(4), dtypes.readout), "b": None},
    }

    def batch():
        x = draw(examples, 3)
        return {
            "x": jnp.asarray(x, jnp.float32),
            "y": jnp.asarray(np.argmax(x @ teacher, axis=1), jnp.int32),
        }

    loss = cross_entropy_in_float32 if dtypes.wide_loss else cross_entropy
    return Problem(gnlin.Objective(MLP(), loss), params, tuple(batch() for _ in range(batches)))


@functools.cache
def logistic_regression(dtypes: Dtypes = FLOAT32, *, examples: int = 48) -> Problem:
    """The classifier's first batch under a linear model: weights in the first of the `dtypes`,
    biases in the second.
    """
    problem = classifier(dtypes, examples=examples, batches=1)
    params = {"w": jnp.zeros((3, 3), dtypes.hidden), "b": jnp.zeros(3, dtypes.readout)}
    return problem._replace(
        objective=dataclasses.replace(problem.objective, model=_linear), params=params
    )


def _linear(params, batch):
    return _affine(batch["x"], params["w"], None).astype(params["b"].dtype) + params["b"][None]


def cross_entropy(outputs, batch):
    """Mean softmax cross-entropy, in the dtype of the logits."""
    log_probabilities = jax.nn.log_softmax(outputs)
    targets = jax.nn.one_hot(batch["y"], outputs.shape[-1], dtype=outputs.dtype)
    return -jnp.mean(jnp.sum(log_probabilities * targets, axis=-1))


def cross_entropy_in_float32(outputs, batch):
    """Mean softmax cross-entropy, in at least float32."""
    wide = outputs.dtype if jnp.finfo(outputs.dtype).bits >= 32 else jnp.float32
    return cross_entropy(outputs.astype(wide), batch)


@functools.cache
def linear_regression(
    dtype=jnp.float32, *, examples: int = 8, features: int = 3
) -> tuple[Problem, Any]:
    """A perfectly conditioned least-squares problem with noise in its targets, and its solution.

    The loss is a mean over examples with Hessian I, so that gradient descent at rate 1 is Newton's
    method.
    """
    draw = _Normals(1)
    x = np.sqrt(examples) * np.linalg.qr(draw(examples, features))[0]
    y = x @ draw(features) + 0.1 * draw(examples)
    objective = gnlin.Objective(
        model=lambda params, batch: batch["x"] @ params["w"],
        loss=lambda outputs, batch: jnp.mean((outputs - batch["y"]) ** 2) / 2,
    )
    batch = {"x": jnp.asarray(x, dtype), "y": jnp.asarray(y, dtype)}
    return Problem(objective, {"w": jnp.zeros(features, dtype)}, (batch,)), {
        "w": jnp.asarray(x.T @ y / examples, dtype)
    }


def full_steps(objective, damping, rate=1.0, **options) -> optax.GradientTransformationExtraArgs:
    """The textbook's damped Gauss-Newton: the whole solution, times a rate."""
    solve = gnlin.scale_by_gauss_newton(objective, damping, **options)
    return optax.chain(solve, optax.scale_by_learning_rate(rate))


def third_party(function: Any) -> Any:
    """A schedule or a gradient transformation of Optax's own, under JAX's usual promotion of
    dtypes.

    Inside one of our transforms everything else is then still held to the strict rules.
    """
    if not isinstance(function, optax.GradientTransformation):
        return _promoting(function)
    return optax.GradientTransformationExtraArgs(
        _promoting(function.init), _promoting(optax.with_extra_args_support(function).update)
    )


def third_party_model(function: Callable[..., Any]) -> Callable[..., Any]:
    """A model of another library, under the usual promotion of dtypes and ranks."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return call


def _promoting(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return call


def host_copy(data: Any) -> Any:
    """The arrays of `data` as NumPy owns them: what survives donation of the originals."""
    return jax.tree.map(lambda leaf: jax.device_get(leaf).copy(), data)


def train(
    update: Callable[..., tuple[Any, Any]],
    objective: gnlin.Objective,
    params: Any,
    opt_state: Any,
    batches,
) -> tuple[Any, Any]:
    """``(params, opt_state)`` after one compiled ``update(grads, opt_state, params, batch=batch)``
    for each batch.
    """

    @jax.jit
    def step(params, opt_state, batch):
        grads = jax.grad(objective.value)(params, batch)
        updates, opt_state = update(grads, opt_state, params, batch=batch)
        return optax.apply_updates(params, updates), opt_state

    for batch in batches:
        params, opt_state = step(params, opt_state, batch)
    return params, opt_state


class _Normals:
    """Standard normal numbers on the host, drawn with one key in one go: each shape on its own
    would be compiled.
    """

    def __init__(self, seed: int):
        with enable_x64(False):
            self.stock = np.asarray(
                jax.random.normal(jax.random.key(seed), (2048,), jnp.float32), np.float64
            )

    def __call__(self, *shape: int) -> np.ndarray:
        size = math.prod(shape)
        drawn, self.stock = self.stock[:size], self.stock[size:]
        return drawn.reshape(shape)
