"""The damped system solved directly, by orthogonal factorisation.

A transform calls `Dense.solve` with λ. `levenberg_marquardt` with a `TrustRegion` calls
`Dense.solve_within`, which finds λ from the radius. The helpers below follow the formulas of
`Dense`, and the direction goes back to the transform.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import shows_signature
from gnlin.problem.curvature import System
from gnlin.sharding import check_mesh
from gnlin.solve.protocols import Solution, Stats
from gnlin.tree import Params


@shows_signature
@dataclasses.dataclass(frozen=True)
class Dense:
    r"""Direct solve by QR of the augmented system, for up to a few thousand parameters.

    J (M × P, M outputs and P parameters) is materialised. A factor F with
    :math:`F^\top F = J^\top H J` is built without that product, whose condition number is the
    square of J's:

    .. math:: J = QR, \quad Q^\top H Q = V \Lambda V^\top, \quad F = \Lambda^{1/2} V^\top R, \qquad
              \begin{pmatrix} F \\ \sqrt{\lambda D} \end{pmatrix} = Q' R'.

    Two triangular solves with :math:`R'^\top R' x = b` and one refinement follow (the corrected
    semi-normal equations). They serve any right-hand side. Memory: M·P numbers, time O(M P²). A
    system that is singular to working precision gives ``converged`` false. Where the residual is
    not even halved the direction is zero.

    Statistics: ``dense/residual`` (relative), ``dense/converged`` (residual at most √ε).

    Reference: Björck, Numerical Methods for Least Squares Problems, 1996, section 6.6.

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> objective = gnlin.Objective.least_squares(lambda p: jnp.array([3.0, 4.0]) * p - 1.0)
        >>> tx = gnlin.scale_by_gauss_newton(objective, damping=0.0, solver=gnlin.Dense())
        >>> params = jnp.zeros(2)
        >>> updates, _ = tx.update(None, tx.init(params), params)
        >>> -updates.round(4)   # a linear problem: solved in one step
        Array([0.3333, 0.25  ], dtype=float32)
    """

    def init(self, params: Params) -> tuple[Any, Stats]:
        del params
        return (), _stats(0.0, False)

    def solve(self, system: System, rhs: Params, state: Any) -> tuple[Solution, Any]:
        check_mesh(rhs)
        dtype = tree.accumulation_dtype(rhs)
        b, unit = _to_unit_size(rhs, dtype)
        curvature, diagonal = _curvature_factor(system, rhs, dtype), _diagonal(system, rhs, dtype)
        return _solve(curvature, diagonal, system.damping, b, unit, rhs), state

    def solve_within(
        self, system: System, rhs: Params, state: Any, radius: chex.Numeric
    ) -> tuple[Solution, Any, jax.Array]:
        """Solve with the least λ for which ‖D^½ x‖ ≤ `radius`; also returns that λ.

        The damping of `system` is not used. λ stays above ε‖D^-½ G D^-½‖, the resolution of the
        right-hand side. Below it rounding errors in b would grow to the size of the direction.
        """
        check_mesh(rhs)
        dtype = tree.accumulation_dtype(rhs)
        b, unit = _to_unit_size(rhs, dtype)
        curvature, diagonal = _curvature_factor(system, rhs, dtype), _diagonal(system, rhs, dtype)
        # In y = D^½ x the radius bounds ‖y‖, and the system is (D^-½ G D^-½ + λI) y = D^-½ b.
        root = jnp.where(diagonal > 0, jnp.sqrt(diagonal), 1)
        scaled = b / root
        # F D^-½ = U S Vᵀ and c = Vᵀ D^-½ b: then ‖y(λ)‖² = Σ cᵢ² / (sᵢ² + λ)².
        _, singular_values, rows = jnp.linalg.svd(curvature / root[None, :], full_matrices=False)
        coefficients = rows @ scaled
        # The part of b without curvature belongs to a singular value of zero.
        flat = jnp.linalg.norm(scaled - rows.T @ coefficients)
        damping = _damping_within(
            jnp.append(singular_values, 0),
            jnp.append(coefficients, flat),
            jnp.asarray(radius, dtype) / unit,
        )
        return _solve(curvature, diagonal, damping, b, unit, rhs), state, damping


def _to_unit_size(rhs: Params, dtype) -> tuple[jax.Array, jax.Array]:
    """``(b, unit)`` with rhs = unit · b and the entries of b at most 1."""
    size = tree.max_abs(rhs)
    unit = jnp.where(size > 0, size, jnp.ones_like(size))
    return tree.flatten(rhs, dtype) / unit, unit


def _diagonal(system: System, like: Params, dtype) -> jax.Array:
    return (
        jnp.ones([tree.size(like)], dtype)
        if system.scaling is None
        else tree.flatten(system.scaling, dtype)
    )


def _curvature_factor(system: System, like: Params, dtype) -> jax.Array:
    """F, k × P with k = min(M, P)."""
    jacobian = materialise(system.jvp, like, dtype)
    # The rows of `jacobian` are the columns of J: q is (M, k) and r is (k, P).
    q, r = jnp.linalg.qr(jacobian.T)
    outputs_like = jax.eval_shape(system.jvp, like)
    hq = jax.vmap(
        lambda u: tree.flatten(system.output_hessian(tree.unflatten(u, outputs_like)), dtype)
    )(q.T)
    # Row i of `hq` is (Hqᵢ)ᵀ, so this is qᵀHq, (k, k), symmetric up to rounding.
    projected = hq @ q
    eigenvalues, vectors = jnp.linalg.eigh((projected + projected.T) / 2)
    # Convexity of the loss makes H positive semi-definite: below zero there is only rounding.
    return jnp.sqrt(jnp.maximum(eigenvalues, 0))[:, None] * (vectors.T @ r)


def _solve(curvature, diagonal, damping, b, unit, like) -> Solution:
    factor = jnp.concatenate(
        [curvature, jnp.diag(jnp.sqrt(jnp.asarray(damping, b.dtype) * diagonal))]
    )
    # R' of (F; √(λD)), (P, P). Its condition number is the square root of the system's.
    upper = jnp.linalg.qr(factor, mode="r")

    def semi_normal(vector):
        inner = jax.scipy.linalg.solve_triangular(upper, vector, trans=1)
        return jax.scipy.linalg.solve_triangular(upper, inner)

    def residual_of(x):
        return b - factor.T @ (factor @ x)

    # Without the second turn, a correction, the error would be that of the normal equations, with
    # the square of the condition number of the factor. The loop is compiled once.
    x = jax.lax.fori_loop(0, 2, lambda _, x: x + semi_normal(residual_of(x)), jnp.zeros_like(b))
    # A singular system would give 0/0 for b = 0, too.
    x = jnp.where(jnp.all(b == 0), jnp.zeros_like(b), x)
    b_norm = jnp.linalg.norm(b)
    relative = jnp.where(
        b_norm > 0, jnp.linalg.norm(residual_of(x)) / jnp.where(b_norm > 0, b_norm, 1), 0
    )
    direction = tree.unflatten(x * unit, like)
    # A direction that leaves half of b unexplained is rounding errors, not a solution.
    usable = tree.all_finite(direction) & (relative < 0.5)
    direction = tree.select(usable, direction, tree.zeros_like(direction))
    converged = usable & (relative <= jnp.finfo(b.dtype).eps ** 0.5)
    return Solution(direction, _stats(jnp.where(usable, relative, 1.0), converged))


def _damping_within(
    singular_values: jax.Array, coefficients: jax.Array, radius: jax.Array
) -> jax.Array:
    """The λ with ‖c / (s² + λ)‖ = Δ, or a floor where the norm is less even there.

    Newton's iteration solves the secular equation 1/Δ − 1/‖c / (s² + λ)‖ = 0. It is nearly linear
    in λ, and is approached from the left. Reference: Moré 1978, section 5.
    """
    eps = jnp.finfo(coefficients.dtype).eps
    # In units in which the largest s² and ‖c‖ are 1 nothing overflows. Without curvature λ = ‖c‖/Δ
    # is the answer.
    size = jnp.linalg.norm(coefficients)
    coefficients = coefficients / jnp.where(size > 0, size, 1)
    largest = jnp.max(singular_values, initial=0)
    scale = jnp.where(largest > 0, largest**2, size / radius)
    squares = (singular_values / jnp.where(largest > 0, largest, 1)) ** 2
    # Lengths are at most 1/ε here, so their quotients by such a radius stay finite.
    radius = jnp.maximum(
        radius * scale / jnp.where(size > 0, size, 1), jnp.finfo(squares.dtype).tiny / eps
    )

    def length_and_next(damping):
        terms = coefficients / (squares + damping)
        length = jnp.linalg.norm(terms)
        decay = jnp.sum(terms**2 / (squares + damping)) / length  # −d length / dλ
        # Newton's step for 1/Δ − 1/length in λ.
        return length, damping + (length / radius - 1) * length / jnp.where(decay > 0, decay, 1)

    def outside(now):
        _, length, following, count = now
        # Comparisons with a NaN are false, so a NaN ends the iteration.
        beyond = (jnp.abs(length - radius) > 1e-5 * radius) & (count < 31) & (following > eps)
        return (count == 0) | beyond

    def iterate(now):
        _, _, following, count = now
        return following, *length_and_next(following), count + 1

    floor = jnp.asarray(eps, squares.dtype)
    # The first turn evaluates at the floor: compiled once, and not once more before the loop.
    _, _, following, _ = jax.lax.while_loop(outside, iterate, (floor, floor, floor, 0))
    return scale * jnp.maximum(following, floor)


def materialise(function, like: Params, dtype) -> jax.Array:
    """The transposed matrix, (P, M), of a linear function: row i is its value on basis vector i."""
    return jax.vmap(lambda e: tree.flatten(function(tree.unflatten(e, like)), dtype))(
        jnp.eye(tree.size(like), dtype=dtype)
    )


def _stats(residual, converged) -> Stats:
    return {
        "dense/residual": jnp.asarray(residual, float),
        "dense/converged": jnp.asarray(converged, bool),
    }
