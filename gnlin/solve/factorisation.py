"""The inverse of damped Kronecker factors.

`kronecker` averages the factors, asks here for their inverse, and keeps it. Matrices of one size
lie in one array, whatever leaves they belong to. A network has many layers and few sizes, and an
operation is compiled once for each size. Large sizes go to `low_rank`.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gnlin import tree
from gnlin.solve import low_rank
from gnlin.solve.factors import Factors, diagonal_of, is_full
from gnlin.solve.inverses import inverse_of_positive_definite
from gnlin.solve.low_rank import LowRank
from gnlin.solve.sides import (
    Place,
    have_diagonals,
    member_count,
    places_of_diagonals,
    places_of_matrices,
    used_lengths,
)
from gnlin.structure.layers import Layout, Use


class Inverse(NamedTuple):
    """(A + π√λ I)⁻¹ and (S + √λ/π I)⁻¹ of all leaves, and 1 / (diag G + λ) of vectors.

    A matrix is as large as its moment. What the leaf does not use is zero, and so are both sides of
    a bias that has the shape of a matrix.
    """

    # (B, n, n) for each size, in the order of leaves and sides, or a `LowRank` of as many matrices.
    matrices: tuple[jax.Array | LowRank, ...]
    diagonals: tuple[jax.Array, ...]  # of the other sides and of the vectors, like their moments


class _Side(NamedTuple):
    """A side whose inverse is wanted."""

    place: Place
    count: int  # members of the stack
    length: int  # as far as the leaf uses it
    size: int  # of its matrices, 0 where the moment is a diagonal
    is_diagonal: bool  # whatever the shape of its moment


def empty_inverse(
    factors: Sequence[Factors], layouts: Sequence[Layout], rank: int | None
) -> Inverse:
    """Zeros in the shapes of an inverse."""
    dtype = factors[0].left.dtype if factors else None
    matrices = tuple(
        _nothing(sum(member_count(layouts[leaf]) for leaf, _ in places), size, rank, dtype)
        for size, places in places_of_matrices(factors, layouts).items()
    )
    diagonals = (factors[leaf][side] for leaf, side in places_of_diagonals(factors, layouts))
    return Inverse(matrices, tuple(jnp.zeros_like(moment) for moment in diagonals))


def inverse_of(
    uses: Sequence[Use], factors: Sequence[Factors], damping: jax.Array, rank: int | None
) -> tuple[Inverse, jax.Array]:
    """``(inverse, whether it and the factors are finite)``; zeros where they are not.

    Sides that are more than eight times as long as `rank` have an inverse of that rank.
    """
    layouts = [use.layout for use in uses]
    inverses, means = _inverse_sides(_sides(uses, factors), factors, layouts, damping, rank)

    def of_matrix(place: Place, size: int) -> jax.Array | LowRank:
        # A bias of a layer has no factors of its own.
        nothing = _nothing(member_count(layouts[place[0]]), size, rank, damping.dtype)
        return inverses.get(place, nothing)

    def of_diagonal(place: Place) -> jax.Array:
        moment = factors[place[0]][place[1]]
        if layouts[place[0]].is_vector:
            return _reciprocal(moment + damping)
        if place not in inverses:
            return jnp.zeros_like(moment)
        spare = moment.shape[-1] - inverses[place].shape[-1]
        return jnp.pad(inverses[place], [(0, 0), (0, spare)]).reshape(moment.shape)

    matrices = tuple(
        low_rank.concatenated([of_matrix(place, size) for place in places])
        for size, places in places_of_matrices(factors, layouts).items()
    )
    inverse = Inverse(matrices, tuple(map(of_diagonal, places_of_diagonals(factors, layouts))))
    vectors = [pair.left for pair, each in zip(factors, layouts, strict=True) if each.is_vector]
    # The reciprocal of an infinite moment is 0, and finite.
    sound = tree.all_finite((inverse, means, vectors))
    return tree.select(sound, inverse, tree.zeros_like(inverse)), sound


def members_of(matrices: jax.Array | LowRank, start: int, end: int) -> jax.Array | LowRank:
    return jax.tree.map(lambda part: part[start:end], matrices)


# Sides of one size and one used length are inverted together.


def _inverse_sides(
    sides: Sequence[_Side],
    factors: Sequence[Factors],
    layouts: Sequence[Layout],
    damping: jax.Array,
    rank: int | None,
) -> tuple[dict[Place, Any], jax.Array]:
    """The inverse of each side, (members, n, n), or (members, n) of a diagonal, and the mean of the
    diagonal of each member.
    """
    parts: dict[tuple, list[_Side]] = {}
    for each in sides:
        parts.setdefault((each.size, each.length, each.is_diagonal), []).append(each)
    moments = [
        jnp.concatenate([_moment_of(each, factors, layouts) for each in part])
        for part in parts.values()
    ]
    shares, means = _shares(list(parts.values()), moments, damping)
    found = {}
    for part, moment, share in zip(parts.values(), moments, shares, strict=True):
        size = part[0].size
        inverse, start = _inverse_of_shifted(moment, share, size, _rank_of(size, rank)), 0
        for each in part:
            found[each.place] = members_of(inverse, start, start + each.count)
            start += each.count
    return found, means


def _shares(
    parts: Sequence[Sequence[_Side]], moments: Sequence[jax.Array], damping: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """π√λ or √λ/π for each member of the sides of each part, (members,), and the means of all."""
    if not parts:
        return [], jnp.zeros([0], damping.dtype)
    diagonals = [diagonal_entries(moment) for moment in moments]
    means = jnp.concatenate([each.sum(axis=-1) / max(each.shape[-1], 1) for each in diagonals])
    members, number = {}, 0  # the numbers of the members of a side
    sides = list(itertools.chain.from_iterable(parts))
    for each in sides:
        members[each.place] = np.arange(number, number + each.count)
        number += each.count
    # Of each member the partner on the other side of its leaf.
    partner = np.concatenate([members[leaf, 1 - side] for leaf, side in members])
    # π is 1 where a side has no curvature: the quotient of the traces says nothing there.
    theirs = means[partner]
    known = (means > 0) & (theirs > 0)
    # (π√λ)(√λ/π) = λ: the product of both shares is the damping of the system.
    pi = jnp.sqrt(jnp.where(known, means / jnp.where(known, theirs, 1), 1))
    share = pi * jnp.sqrt(damping)
    # Cholesky's factorisation of a matrix that is singular to working precision would fail.
    lengths = np.concatenate([np.full(each.count, each.length) for each in sides])
    floor = jnp.asarray(10 * lengths * float(jnp.finfo(means.dtype).eps), means.dtype)
    share = jnp.maximum(share, jnp.where(means > 0, floor * means, 1))
    ends = np.cumsum([len(moment) for moment in moments])[:-1]
    return jnp.split(share, ends), means


def _inverse_of_shifted(
    moment: jax.Array, share: jax.Array, size: int, rank: int | None
) -> jax.Array | LowRank:
    """(A + share I)⁻¹ of matrices or diagonals, in matrices of this size.

    With size 0 the inverse of a diagonal is a diagonal.
    """
    if moment.ndim == 2:
        inverse = _reciprocal(moment + share[:, None]) if moment.size else moment
        if rank is None:
            return _padded(inverse, size) if size else inverse
        return low_rank.padded(low_rank.of_diagonal(inverse, rank), size)
    if rank is not None and moment.size:
        return low_rank.padded(low_rank.inverse_of_shifted(moment, share, rank), size)
    identity = jnp.eye(moment.shape[-1], dtype=moment.dtype)
    shifted = moment + share[:, None, None] * identity[None]
    return _padded(inverse_of_positive_definite(shifted) if moment.size else moment, size)


def _rank_of(size: int, rank: int | None) -> int | None:
    """The rank of the inverse of a matrix of this size; `None` for a whole one."""
    # A moment is one longer than its side.
    return rank if rank is not None and size - 1 > 8 * rank else None


def _reciprocal(numbers: jax.Array) -> jax.Array:
    return 1 / jnp.where(numbers == 0, 1, numbers)


def diagonal_entries(moment: jax.Array) -> jax.Array:
    return jnp.diagonal(moment, axis1=-2, axis2=-1) if moment.ndim == 3 else moment


def _nothing(count: int, size: int, rank: int | None, dtype: Any) -> jax.Array | LowRank:
    """Zeros for so many matrices."""
    own = _rank_of(size, rank)
    if own is not None:
        return low_rank.of_diagonal(jnp.zeros([count, size], dtype), own)
    return jnp.zeros([count, size, size], dtype)


def _sides(uses: Sequence[Use], factors: Sequence[Factors]) -> list[_Side]:
    """The sides of all leaves that are matrices, but not of biases of layers."""
    layouts, found = [use.layout for use in uses], []
    full = places_of_matrices(factors, layouts)
    places = [place for of_size in full.values() for place in of_size]
    for leaf, side in places + places_of_diagonals(factors, layouts):
        use, moment = uses[leaf], factors[leaf][side]
        if use.layout.is_vector or use.bias_of is not None:
            continue
        size = moment.shape[-1] if is_full(moment, use.layout) else 0
        is_diagonal = not size or have_diagonals(use)[side]
        length = used_lengths(use)[side]
        found.append(_Side((leaf, side), member_count(use.layout), length, size, is_diagonal))
    return found


def _moment_of(side: _Side, factors: Sequence[Factors], layouts: Sequence[Layout]) -> jax.Array:
    """(members, n, n), or (members, n) of a diagonal, as far as the leaf uses it."""
    leaf, which = side.place
    part = _leading(factors[leaf][which], side.length, layouts[leaf], side.is_diagonal)
    return part.reshape(side.count, *part.shape[layouts[leaf].stack :])


def _leading(moment: jax.Array, length: int, layout: Layout, is_diagonal: bool) -> jax.Array:
    if is_diagonal or not is_full(moment, layout):
        return diagonal_of(moment, layout)[..., :length]
    return moment[..., :length, :length]


def _padded(inverse: jax.Array, size: int) -> jax.Array:
    """Matrices of this size, the rest zeros."""
    if inverse.ndim == 2:
        inverse = inverse[..., None] * jnp.eye(inverse.shape[-1], dtype=inverse.dtype)[None]
    spare = size - inverse.shape[-1]
    return jnp.pad(inverse, [(0, 0), (0, spare), (0, spare)])
