r"""Lazy training in closed form.

The linearised model is trained by gradient descent from an anchor φ. Its loss is quadratic in the
outputs, with gradient g and Hessian H = R Rᵀ at f(φ). Then the outputs follow a linear recurrence,
of matrix I − ηHK with K = J Jᵀ. From the eigendecomposition Rᵀ K R = Q Λ Qᵀ

    θ = φ − Jᵀu,     u = R Q F(Λ) Qᵀ R⁺ g.

The kind of training is in the filter F alone:

* gradient descent, k steps of size η: F(λ) = (1 − (1 − ηλ)ᵏ) / λ
* gradient flow, time t: F(λ) = (1 − exp(−λt)) / λ
* kernel ridge regression, damping μ: F(λ) = 1 / (λ + μ)

The last is the damped Gauss-Newton step. For μ = 0 it is the limit of the others, the least change
of the parameters that minimises the loss.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer

from gnlin import tree
from gnlin.checks import check_integer, check_number, shows_signature
from gnlin.kernel.gram import kernel_matrix
from gnlin.problem.curvature import loss_derivatives
from gnlin.problem.linearisation import Linearisation, linearise
from gnlin.problem.objective import Objective, check_not_bound, check_objective
from gnlin.tree import Batch, Params


@dataclasses.dataclass(frozen=True)
class LazyTraining:
    r"""The linearised model at an anchor, and its parameters after any training.

    Each method returns θ, shaped like the parameters. The lazy model's predictions on other data
    are ``gnlin.linearise(objective, anchor, data).predict(theta)``. Methods work under `jit` and
    `vmap`, so ``jax.vmap(lazy.gradient_flow)(times)`` is a whole curve.

    Attributes:
        linear: the linearisation at the anchor, on the training data.
        eigenvalues: Λ, (N·C,), in ascending order: the curvatures of the loss along the kernel's
            directions. Gradient descent is stable for η below 2 / eigenvalues[-1], and learns
            direction i within about 1 / (ηλᵢ) steps.
        directions: R Q, (N·C, N·C).
        residual: Qᵀ R⁺ g, (N·C,): the gradient along each direction.
        outside: ‖g − R R⁺ g‖ / ‖g‖, the share of the gradient in outputs in which the loss is not
            curved: 0 of squared errors. This share is left out. So the methods do not describe
            training by a loss that falls for ever (a linear one, Huber's far out).
    """

    linear: Linearisation
    eigenvalues: jax.Array
    directions: jax.Array
    residual: jax.Array
    outside: jax.Array

    def gradient_descent(self, learning_rate: chex.Numeric, steps: chex.Numeric) -> Params:
        """Parameters after `steps` steps of plain gradient descent on all data."""
        check_number("learning_rate", learning_rate)
        check_number("steps", steps)
        if not isinstance(steps, Tracer) and float(steps) % 1:
            raise ValueError(f"`steps` must be a whole number; got {steps!r}")
        dtype = self.eigenvalues.dtype
        rate, count = jnp.asarray(learning_rate, dtype), jnp.asarray(steps, dtype)

        def filtered(values: jax.Array) -> jax.Array:
            base = 1 - rate * values
            # A negative base has powers of alternating sign.
            sign = jnp.where((base < 0) & (jnp.mod(count, 2) == 1), -1, 1)
            power = sign * jnp.abs(base) ** count
            # Close to 1 a power loses the digits that its difference from 1 has.
            slow = rate * values < 0.5
            gentle = -jnp.expm1(count * jnp.log1p(-jnp.where(slow, rate * values, 0)))
            return jnp.where(slow, gentle, 1 - power) / values

        return self._moved(filtered, rate * count)

    def gradient_flow(self, time: chex.Numeric) -> Params:
        """Parameters at `time` of gradient flow, dθ/dt = −∇Q(θ); `jnp.inf` for its limit."""
        check_number("time", time, finite=False)
        time = jnp.asarray(time, self.eigenvalues.dtype)
        return self._moved(lambda values: -jnp.expm1(-values * time) / values, time)

    def ridge(self, damping: chex.Numeric) -> Params:
        """Parameters that minimise Q(θ) + ½ damping ‖θ − φ‖²: kernel ridge regression.

        For 0 it is the limit. For a loss ½ Σ (z − y)² the residuals are multiplied by
        (K + damping I)⁻¹. For the mean of ½ (z − y)² over N examples the factor is
        (K + N damping I)⁻¹.
        """
        check_number("damping", damping)
        damping = jnp.asarray(damping, self.eigenvalues.dtype)
        # 1/0 is infinite, and so beyond the noise: the change is then the least one.
        return self._moved(lambda values: 1 / (values + damping), 1 / damping)

    def _moved(self, filtered: Callable[[jax.Array], jax.Array], at_zero: jax.Array) -> Params:
        """θ for the filter F, whose limit at 0 is `at_zero`.

        An eigenvalue of 0 takes the limit. But a limit beyond 1 / noise is more than λ resolves.
        Then F is 0 for all eigenvalues up to the noise.
        """
        noise = _noise(self.eigenvalues)
        bounded = at_zero * noise <= 1
        seen = self.eigenvalues > jnp.where(bounded, 0, noise)
        limit = jnp.where(bounded, at_zero, 0)
        # F divides by λ, so it is evaluated at 1 where λ takes the limit.
        values = filtered(jnp.where(seen, self.eigenvalues, 1))
        weights = jnp.where(seen, values, limit) * self.residual
        # u = R Q F(Λ) Qᵀ R⁺ g, and θ = φ − Jᵀu.
        cotangent = tree.unflatten(self.directions @ weights, self.linear.outputs)
        theta = tree.subtract(self.linear.anchor, self.linear.vjp(cotangent))
        return tree.cast_like(theta, self.linear.anchor)


@shows_signature
def lazy_training(
    objective: Objective, params: Params, batch: Batch = None, *, max_outputs: int = 4096
) -> LazyTraining:
    r"""Solve the training of the linearised model in closed form, at any time.

    .. math:: \theta_k = \phi - J^\top R\,Q\,F_k(\Lambda)\,Q^\top R^+ g, \qquad
              R^\top J J^\top R = Q \Lambda Q^\top

    This is exact where the loss is quadratic in the outputs. A squared error is, whatever its
    weights. Another loss counts as its quadratic model at f(φ), as with
    ``loss_model="quadratic"``, less the share `outside` of the gradient.

    It takes two eigendecompositions of the size of the N·C outputs, and long times deserve double
    precision.

    Args:
        objective: the problem; averages and weights are in its loss, and so in the rates.
        params: φ, the anchor.
        batch: all training data; not needed where the objective is bound.
        max_outputs: largest N·C that is accepted.

    Returns:
        A `LazyTraining`: eigenvalues, and `gradient_descent`, `gradient_flow` and `ridge`.

    Raises:
        ValueError: there are more than `max_outputs` outputs.
        ValueError, TypeError: as `linearise`.

    References: Jacot, Gabriel & Hongler, arXiv 1806.07572, section 5; Lee et al., arXiv 1902.06720,
        section 2.2.

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> objective = gnlin.Objective.least_squares(lambda p: jnp.array([p[0], 2 * p[1]]) - 1.0)
        >>> lazy = gnlin.kernel.lazy_training(objective, jnp.zeros(2))
        >>> lazy.gradient_descent(learning_rate=0.1, steps=1).round(6)
        Array([0.1, 0.2], dtype=float32)
        >>> lazy.ridge(0.0)
        Array([1. , 0.5], dtype=float32)
    """
    check_objective(objective)
    check_not_bound("batch", objective, batch)
    check_integer("max_outputs", max_outputs)
    # From shapes alone: too many outputs are refused before anything is computed.
    count = tree.size(
        jax.eval_shape(lambda params: objective.outputs_and_aux(params, batch)[0], params)
    )
    if count > max_outputs:
        raise ValueError(
            f"`max_outputs` is {max_outputs}, but there are {count} outputs, and "
            "eigendecompositions of that size: take fewer examples, raise `max_outputs`, or train "
            "with gnlin.linearise_gradients(objective, period=None)"
        )
    linear = linearise(objective, params, batch)
    dtype = tree.accumulation_dtype(params, linear.outputs)
    gradient, hessian = loss_derivatives(objective, linear.outputs, batch)

    def hessian_column(cotangent: jax.Array) -> jax.Array:
        return tree.flatten(hessian(tree.unflatten(cotangent, linear.outputs)), dtype)

    root = _square_root(jax.vmap(hessian_column)(jnp.eye(count, dtype=dtype)))
    kernel = kernel_matrix(linear.jvp, linear.vjp, params).matrix.astype(dtype)
    # Rᵀ K R = Q Λ Qᵀ
    turned = _eigh(root.matrix.T @ kernel @ root.matrix)
    slope = tree.flatten(gradient, dtype)
    # Vᵀg. Its part without curvature is left out, and reported as `outside`.
    along = root.eigen.vectors.T @ slope
    unseen = jnp.linalg.norm(jnp.where(root.curved, 0, along))
    size = jnp.linalg.norm(slope)
    return LazyTraining(
        linear,
        eigenvalues=turned.values,
        directions=root.matrix @ turned.vectors,  # R Q
        residual=turned.vectors.T @ (root.inverse * along),  # Qᵀ R⁺ g
        outside=unseen / jnp.where(size > 0, size, 1),
    )


class _Eigen(NamedTuple):
    """An eigendecomposition of a positive semi-definite matrix."""

    values: jax.Array
    vectors: jax.Array


def _eigh(matrix: jax.Array) -> _Eigen:
    """Eigenvalues in ascending order, with 0 for those that rounding made negative."""
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return _Eigen(jnp.maximum(values, 0), vectors)


class _Root(NamedTuple):
    """R with R Rᵀ = H = V S Vᵀ."""

    eigen: _Eigen  # S and V
    matrix: jax.Array  # R = V S^½
    curved: jax.Array  # which of S are more than noise
    inverse: jax.Array  # S^-½, with 0 for the others: R⁺ = S^-½ Vᵀ


def _square_root(hessian: jax.Array) -> _Root:
    eigen = _eigh(hessian)
    root = jnp.sqrt(eigen.values)
    curved = eigen.values > _noise(eigen.values)
    inverse = jnp.where(curved, 1 / jnp.where(curved, root, 1), 0)
    return _Root(eigen, eigen.vectors * root[None, :], curved, inverse)


def _noise(values: jax.Array) -> jax.Array:
    """The size up to which eigenvalues are rounding."""
    return len(values) * jnp.finfo(values.dtype).eps * jnp.max(values, initial=0)
