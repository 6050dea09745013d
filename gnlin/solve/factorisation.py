"""The inverse of damped Kronecker factors, and its product with a vector.

`kronecker` averages the factors, keeps their inverses, and asks here for both.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.solve.factors import Factors, diagonal_of, is_full
from gnlin.solve.inverses import inverses
from gnlin.structure.layers import Layout, Use
from gnlin.tree import Params


def inverse_factors(
    uses: Sequence[Use], factors: Sequence[Factors], damping: jax.Array
) -> list[Factors]:
    """(A + π√λ I)⁻¹ and (S + √λ/π I)⁻¹ of all leaves, in the shapes of their moments.

    At a vector the left one is 1 / (diag G + λ). At a bias of a layer they are not used.
    """
    shifted = [_shifted(use, pair, damping) for use, pair in zip(uses, factors, strict=True)]
    # Matrices wait until all are known: those of one size are inverted together.
    full = [
        side
        for use, pair in zip(uses, shifted, strict=True)
        for side in pair
        if is_full(side, use.layout)
    ]
    done = iter(inverses(full))
    found = []
    for use, pair, like in zip(uses, shifted, factors, strict=True):
        layout = use.layout
        sides = [next(done) if is_full(side, layout) else _reciprocal(side) for side in pair]
        padded = [_padded(side, ref, layout) for side, ref in zip(sides, like, strict=True)]
        found.append(Factors(*padded))
    return found


def apply_inverse(uses: Sequence[Use], inverse: Sequence[Factors], vector: Params) -> Params:
    """M⁻¹v, where a bias of a layer is one more row or column of its weight."""
    dtype = tree.accumulation_dtype(vector)
    flat = [leaf.astype(dtype) for leaf in jax.tree.leaves(vector)]
    out = list(flat)
    for leaf, use in enumerate(uses):
        shape, layout = flat[leaf].shape, use.layout
        if use.bias_of is not None:
            continue
        if layout.is_vector:
            out[leaf] = flat[leaf] * inverse[leaf].left.reshape(shape)
            continue
        matrix = flat[leaf].reshape(layout.matrices)
        if use.bias is None:
            out[leaf] = _between(matrix, inverse[leaf], use).reshape(shape)
            continue
        axis = _side_of_inputs(use) - 2
        bias = jnp.expand_dims(flat[use.bias].reshape(*layout.stacked, -1), axis)
        matrix = _between(jnp.concatenate([matrix, bias], axis=axis), inverse[leaf], use)
        matrix, bias = jnp.split(matrix, [matrix.shape[axis] - 1], axis=axis)
        out[leaf], out[use.bias] = matrix.reshape(shape), bias.reshape(flat[use.bias].shape)
    return tree.cast_like(jax.tree.unflatten(jax.tree.structure(vector), out), vector)


def _between(matrix: jax.Array, inverse: Factors, use: Use) -> jax.Array:
    """A⁻¹VS⁻¹, for each member of a stack."""
    left, right = _leading_sides(inverse, use)
    matrix = left @ matrix if is_full(left, use.layout) else left[..., :, None] * matrix
    return matrix @ right if is_full(right, use.layout) else matrix * right[..., None, :]


def _shifted(use: Use, factors: Factors, damping: jax.Array) -> Factors:
    """A + π√λ I and S + √λ/π I, the damping shared between both; diag G + λ at a vector."""
    layout = use.layout
    if layout.is_vector:
        # Without curvature and damping an entry passes unchanged.
        total = factors.left + damping
        return Factors(jnp.where(total > 0, total, 1), factors.right)
    left, right = _leading_sides(factors, use)
    means = [jnp.mean(diagonal_of(moment, layout), axis=-1) for moment in (left, right)]
    # π is 1 where a side has no curvature: the quotient of the traces says nothing there.
    known = (means[0] > 0) & (means[1] > 0)
    pi = jnp.sqrt(jnp.where(known, means[0] / jnp.where(known, means[1], 1), 1))
    root = jnp.sqrt(damping)
    # (π√λ)(√λ/π) = λ: the product of both shares is the damping of the system.
    return Factors(
        _add_to_diagonal(left, pi * root, means[0], layout),
        _add_to_diagonal(right, root / pi, means[1], layout),
    )


def _add_to_diagonal(
    moment: jax.Array, share: jax.Array, mean: jax.Array, layout: Layout
) -> jax.Array:
    size = moment.shape[-1]
    # Cholesky's factorisation of a matrix that is singular to working precision would fail.
    floor = 10 * size * float(jnp.finfo(moment.dtype).eps) * mean
    share = jnp.maximum(share, jnp.where(mean > 0, floor, 1))[..., None]
    if not is_full(moment, layout):
        return moment + share
    identity = jnp.broadcast_to(jnp.eye(size, dtype=moment.dtype), moment.shape)
    return moment + share[..., None] * identity


def _reciprocal(numbers: jax.Array) -> jax.Array:
    return 1 / jnp.where(numbers == 0, 1, numbers)


# Shapes. A moment has a spare row and column for a bias, and a matrix even for rows that are looked
# up, because the state is shaped before the first batch is seen.


def _leading_sides(sides: Factors, use: Use) -> Factors:
    """Both sides without what the leaf does not use."""
    lengths = list(use.layout.sides)
    if use.bias is not None:
        lengths[_side_of_inputs(use)] += 1
    found = [
        _leading(side, length, use.layout, is_diagonal)
        for side, length, is_diagonal in zip(sides, lengths, _are_diagonal(use), strict=True)
    ]
    return Factors(*found)


def _leading(side: jax.Array, length: int, layout: Layout, is_diagonal: bool) -> jax.Array:
    if is_diagonal or not is_full(side, layout):
        return diagonal_of(side, layout)[..., :length]
    return side[..., :length, :length]


def _padded(side: jax.Array, like: jax.Array, layout: Layout) -> jax.Array:
    """The same with zeros, in the shape of the moment."""
    if layout.is_vector:
        return side
    if is_full(like, layout) and not is_full(side, layout):
        side = side[..., None] * jnp.broadcast_to(
            jnp.eye(side.shape[-1], dtype=side.dtype), (*side.shape, side.shape[-1])
        )
    extra = like.shape[-1] - side.shape[-1]
    own = side.ndim - layout.stack
    return jnp.pad(side, [(0, 0)] * layout.stack + [(0, extra)] * own)


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
