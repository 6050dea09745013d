"""Kronecker factors: the second moments of the inputs and cotangents of a layer.

`kronecker` averages them over steps, and `factorisation` inverts the averages.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlin.structure.layers import Layout, Site, Use


class Factors(NamedTuple):
    """The two moments of one leaf: (stack..., n, n), or (stack..., n) for the diagonal alone."""

    left: jax.Array
    right: jax.Array


class Share(NamedTuple):
    """The applications of a layer that enter its moments."""

    fraction: float
    count: jax.Array  # of systems
    dtype: Any  # of the moments

    def rows(self, total: int) -> jax.Array | None:
        """Places of the applications; `None` for all of them, as of a symbolic number."""
        if not isinstance(total, int):
            return None
        taken = min(total, max(round(self.fraction * total), 64))
        if taken == total:
            return None
        # Consecutive ones, which move on from step to step until all have had their turn.
        return (self.count * taken + jnp.arange(taken, dtype=self.count.dtype)) % total


# The moments.


def moments_of_layer(
    use: Use, cotangents: Sequence[jax.Array], share: Share, like: Factors
) -> Factors:
    r"""The moments of a leaf from its sites, shaped like others.

    With one site they are A and S of `Kronecker`. With more, as for a table that embeds tokens and
    is the last layer too, G is near :math:`\sum_i L_i \otimes R_i`. One product has to stand for
    the sum. With :math:`w_i = \operatorname{tr} L_i \operatorname{tr} R_i` it is

    .. math:: L = w^{-1/2} \sum_i w_i \frac{L_i}{\operatorname{tr} L_i}, \qquad
              R = w^{-1/2} \sum_i w_i \frac{R_i}{\operatorname{tr} R_i}, \qquad
              w = \sum_i w_i.

    It has the trace of the sum, and is the sum where all terms are multiples of one. Applications
    in time and in loops count like those of examples (the setting "expand").

    Reference: Eschenhagen et al., Kronecker-factored approximate curvature for modern neural
    network architectures, 2023, section 3.
    """
    pairs = [
        (site, _scaled(site, cotangent.astype(share.dtype)))
        for site, cotangent in zip(use.sites, cotangents, strict=True)
    ]
    if use.layout.is_vector:
        squares = [_squares(site, cotangent, use.layout) for site, cotangent in pairs]
        return Factors(functools.reduce(jnp.add, squares).astype(share.dtype), like.right)
    parts = [
        _moments_of_site(site, cotangent, use.layout, share, like) for site, cotangent in pairs
    ]
    if len(parts) == 1:
        return parts[0]
    traces = [[_trace(side, use.layout) for side in part] for part in parts]
    weights = [left * right for left, right in traces]
    total = functools.reduce(jnp.add, weights)
    root = jnp.sqrt(jnp.where(total > 0, total, 1))

    def combined(side: int) -> jax.Array:
        terms = []
        for part, trace, weight in zip(parts, traces, weights, strict=True):
            scale = weight / jnp.where(trace[side] > 0, trace[side], 1) / root
            rank = part[side].ndim - scale.ndim
            terms.append(scale.reshape(*scale.shape, *[1] * rank) * part[side])
        return functools.reduce(jnp.add, terms)

    return Factors(combined(0), combined(1))


def moments_of_gradient(gradient: jax.Array, layout: Layout, like: Factors) -> Factors:
    """VVᵀ / ‖V‖ and VᵀV / ‖V‖ of a pseudo-gradient, or V² where it is a vector."""
    if layout.is_vector:
        return Factors(gradient.ravel() ** 2, like.right)  # E V² = diag G
    matrix = gradient.reshape(layout.matrices)
    # A and S then have the size of V, and A ⊗ S has the size of V², as G.
    norm = jnp.linalg.norm(matrix, axis=(-2, -1), keepdims=True)
    matrix = matrix / jnp.sqrt(jnp.where(norm > 0, norm, 1))
    matrix = _pad(_pad(matrix, -1, 0), -2, 0)  # for a bias
    left = _moment(jnp.swapaxes(matrix, -2, -1), like.left, layout)
    return Factors(left, _moment(matrix, like.right, layout))


def _scaled(site: Site, cotangents: jax.Array) -> jax.Array:
    """Cotangents of the leaf itself, where the product is the leaf times known numbers."""
    if site.kind == "embedding":
        return cotangents if site.factor is None else cotangents * site.factor
    if site.kind not in ("gain", "bias"):
        return cotangents
    rank = cotangents.ndim - site.inputs.ndim  # a bias has one number for each turn of its loops
    known = site.inputs.reshape(*site.inputs.shape, *[1] * rank)
    return cotangents * known.astype(cotangents.dtype)


def _moments_of_site(
    site: Site, cotangents: jax.Array, layout: Layout, share: Share, like: Factors
) -> Factors:
    """A and S of one site, at the members of the stack that it takes."""
    if not site.taken:
        return _moments_of_members(site, cotangents, layout, share, like)
    # The moments of one member, and zeros elsewhere.
    place = dict(site.taken)
    index = tuple(place.get(axis, slice(None)) for axis in range(layout.stack))
    one = Factors(
        *(
            side[tuple(slice(0, 1) if a in place else slice(None) for a in range(layout.stack))]
            for side in like
        )
    )
    found = _moments_of_members(site, cotangents, layout, share, one)
    return Factors(
        *(
            jnp.zeros_like(side).at[index].set(new.reshape(side[index].shape))
            for side, new in zip(like, found, strict=True)
        )
    )


def _moments_of_members(
    site: Site, cotangents: jax.Array, layout: Layout, share: Share, like: Factors
) -> Factors:
    """A and S of one site, on the sides of the leaf that they belong to."""
    outputs = site.arranged(cotangents, layout.shape, layout.stack)
    if site.kind in ("gain", "bias"):
        # The rows of the leaf are chosen by one-hot vectors, each as often as the others.
        rows, columns = layout.sides
        counts = jnp.append(jnp.full([rows], 1 / max(rows, 1), share.dtype), 0)
        outputs = outputs.reshape(*outputs.shape[:-2], -1, columns)
        left = _from_diagonal(counts, like.left, layout)
        return Factors(left, _moment(_pad(outputs, -1, 0), like.right, layout))
    if site.kind == "embedding":
        transposed = site.fills(0)
        sides = (like.right, like.left) if transposed else like
        tokens = site.inputs.ravel()
        counts = jnp.zeros([sides[0].shape[-1]], share.dtype)
        counts = counts.at[tokens].add(1 / max(tokens.size, 1), mode="drop")
        first = _from_diagonal(counts, sides[0], layout)
        if site.ran is not None:
            first = _of_those_that_ran(first, jnp.sum(counts), sides[0])
        last = _moment(_pad(outputs, -1, 0), sides[1], layout)
    else:
        transposed = bool(layout.is_transposed(site.fan_in, site.fan_out))
        sides = (like.right, like.left) if transposed else like
        inputs = site.arranged_inputs(layout.shape, layout.stack).astype(share.dtype)
        inputs = jnp.concatenate([inputs, _ones(site, layout, inputs)], axis=-1)
        first, last = _sides_of_layer(inputs, outputs, site.groups, share, sides, layout)
        if site.ran is not None:
            first = _of_those_that_ran(first, diagonal_of(first, layout)[..., -1], sides[0])
    return Factors(last, first) if transposed else Factors(first, last)


def _sides_of_layer(
    inputs: jax.Array,
    outputs: jax.Array,
    groups: int,
    share: Share,
    like: Sequence[jax.Array],
    layout: Layout,
) -> tuple[jax.Array, jax.Array]:
    """A and S from a share of the applications, with inputs and outputs (stack..., R, n).

    The last input is that of the bias. In S the row and the column of the bias are zero.
    """
    total = inputs.shape[-2]
    chosen = share.rows(total) if groups == 1 else None
    if chosen is not None:
        # A is a mean over applications and S a sum, so only S has to make up for those left out.
        scale = jnp.sqrt(jnp.asarray(total / len(chosen), inputs.dtype))
        inputs, outputs = inputs[..., chosen, :], outputs[..., chosen, :] * scale
    mean = inputs / jnp.sqrt(jnp.asarray(inputs.shape[-2], inputs.dtype))
    last = _moment(_pad(outputs, -1, 0), like[1], layout)
    if groups > 1 and is_full(last, layout):
        # Outputs of different groups have no inputs in common.
        group = jnp.arange(len(last)) * groups // (len(last) - 1)
        last = jnp.where(group[:, None] == group[None], last, 0)
    return _moment(mean, like[0], layout), last


def _ones(site: Site, layout: Layout, inputs: jax.Array) -> jax.Array:
    """The input of the bias: 1, but 0 in a branch that is not taken."""
    if site.ran is None:
        return jnp.ones_like(inputs[..., :1])
    rank = site.inputs.ndim - site.ran.ndim
    ran = jnp.broadcast_to(site.ran.reshape(*site.ran.shape, *[1] * rank), site.inputs.shape)
    whole = site._replace(inputs=ran.astype(inputs.dtype))
    return whole.arranged_inputs(layout.shape, layout.stack)[..., :1]


def _of_those_that_ran(moment: jax.Array, share: jax.Array, before: jax.Array) -> jax.Array:
    """A mean over the applications that took place; the mean before where none did."""
    share = share.reshape(*share.shape, *[1] * (moment.ndim - share.ndim))
    return jnp.where(share > 0, moment / jnp.where(share > 0, share, 1), before)


def _squares(site: Site, cotangents: jax.Array, layout: Layout) -> jax.Array:
    """Σ x² s² over the applications: the diagonal of G at a vector, or at a stack of them."""
    dtype, shape = cotangents.dtype, (*layout.stacked, math.prod(layout.member))
    squares = jnp.square(site.arranged(cotangents, layout.shape, layout.stack))
    if site.kind == "embedding":
        # Rows of a stack of vectors, or entries of one vector.
        of_tokens = squares[0] if layout.stack else squares[:, 0]
        found = jnp.zeros(shape, dtype).at[site.inputs.ravel()].add(of_tokens, mode="drop")
        return found.ravel()
    if site.kind in ("dense", "convolution"):
        inputs = site.arranged_inputs(layout.shape, layout.stack).astype(dtype)
        squares = squares * jnp.square(inputs)
    found = jnp.sum(squares, axis=-2)
    if site.taken:
        place = dict(site.taken)
        index = tuple(place.get(axis, slice(None)) for axis in range(layout.stack))
        empty = jnp.zeros(shape, dtype)
        return empty.at[index].set(found.reshape(empty[index].shape)).ravel()
    return jnp.broadcast_to(found, shape).ravel()


def _pad(matrix: jax.Array, axis: int, value: float) -> jax.Array:
    """One more row or column of this value."""
    width = [(0, 0)] * matrix.ndim
    width[axis] = (0, 1)
    return jnp.pad(matrix, width, constant_values=value)


def is_full(moment: jax.Array, layout: Layout) -> bool:
    """Whether it has matrices, and not their diagonals alone."""
    return moment.ndim == layout.stack + 2


def _moment(x: jax.Array, like: jax.Array, layout: Layout) -> jax.Array:
    """XᵀX for each X (R, n) of a stack, or its diagonal where the moment before is one."""
    full = is_full(like, layout)
    found = jnp.swapaxes(x, -2, -1) @ x if full else jnp.sum(x**2, axis=-2)
    return jnp.broadcast_to(found, like.shape)


def _from_diagonal(diagonal: jax.Array, like: jax.Array, layout: Layout) -> jax.Array:
    return jnp.broadcast_to(jnp.diag(diagonal) if is_full(like, layout) else diagonal, like.shape)


def diagonal_of(moment: jax.Array, layout: Layout) -> jax.Array:
    """The diagonal of each member of a stack, (stack..., n)."""
    full = is_full(moment, layout)
    return jnp.diagonal(moment, axis1=-2, axis2=-1) if full else moment


def _trace(moment: jax.Array, layout: Layout) -> jax.Array:
    """Of each member of a stack, without the spare row."""
    return jnp.sum(diagonal_of(moment, layout)[..., :-1], axis=-1)
