"""Factorised Kronecker factors and the product with the inverse that they make.

`kronecker` averages the factors, keeps their factorisations, and asks here for both.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.structure.layers import Layer, matrix_shape
from gnlin.tree import Params


class Factors(NamedTuple):
    """The two moments of one leaf, or their factorisations."""

    left: jax.Array
    right: jax.Array


def roots_of(
    layers: Sequence[Layer], factors: Sequence[Factors], damping: jax.Array, params: Params
) -> list[Factors]:
    """The factorisations of all leaves, in the shapes of their moments."""
    leaves, layer_of = jax.tree.leaves(params), {layer.weight: layer for layer in layers}
    in_layers = {layer.bias for layer in layers}
    roots = list(factors)
    for index, leaf in enumerate(leaves):
        if index in in_layers:
            continue
        if leaf.ndim < 2:
            # Without curvature and damping an entry passes unchanged.
            diagonal = factors[index].left + damping
            roots[index] = factors[index]._replace(left=jnp.where(diagonal > 0, diagonal, 1))
        else:
            roots[index] = _roots_of_matrix(
                _lengths(layer_of.get(index), leaf.shape), factors[index], damping
            )
    return roots


def _roots_of_matrix(lengths: Sequence[int], factors: Factors, damping: jax.Array) -> Factors:
    """The factorisations of one leaf, with the damping shared between its sides."""
    # Without a bias the row and column of the constant input are left out.
    left, right = _leading(factors.left, lengths[0]), _leading(factors.right, lengths[1])
    means = _mean_diagonal(left), _mean_diagonal(right)
    # π is 1 where a side has no curvature: the quotient of the traces says nothing there.
    known = (means[0] > 0) & (means[1] > 0)
    pi = jnp.sqrt(jnp.where(known, means[0] / jnp.where(known, means[1], 1), 1))
    root = jnp.sqrt(damping)
    # (π√λ)(√λ/π) = λ: the product of both shares is the damping of the system.
    roots = _root(left, pi * root, means[0]), _root(right, root / pi, means[1])
    return Factors(*(_padded(each, like) for each, like in zip(roots, factors, strict=True)))


def _root(moment: jax.Array, share: jax.Array, mean: jax.Array) -> jax.Array:
    """Cholesky's factor of ``moment + share · I``; the sum itself where it is a diagonal."""
    # Cholesky's factorisation of a matrix that is singular to working precision would fail.
    floor = 10 * len(moment) * float(jnp.finfo(moment.dtype).eps) * mean
    share = jnp.maximum(share, jnp.where(mean > 0, floor, 1))
    if moment.ndim == 1:
        return moment + share
    shifted = moment + share * jnp.eye(len(moment), dtype=moment.dtype)
    return jax.scipy.linalg.cho_factor(shifted)[0]


def _padded(root: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.pad(root, [(0, len(like) - len(root))] * root.ndim)


def _lengths(layer: Layer | None, shape: Sequence[int]) -> list[int]:
    """Rows and columns of the matrix of a leaf, with its bias."""
    lengths = list(matrix_shape(shape))
    if layer is not None and layer.bias is not None:
        lengths[1 if layer.transposed else 0] += 1
    return lengths


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A leaf with two axes or more and its inverse factors.

    A bias of the layer is one more row (`side` 0) or column (`side` 1) of the matrix.
    """

    weight: int  # which leaf
    bias: int | None
    side: int
    solve_left: Callable[[jax.Array], jax.Array]  # V ↦ (A + π√λ I)⁻¹V
    solve_right: Callable[[jax.Array], jax.Array]  # V ↦ (S + √λ/π I)⁻¹V

    def apply(self, leaves: Sequence[jax.Array]) -> dict[int, jax.Array]:
        """M⁻¹v at the weight and at the bias."""
        leaf = leaves[self.weight]
        matrix = leaf.reshape(matrix_shape(leaf.shape))
        if self.bias is None:
            return {self.weight: self._solve(matrix).reshape(leaf.shape)}
        bias = jnp.expand_dims(leaves[self.bias].ravel(), self.side)
        matrix = self._solve(jnp.concatenate([matrix, bias], axis=self.side))
        matrix, bias = jnp.split(matrix, [matrix.shape[self.side] - 1], axis=self.side)
        return {
            self.weight: matrix.reshape(leaf.shape),
            self.bias: bias.reshape(leaves[self.bias].shape),
        }

    def _solve(self, matrix: jax.Array) -> jax.Array:
        # A⁻¹VS⁻¹: S is symmetric, so S⁻¹ from the left of the transpose will do.
        return self.solve_right(self.solve_left(matrix).T).T


def inverse(
    layers: Sequence[Layer], roots: Sequence[Factors], params: Params
) -> Callable[[Params], Params]:
    """The function v ↦ M⁻¹v."""
    leaves, structure = jax.tree.flatten(params)
    layer_of = {layer.weight: layer for layer in layers}
    in_layers = {layer.bias for layer in layers}
    alone = [index for index in range(len(leaves)) if index not in in_layers]
    matrices = [
        _matrix(index, layer_of.get(index), leaves[index].shape, roots[index])
        for index in alone
        if leaves[index].ndim >= 2
    ]
    dtype = tree.accumulation_dtype(params)

    def apply(vector: Params) -> Params:
        flat = [leaf.astype(dtype) for leaf in jax.tree.leaves(vector)]
        out = list(flat)
        for matrix in matrices:
            for index, leaf in matrix.apply(flat).items():
                out[index] = leaf
        for index in alone:
            if flat[index].ndim < 2:
                out[index] = flat[index] / roots[index].left.reshape(flat[index].shape)
        return tree.cast_like(jax.tree.unflatten(structure, out), params)

    return apply


def _matrix(weight: int, layer: Layer | None, shape: Sequence[int], roots: Factors) -> _Matrix:
    """The inverse factors of one leaf."""
    side = 1 if layer is not None and layer.transposed else 0
    solves = (
        _solve_with(_leading(root, length))
        for root, length in zip(roots, _lengths(layer, shape), strict=True)
    )
    return _Matrix(weight, None if layer is None else layer.bias, side, *solves)


def _leading(moment: jax.Array, length: int) -> jax.Array:
    return moment[:length, :length] if moment.ndim == 2 else moment[:length]


def _mean_diagonal(moment: jax.Array) -> jax.Array:
    return jnp.mean(jnp.diagonal(moment) if moment.ndim == 2 else moment)


def _solve_with(root: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """V ↦ (moment + share · I)⁻¹V, from its factorisation."""
    if root.ndim == 1:
        return lambda matrix: matrix / root[:, None]
    return lambda matrix: jax.scipy.linalg.cho_solve((root, False), matrix)
