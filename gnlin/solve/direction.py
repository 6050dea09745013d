"""The product of the inverse of damped Kronecker factors with a vector.

`kronecker` asks here for the direction, with the inverse from `factorisation`. Leaves of one shape
take their products together, and large ones alone.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.solve import low_rank
from gnlin.solve.factorisation import Inverse, diagonal_entries, members_of
from gnlin.solve.factors import Factors
from gnlin.solve.low_rank import LowRank
from gnlin.solve.sides import (
    Place,
    have_diagonals,
    member_count,
    places_of_diagonals,
    places_of_matrices,
    side_of_inputs,
    used_lengths,
)
from gnlin.structure.layers import Layout, Use
from gnlin.tree import Params


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
            axis = None if use.bias is None else side_of_inputs(use) - 2
            # A copy of a large one costs more time than it is to compile.
            alone = leaf if stored.has_long_side(leaf) else None
            key = alone, use.layout.sides, axis, have_diagonals(use)
            alike.setdefault(key, []).append(leaf)
    # Leaves that take the same products take them together.
    for (_, _, axis, are_diagonal), leaves in alike.items():
        lengths = used_lengths(uses[leaves[0]])
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
    counts = [member_count(uses[leaf].layout) for leaf in leaves]
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
        end = start + member_count(uses[leaf].layout)
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
        self.diagonals = dict(
            zip(places_of_diagonals(factors, layouts), inverse.diagonals, strict=True)
        )
        # The matrices of a place, and the numbers of its members there.
        self._where: dict[Place, tuple[jax.Array | LowRank, int, int]] = {}
        of_sizes = zip(inverse.matrices, places_of_matrices(factors, layouts).values(), strict=True)
        for matrices, places in of_sizes:
            start = 0
            for place in places:
                end = start + member_count(layouts[place[0]])
                self._where[place] = matrices, start, end
                start = end

    def has_long_side(self, leaf: int) -> bool:
        places = [place for place in ((leaf, 0), (leaf, 1)) if place in self._where]
        return any(isinstance(self._where[place][0], LowRank) for place in places)

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
        whole = low_rank.concatenated([members_of(*part) for part in parts])
        if isinstance(whole, LowRank):
            return whole.diagonal[:, :length] if is_diagonal else low_rank.cropped(whole, length)
        if whole.ndim == 3 and is_diagonal:
            whole = diagonal_entries(whole)
        return whole[(slice(None), *[slice(length)] * (whole.ndim - 1))]
