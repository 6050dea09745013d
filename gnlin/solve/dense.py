"""The damped system solved directly, by orthogonal factorisation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.solve.system import Solution, System
from gnlin.tree import Params


@dataclasses.dataclass(frozen=True)
class Dense:
    r"""Direct solve by QR of the augmented system, for up to a few thousand parameters.

    J (M × P, M outputs and P parameters) is materialised, and a factor F with :math:`F^\top F = J^\top H J` is built
    without ever forming that product, whose condition number is the square of J's:

    .. math:: J = QR, \quad Q^\top H Q = V \Lambda V^\top, \quad F = \Lambda^{1/2} V^\top R, \qquad
              \begin{pmatrix} F \\ \sqrt{\lambda D} \end{pmatrix} = Q' R'.

    Then :math:`R'^\top R' x = b` by two triangular solves and one step of refinement (the corrected semi-normal
    equations), good for any right-hand side. Memory: M·P numbers, time O(M P²). A system that is singular
    to working precision gives a zero step and ``converged`` false.

    Statistics: ``dense/residual`` (relative), ``dense/converged``.

    Reference: Björck, Numerical Methods for Least Squares Problems, 1996, section 6.6.

    Example:
        >>> import gnlin
        >>> gnlin.levenberg_marquardt(
        ...     gnlin.Objective.least_squares(lambda p: p - 1.0), solver=gnlin.Dense()).init  # doctest: +ELLIPSIS
        <function ...>
    """

    def init(self, params: Params) -> tuple[Any, dict[str, jax.Array]]:
        del params
        return (), _stats(0.0, False)

    def solve(self, system: System, rhs: Params, carry: Any) -> tuple[Solution, Any]:
        dtype = tree.accumulation_dtype(rhs)
        size = tree.max_abs(rhs)
        unit = jnp.where(size > 0, size, jnp.ones_like(size))
        b = tree.flatten(rhs, dtype) / unit
        factor = _augmented_factor(system, rhs, dtype)
        upper = jnp.linalg.qr(factor, mode="r")

        def semi_normal(vector):
            inner = jax.scipy.linalg.solve_triangular(upper, vector, trans=1)
            return jax.scipy.linalg.solve_triangular(upper, inner)

        def residual_of(x):
            return b - factor.T @ (factor @ x)

        x = semi_normal(b)
        x = x + semi_normal(residual_of(x))
        x = jnp.where(jnp.all(b == 0), jnp.zeros_like(b), x)
        b_norm = jnp.linalg.norm(b)
        relative = jnp.where(b_norm > 0, jnp.linalg.norm(residual_of(x)) / jnp.where(b_norm > 0, b_norm, 1), 0)
        step = tree.unflatten(x * unit, rhs)
        sound = tree.all_finite(step) & jnp.isfinite(relative)
        step = tree.select(sound, step, tree.zeros_like(step))
        return Solution(step, _stats(jnp.where(sound, relative, 1.0), sound)), carry


def _augmented_factor(system: System, like: Params, dtype) -> jax.Array:
    """[F; √(λD)], (k + P) × P with k = min(M, P)."""
    jacobian = materialise(system.jvp, like, dtype)
    q, r = jnp.linalg.qr(jacobian.T)
    outputs_like = jax.eval_shape(system.jvp, like)
    hq = jax.vmap(lambda u: tree.flatten(system.output_hessian(tree.unflatten(u, outputs_like)), dtype))(q.T)
    projected = hq @ q
    eigenvalues, vectors = jnp.linalg.eigh((projected + projected.T) / 2)
    # Convexity of the loss makes H positive semi-definite; what is below zero is rounding.
    curvature = jnp.sqrt(jnp.maximum(eigenvalues, 0))[:, None] * (vectors.T @ r)
    ones = jnp.ones([curvature.shape[1]], dtype)
    scaling = ones if system.scaling is None else tree.flatten(system.scaling, dtype)
    return jnp.concatenate([curvature, jnp.diag(jnp.sqrt(jnp.asarray(system.damping, dtype) * scaling))])


def materialise(function, like: Params, dtype) -> jax.Array:
    """The transposed matrix, (P, M), of a linear function: row i is its value on basis vector i."""
    return jax.vmap(lambda e: tree.flatten(function(tree.unflatten(e, like)), dtype))(
        jnp.eye(tree.size(like), dtype=dtype)
    )


def _stats(residual, converged) -> dict[str, jax.Array]:
    return {"dense/residual": jnp.asarray(residual, float), "dense/converged": jnp.asarray(converged, bool)}
