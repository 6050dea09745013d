"""Inverses of large symmetric matrices from their leading eigenvectors.

`factorisation` makes the inverses of the long sides of Kronecker factors here. Few eigenvalues of a
factor are larger than its share of the damping, however long the side is.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlin.solve.inverses import inverse_of_positive_definite

# The least eigenvalues of QᵀAQ must not drown in the largest, and d·g and Q C Qᵀg nearly cancel
# along the leading ones: products in TF32, accelerators' default, are too coarse.
_EXACTLY = jax.lax.Precision.HIGHEST


class LowRank(NamedTuple):
    """diag(d) − Q C Qᵀ, for each of B matrices."""

    diagonal: jax.Array  # d, (B, n)
    basis: jax.Array  # Q, (B, n, rank)
    core: jax.Array  # C, (B, rank, rank)


def inverse_of_shifted(matrices: jax.Array, shift: jax.Array, rank: int) -> LowRank:
    r"""(A + sI)⁻¹ of symmetric, positive semidefinite matrices (B, n, n), nearly.

    Let Q span the leading eigenvectors. A is taken for :math:`Q T Q^\top` there, with
    :math:`T = Q^\top A Q`, and for a multiple t of the identity on the rest, the mean of its
    eigenvalues:

    .. math:: (A + sI)^{-1} \approx \frac{1}{s + t}\, I
              - Q \Big(\frac{1}{s + t}\, I - (T + sI)^{-1}\Big) Q^\top, \qquad
              t = \frac{\operatorname{tr} A - \operatorname{tr} T}{n - \mathrm{rank}}.

    Q comes from a random start and two products with A. It is exact where A has no more than `rank`
    eigenvalues that are not zero. Where many others are above s, those just outside count for too
    little, and their directions are too long.

    Args:
        matrices: A.
        shift: s, (B,), positive.
        rank: less than n.

    Reference: Halko, Martinsson & Tropp, Finding structure with randomness, 2011, algorithm 4.4;
    Puiu, Randomized K-FACs, arXiv 2206.15397.
    """
    count, size = matrices.shape[:2]
    start = jax.random.normal(jax.random.key(0), (size, rank), matrices.dtype)
    basis = jnp.linalg.qr(matrices @ start[None])[0]
    basis = jnp.linalg.qr(matrices @ basis)[0]
    across = jnp.swapaxes(basis, -2, -1)
    inner = _product(across, _product(matrices, basis))
    inner = (inner + jnp.swapaxes(inner, -2, -1)) / 2
    rest = _trace(matrices) - _trace(inner)
    others = 1 / (shift + jnp.maximum(rest, 0) / (size - rank))
    identity = jnp.eye(rank, dtype=matrices.dtype)[None]
    within = inverse_of_positive_definite(inner + shift[:, None, None] * identity)
    diagonal = jnp.broadcast_to(others[:, None], (count, size))
    return LowRank(diagonal, basis, others[:, None, None] * identity - within)


def of_diagonal(diagonal: jax.Array, rank: int) -> LowRank:
    """Diagonal matrices (B, n) in this form."""
    count, size = diagonal.shape
    dtype = diagonal.dtype
    return LowRank(
        diagonal, jnp.zeros([count, size, rank], dtype), jnp.zeros([count, rank, rank], dtype)
    )


def padded(matrices: LowRank, size: int) -> LowRank:
    """Matrices (B, size, size), with zeros in the rows and columns that are new."""
    spare = size - matrices.diagonal.shape[-1]
    diagonal = jnp.pad(matrices.diagonal, [(0, 0), (0, spare)])
    basis = jnp.pad(matrices.basis, [(0, 0), (0, spare), (0, 0)])
    return LowRank(diagonal, basis, matrices.core)


def cropped(matrices: LowRank, length: int) -> LowRank:
    """The first rows and columns."""
    return LowRank(matrices.diagonal[:, :length], matrices.basis[:, :length], matrices.core)


def concatenated(parts: Sequence[Any]) -> Any:
    """One array, or record of arrays, of several, along their first axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def times(matrices: LowRank, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """The products with matrices (B, n, m), whose rows come in parts and go in the same.

    A copy of a large matrix beside its bias would take as long as a product.
    """
    diagonals, bases = _in_parts(matrices, [part.shape[1] for part in parts])
    pairs = zip(bases, parts, strict=True)
    inner = [_product(jnp.swapaxes(q, -2, -1), part) for q, part in pairs]
    small = _product(matrices.core, functools.reduce(jnp.add, inner))
    known = zip(diagonals, bases, parts, strict=True)
    return [d[:, :, None] * part - _product(q, small) for d, q, part in known]


def times_from_right(parts: Sequence[jax.Array], matrices: LowRank) -> list[jax.Array]:
    """The products of matrices (B, m, n) with these, where their columns come in parts."""
    diagonals, bases = _in_parts(matrices, [part.shape[2] for part in parts])
    inner = [_product(part, q) for q, part in zip(bases, parts, strict=True)]
    small = _product(functools.reduce(jnp.add, inner), matrices.core)
    known = zip(diagonals, bases, parts, strict=True)
    return [part * d[:, None, :] - _product(small, jnp.swapaxes(q, -2, -1)) for d, q, part in known]


def _in_parts(matrices: LowRank, lengths: Sequence[int]) -> tuple[list[jax.Array], list[jax.Array]]:
    ends = list(itertools.accumulate(lengths))[:-1]
    return jnp.split(matrices.diagonal, ends, axis=1), jnp.split(matrices.basis, ends, axis=1)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=_EXACTLY)


def _trace(matrices: jax.Array) -> jax.Array:
    return jnp.trace(matrices, axis1=-2, axis2=-1)
