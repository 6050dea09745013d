"""An objective as dense arrays, at a flat vector of parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


class Loss(NamedTuple):
    """The loss at some outputs z, which are M numbers."""

    value: float
    slope: np.ndarray  # ∇ℓ(z), (M,)
    hessian: np.ndarray  # H, (M, M)


class Point(NamedTuple):
    """The objective at parameters θ, which are P numbers."""

    outputs: np.ndarray  # z = f(θ), (M,)
    jacobian: np.ndarray  # J, (M, P)
    loss: Loss  # at z

    @property
    def gradient(self) -> np.ndarray:
        """Jᵀ∇ℓ(z)."""
        return self.jacobian.T @ self.loss.slope

    @property
    def curvature(self) -> np.ndarray:
        """G = JᵀHJ."""
        return self.jacobian.T @ self.loss.hessian @ self.jacobian


class Dense:
    """`objective` as a function of flat vectors.

    Args:
        objective: lends its functions `model` and `loss`.
        params: the first parameters; they give vectors their form.
        fixed: further leaves, by name, that the model sees as constants.
    """

    def __init__(self, objective: Any, params: Any, fixed: dict[str, Any] | None = None):
        self.objective, self.fixed = objective, fixed or {}
        self.start = np.asarray(ravel_pytree(params)[0])
        self.unravel: Callable = ravel_pytree(params)[1]
        self._expanded = jax.jit(self._outputs_and_jacobian)
        self._loss = jax.jit(self._loss_and_derivatives)
        self._bend = jax.jit(self._second_derivative)

    def at(self, theta: np.ndarray, batch: Any) -> Point:
        outputs, jacobian = map(np.asarray, self._expanded(theta, batch))
        return Point(outputs, jacobian, self.loss(outputs, batch))

    def outputs(self, theta: np.ndarray, batch: Any) -> np.ndarray:
        return np.asarray(self._expanded(theta, batch)[0])

    def loss(self, outputs: np.ndarray, batch: Any) -> Loss:
        value, slope, hessian = self._loss(outputs, batch)
        return Loss(float(value), np.asarray(slope), np.asarray(hessian))

    def value(self, theta: np.ndarray, batch: Any) -> float:
        return self.loss(self.outputs(theta, batch), batch).value

    def bend(self, theta: np.ndarray, direction: np.ndarray, batch: Any) -> np.ndarray:
        """∂²f[v, v], (M,)."""
        return np.asarray(self._bend(theta, direction, batch))

    # Traced functions.

    def flat_model(self, theta, batch):
        return ravel_pytree(self._model(theta, batch))[0]

    def flat_loss(self, outputs, batch):
        like = jax.eval_shape(self._model, self.start, batch)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        return self.objective.loss(ravel_pytree(zeros)[1](outputs), batch)

    def _model(self, theta, batch):
        params = self.unravel(theta)
        return self.objective.model({**self.fixed, **params} if self.fixed else params, batch)

    def _outputs_and_jacobian(self, theta, batch):
        return self.flat_model(theta, batch), jax.jacrev(self.flat_model)(theta, batch)

    def _loss_and_derivatives(self, outputs, batch):
        value, slope = jax.value_and_grad(self.flat_loss)(outputs, batch)
        return value, slope, jax.hessian(self.flat_loss)(outputs, batch)

    def _second_derivative(self, theta, direction, batch):
        second = jax.hessian(self.flat_model)(theta, batch)
        return jnp.einsum("mij,i,j->m", second, direction, direction)
