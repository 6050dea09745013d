"""Inverses of many small symmetric matrices at once, in products of matrices.

`factorisation` makes the inverses of Kronecker factors here. Those of one size are one batch, which
is compiled once.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# Diagonal blocks of at most this size are inverted row by row.
_SMALLEST = 8


def inverse_of_positive_definite(matrices: jax.Array) -> jax.Array:
    r"""A⁻¹ of symmetric, positive definite matrices (B, n, n).

    With A = LLᵀ it is :math:`L^{-\top} L^{-1}`. The time of small triangular solves is not that of
    their FLOPs. On a CPU each may wait for the threads of the BLAS, and on a GPU each row waits for
    the one before. Products of matrices do neither.

    Reference: Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, chapter 14.
    """
    lower = inverse_of_triangular(jnp.linalg.cholesky(matrices))
    return jnp.swapaxes(lower, -2, -1) @ lower


def together(
    function: Callable[[jax.Array], jax.Array], matrices: Sequence[jax.Array]
) -> list[jax.Array]:
    """A function of matrices (B, n, n), for all matrices (..., n, n) of one size at once."""
    found = list(matrices)
    for size in {matrix.shape[-1] for matrix in matrices} - {0}:
        places = [place for place, matrix in enumerate(matrices) if matrix.shape[-1] == size]
        stacks = [matrices[place].reshape(-1, size, size) for place in places]
        results, start = function(jnp.concatenate(stacks)), 0
        for place, stack in zip(places, stacks, strict=True):
            part = results[start : start + len(stack)]
            found[place] = part.reshape(matrices[place].shape)
            start += len(stack)
    return found


def inverse_of_triangular(lower: jax.Array) -> jax.Array:
    r"""L⁻¹ of lower triangular matrices (B, n, n).

    Diagonal blocks are inverted first, and then doubled:

    .. math:: \begin{pmatrix} P & \\ Q & R \end{pmatrix}^{-1} =
              \begin{pmatrix} P^{-1} & \\ -R^{-1} Q P^{-1} & R^{-1} \end{pmatrix}.
    """
    count, size = lower.shape[0], lower.shape[-1]
    block, doublings = size, 0
    while block > _SMALLEST:
        block, doublings = -(-block // 2), doublings + 1
    # Up to a size that doubles from there: the identity in the corner changes nothing before it.
    padded = block * 2**doublings
    extra = jnp.arange(padded) >= size
    corner = jnp.diag(extra.astype(lower.dtype))
    lower = jnp.pad(lower, [(0, 0), *[(0, padded - size)] * 2]) + corner[None]

    inverse = _row_by_row(_diagonal_blocks(lower, block))
    while block < padded:
        pairs = inverse.reshape(count, -1, 2, block, block)
        first, last = pairs[:, :, 0], pairs[:, :, 1]
        below = _diagonal_blocks(lower, 2 * block)[:, :, block:, :block]
        corner = -last @ below @ first
        inverse = jnp.block([[first, jnp.zeros_like(first)], [corner, last]])
        block *= 2
    return inverse[:, 0, :size, :size]


def _diagonal_blocks(matrix: jax.Array, block: int) -> jax.Array:
    """(B, n / block, block, block) of matrices (B, n, n)."""
    count, number = len(matrix), matrix.shape[-1] // block
    cells = matrix.reshape(count, number, block, number, block)
    return jnp.moveaxis(jnp.diagonal(cells, axis1=1, axis2=3), -1, 1)


def _row_by_row(lower: jax.Array) -> jax.Array:
    """L⁻¹ by forward substitution, for all matrices (..., n, n) at once."""
    size = lower.shape[-1]

    def solve_row(inverse, row):
        # Rows that are not known yet are zero.
        here = jax.lax.dynamic_index_in_dim(lower, row, axis=-2, keepdims=False)
        known = jnp.sum(here[..., None] * inverse, axis=-2)
        unit = (jnp.arange(size) == row).astype(lower.dtype)
        pivot = jax.lax.dynamic_index_in_dim(here, row, axis=-1)
        found = (jnp.broadcast_to(unit, known.shape) - known) / pivot
        return jax.lax.dynamic_update_index_in_dim(inverse, found, row, axis=-2), None

    # A loop, because written out it would take as long to compile as the rest of the inverse.
    return jax.lax.scan(solve_row, jnp.zeros_like(lower), jnp.arange(size))[0]
