"""The inverse of damped Kronecker factors, and its product with a vector.

`kronecker` averages the factors, keeps their inverse, and asks here for both. Matrices of one size
lie in one array, whatever leaves they belong to. A network has many layers and few sizes, and an
operation is compiled once for each size. Large sizes go to `low_rank`.
"""

import itertools
import math
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
from gnlin.structure.layers import Layout, Use
from gnlin.tree import Params

# A side of a leaf: 0 for rows, 1 for columns.
Place = tuple[int, int]


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
        _nothing(sum(_members(layouts[leaf]) for leaf, _ in places), size, rank, dtype)
        for size, places in _matrices(factors, layouts).items()
    )
    diagonals = (factors[leaf][side] for leaf, side in _diagonals(factors, layouts))
    return Inverse(matrices, tuple(jnp.zeros_like(moment) for moment in diagonals))


def inverse_of(
    uses: Sequence[Use], factors: Sequence[Factors], damping: jax.Array, rank: int | None
) -> tuple[Inverse, jax.Array]:
    """``(inverse, whether it and the factors are finite)``; zeros where they are not.

    Matrices that are more than eight times as large as `rank` have an inverse of that rank.
    """
    layouts = [use.layout for use in uses]
    inverses, means = _inverse_sides(_sides(uses, factors), factors, layouts, damping, rank)

    def of_matrix(place: Place, size: int) -> jax.Array | LowRank:
        # A bias of a layer has no factors of its own.
        nothing = _nothing(_members(layouts[place[0]]), size, rank, damping.dtype)
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
        for size, places in _matrices(factors, layouts).items()
    )
    inverse = Inverse(matrices, tuple(map(of_diagonal, _diagonals(factors, layouts))))
    vectors = [pair.left for pair, each in zip(factors, layouts, strict=True) if each.is_vector]
    # The reciprocal of an infinite moment is 0, and finite.
    sound = tree.all_finite((inverse, means, vectors))
    return tree.select(sound, inverse, tree.zeros_like(inverse)), sound


def apply_inverse(
    uses: Sequence[Use], inverse: Inverse, factors: Sequence[Factors], vector: Params
) -> Params:
    """M⁻¹v, where a bias of a layer is one more row or column of its weight.

    Args:
        uses: of the leaves.
        inverse: of the damped factors.
        factors: any in their shapes.
        vector: v.
    """
    dtype = tree.accumulation_dtype(vector)
    flat = [leaf.astype(dtype) for leaf in jax.tree.leaves(vector)]
    stored = _Stored(inverse, factors, [use.layout for use in uses])
    out: list[jax.Array] = list(flat)
    alike: dict[tuple, list[int]] = {}
    for leaf, use in enumerate(uses):
        if use.layout.is_vector and use.bias_of is None:
            out[leaf] = flat[leaf] * stored.diagonals[leaf, 0].reshape(flat[leaf].shape)
        elif use.bias_of is None:
            axis = None if use.bias is None else _side_of_inputs(use) - 2
            # A copy of a large one costs more time than it is to compile.
            alone = leaf if any(stored.is_large(leaf)) else None
            key = alone, use.layout.sides, axis, _are_diagonal(use)
            alike.setdefault(key, []).append(leaf)
    # Leaves that take the same products take them together.
    for (_, _, axis, are_diagonal), leaves in alike.items():
        lengths = _used_lengths(uses[leaves[0]])
        rows, columns = (
            stored.leading([(leaf, side) for leaf in leaves], lengths[side], are_diagonal[side])
            for side in (0, 1)
        )
        parts = _stack(uses, leaves, flat, axis)
        if len(parts) > 1 and not isinstance((rows, columns)[axis], LowRank):
            parts = [jnp.concatenate(parts, axis=axis)]
        parts = _times_columns(_times_rows(rows, parts, axis), columns, axis)
        if axis is not None and len(parts) == 1:
            parts = jnp.split(parts[0], [parts[0].shape[axis] - 1], axis=axis)
        _unstack(uses, leaves, parts, out)
    return tree.cast_like(jax.tree.unflatten(jax.tree.structure(vector), out), vector)


def _stack(
    uses: Sequence[Use], leaves: Sequence[int], flat: Sequence[jax.Array], axis: int | None
) -> list[jax.Array]:
    """Equal matrices (members, rows, columns), and biases, whose length along `axis` is 1."""
    sides = uses[leaves[0]].layout.sides
    counts = [_members(uses[leaf].layout) for leaf in leaves]
    weights = jnp.concatenate(
        [flat[leaf].reshape(count, *sides) for leaf, count in zip(leaves, counts, strict=True)]
    )
    if axis is None:
        return [weights]
    # A bias as long as the side that has none of it.
    length = sides[1] if axis == -2 else sides[0]
    beside = [flat[_bias(uses[leaf])] for leaf in leaves]
    biases = jnp.concatenate(
        [bias.reshape(count, length) for bias, count in zip(beside, counts, strict=True)]
    )
    return [weights, jnp.expand_dims(biases, axis)]


def _unstack(
    uses: Sequence[Use], leaves: Sequence[int], parts: Sequence[jax.Array], out: list[jax.Array]
) -> None:
    """The inverse of `_stack`. It replaces entries of `out`, in their shapes."""
    weights, *biases = parts
    start = 0
    for leaf in leaves:
        end = start + _members(uses[leaf].layout)
        out[leaf] = weights[start:end].reshape(out[leaf].shape)
        for each in biases:
            bias = _bias(uses[leaf])
            out[bias] = each[start:end].reshape(out[bias].shape)
        start = end


def _bias(use: Use) -> int:
    assert use.bias is not None  # where matrices have an axis for biases
    return use.bias


def _times_rows(
    rows: jax.Array | LowRank, parts: Sequence[jax.Array], axis: int | None
) -> list[jax.Array]:
    """The products with each part, or with all of them as one matrix along `axis`."""
    if isinstance(rows, LowRank):
        groups = [parts] if axis == -2 else [[part] for part in parts]
        return [each for group in groups for each in low_rank.times(rows, group)]
    return [rows @ part if rows.ndim == 3 else rows[:, :, None] * part for part in parts]


def _times_columns(
    parts: Sequence[jax.Array], columns: jax.Array | LowRank, axis: int | None
) -> list[jax.Array]:
    if isinstance(columns, LowRank):
        groups = [parts] if axis == -1 else [[part] for part in parts]
        return [each for group in groups for each in low_rank.times_from_right(group, columns)]
    return [part @ columns if columns.ndim == 3 else part * columns[:, None, :] for part in parts]


class _Stored:
    """The sides of an inverse."""

    def __init__(self, inverse: Inverse, factors: Sequence[Factors], layouts: Sequence[Layout]):
        self.diagonals = dict(zip(_diagonals(factors, layouts), inverse.diagonals, strict=True))
        # The matrices of a place, and the numbers of its members there.
        self._where: dict[Place, tuple[jax.Array | LowRank, int, int]] = {}
        of_sizes = zip(inverse.matrices, _matrices(factors, layouts).values(), strict=True)
        for matrices, places in of_sizes:
            start = 0
            for place in places:
                end = start + _members(layouts[place[0]])
                self._where[place] = matrices, start, end
                start = end

    def is_large(self, leaf: int) -> list[bool]:
        places = (leaf, 0), (leaf, 1)
        return [isinstance(self._where[p][0], LowRank) for p in places if p in self._where]

    def leading(
        self, places: Sequence[Place], length: int, is_diagonal: bool
    ) -> jax.Array | LowRank:
        """(members, length, length) of these places, or (members, length) of diagonals."""
        parts: list[tuple[jax.Array | LowRank, int, int]] = []
        for place in places:
            if place not in self._where:
                diagonal = self.diagonals[place]
                matrices = diagonal.reshape(-1, diagonal.shape[-1])
                found = matrices, 0, len(matrices)
            else:
                found = self._where[place]
            # One slice instead of many where they lie side by side.
            if parts and parts[-1][0] is found[0] and parts[-1][2] == found[1]:
                found = found[0], parts.pop()[1], found[2]
            parts.append(found)
        whole = low_rank.concatenated([_members_of(*part) for part in parts])
        if isinstance(whole, LowRank):
            return whole.diagonal[:, :length] if is_diagonal else low_rank.leading(whole, length)
        if whole.ndim == 3 and is_diagonal:
            whole = _diagonal(whole)
        return whole[(slice(None), *[slice(length)] * (whole.ndim - 1))]


def _members_of(matrices: jax.Array | LowRank, start: int, end: int) -> jax.Array | LowRank:
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
        inverse, start = _inverse_of_shifted(moment, share, part[0].size, rank), 0
        for each in part:
            found[each.place] = _members_of(inverse, start, start + each.count)
            start += each.count
    return found, means


def _shares(
    parts: Sequence[Sequence[_Side]], moments: Sequence[jax.Array], damping: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """π√λ or √λ/π for each member of the sides of each part, (members,), and the means of all."""
    if not parts:
        return [], jnp.zeros([0], damping.dtype)
    diagonals = [_diagonal(moment) for moment in moments]
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
        if not is_large(size, rank):
            return _padded(inverse, size) if size else inverse
        return low_rank.padded(low_rank.of_diagonal(inverse, rank), size)
    if is_large(size, rank):
        return low_rank.padded(low_rank.inverse_of_shifted(moment, share, rank), size)
    identity = jnp.eye(moment.shape[-1], dtype=moment.dtype)
    shifted = moment + share[:, None, None] * identity[None]
    return _padded(inverse_of_positive_definite(shifted) if moment.size else moment, size)


def is_large(size: int, rank: int | None) -> bool:
    return rank is not None and size > 8 * rank


def _reciprocal(numbers: jax.Array) -> jax.Array:
    return 1 / jnp.where(numbers == 0, 1, numbers)


def _diagonal(moment: jax.Array) -> jax.Array:
    return jnp.diagonal(moment, axis1=-2, axis2=-1) if moment.ndim == 3 else moment


# Shapes. A moment has a spare row and column for a bias, and a matrix even for rows that are looked
# up, because the state is shaped before the first batch is seen.


def _nothing(count: int, size: int, rank: int | None, dtype: Any) -> jax.Array | LowRank:
    """Zeros for so many matrices."""
    if is_large(size, rank):
        return low_rank.of_diagonal(jnp.zeros([count, size], dtype), rank)
    return jnp.zeros([count, size, size], dtype)


def _matrices(factors: Sequence[Factors], layouts: Sequence[Layout]) -> dict[int, list[Place]]:
    """The places of the matrices of each size, those of equal leaves side by side."""
    found: dict[int, list[Place]] = {}
    for place in sorted(_places(layouts), key=lambda place: (layouts[place[0]].sides, place[1])):
        moment = factors[place[0]][place[1]]
        if is_full(moment, layouts[place[0]]):
            found.setdefault(moment.shape[-1], []).append(place)
    return found


def _diagonals(factors: Sequence[Factors], layouts: Sequence[Layout]) -> list[Place]:
    """The places of the diagonals, those of vectors among them."""
    return [
        (leaf, side)
        for leaf, side in _places(layouts)
        if not is_full(factors[leaf][side], layouts[leaf])
    ]


def _places(layouts: Sequence[Layout]) -> list[Place]:
    """A vector has one side."""
    return [
        (leaf, side)
        for leaf, layout in enumerate(layouts)
        for side in range(1 if layout.is_vector else 2)
    ]


def _sides(uses: Sequence[Use], factors: Sequence[Factors]) -> list[_Side]:
    """The sides of all leaves that are matrices, but not of biases of layers."""
    layouts, found = [use.layout for use in uses], []
    full = _matrices(factors, layouts)
    places = [place for of_size in full.values() for place in of_size]
    for leaf, side in places + _diagonals(factors, layouts):
        use, moment = uses[leaf], factors[leaf][side]
        if use.layout.is_vector or use.bias_of is not None:
            continue
        size = moment.shape[-1] if is_full(moment, use.layout) else 0
        is_diagonal = not size or _are_diagonal(use)[side]
        length = _used_lengths(use)[side]
        found.append(_Side((leaf, side), _members(use.layout), length, size, is_diagonal))
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


def _members(layout: Layout) -> int:
    return math.prod(layout.stacked)


def _used_lengths(use: Use) -> list[int]:
    """Lengths of both sides, with the row or the column of a bias."""
    lengths = list(use.layout.sides)
    if use.bias is not None:
        lengths[_side_of_inputs(use)] += 1
    return lengths


def _side_of_inputs(use: Use) -> int:
    """The side of a leaf that the fan-in of its site is on: 0 for rows, 1 for columns."""
    (site,) = use.sites
    return 1 if use.layout.is_transposed(site.fan_in, site.fan_out) else 0


def _are_diagonal(use: Use) -> tuple[bool, bool]:
    """Which sides of a leaf have a diagonal moment, whatever its shape: rows that are looked up."""
    if len(use.sites) != 1 or use.sites[0].kind not in ("gain", "bias", "embedding"):
        return False, False
    (site,) = use.sites
    transposed = site.kind == "embedding" and site.fills(0)
    return not transposed, transposed
