r"""Kernel matrices K = J D⁻¹ Jᵀ of linearised models, without their Jacobians.

Each leaf of the parameters adds to K by the cheapest route that its use in the model allows:

* `products` of the `rows` of J, where examples are proved apart. Of a dense layer with one
  application for each example, and without a scaling, no row is ever formed. Other leaves have
  their rows.
* `columns` :math:`J D^{-1} J^\top e_i` elsewhere: one pull-back and one push-forward for each
  output of the batch. This assumes nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gnlin import tree
from gnlin.jaxprs import numbers_held
from gnlin.kernel.products import contract
from gnlin.kernel.rows import BUDGET, Found, find_rows, map_together, number_of_examples
from gnlin.sharding import by_compiler
from gnlin.structure.layers import matrix_shape
from gnlin.tree import Outputs, Params


class Kernel(NamedTuple):
    """K = J D⁻¹ Jᵀ, (M, M) with the outputs as `tree.flatten` orders them, and its cost.

    The pull-backs are through the whole network. Those for `columns` come with as many
    push-forwards.
    """

    matrix: jax.Array
    pull_backs: int


def kernel_matrix(
    jvp: Callable[[Params], Outputs],
    vjp: Callable[[Outputs], Params],
    params: Params,
    scaling: Params | None = None,
    budget: int = BUDGET,
) -> Kernel:
    """K of a linearisation at `params`, in their accumulation dtype.

    Args:
        jvp: the push-forward.
        vjp: the pull-back.
        params: the parameters.
        scaling: D, shaped like them; `None` for the identity. Where D is 0, D⁻¹ counts as 0: such a
            parameter is held.
        budget: numbers that may be held beside K, about.
    """
    dtype = tree.accumulation_dtype(params)
    outputs = jax.eval_shape(jvp, params)
    count, inverse = tree.size(outputs), inverse_of(scaling)
    # Rows at the leaves where examples are proved apart; the others have columns below.
    found = find_rows(jvp, params, budget, keep=budget)
    total, pull_backs = jnp.zeros([count, count], dtype), found.pull_backs
    if found.pull_backs:
        weights = _weights(found, params, inverse)
        by_example = by_compiler(contract, found.rows, found.rows, "full", weights, budget)
        # The rows come in the order (example, output), and K in that of the flattened outputs.
        order = order_by_example(outputs)
        total = by_example.reshape(count, count)[order][:, order]
    if found.left:
        total += columns(jvp, vjp, outputs, params, found.left, inverse, budget)
        pull_backs += count
    # K is symmetric, and rounding is not.
    return Kernel((total + total.T) / 2, pull_backs)


def inverse_of(scaling: Params | None) -> Params | None:
    """D⁻¹, with 0 where D is 0."""
    if scaling is None:
        return None
    return jax.tree.map(lambda d: jnp.where(d > 0, 1 / jnp.where(d > 0, d, 1), 0), scaling)


def order_by_example(outputs: Outputs) -> np.ndarray:
    """The place in the order (example, output) of each entry of the flattened outputs."""
    examples = number_of_examples(outputs)
    places = np.arange(tree.size(outputs)).reshape(examples, -1)
    # Flattened outputs have one leaf after the other: columns of `places`, cut leaf by leaf.
    ends = np.cumsum([leaf.size // examples for leaf in jax.tree.leaves(outputs)])[:-1]
    return np.concatenate([part.ravel() for part in np.split(places, ends, axis=1)])


def _weights(found: Found, params: Params, inverse: Params | None) -> dict[int, jax.Array] | None:
    """D⁻¹ at each leaf of the rows, as a vector in their order."""
    if inverse is None:
        return None
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    leaves = jax.tree.leaves(inverse)
    weights = {leaf: leaves[leaf].reshape(-1) for leaf in found.rows.whole}
    for layer in found.layers:
        matrix = leaves[layer.weight].reshape(matrix_shape(shapes[layer.weight]))
        # Rows at a layer are (fan-in, fan-out), and have b as one more row, as `Rows` says.
        parts = [matrix.T if layer.transposed else matrix]
        if layer.bias is not None:
            parts.append(leaves[layer.bias].reshape(1, -1))
        weights[layer.weight] = jnp.concatenate(parts).reshape(-1)
    return weights


def columns(
    push: Callable[[Params], Outputs],
    pull: Callable[[Outputs], Params],
    outputs: Outputs,
    params: Params,
    leaves: frozenset[int],
    inverse: Params | None,
    budget: int,
) -> jax.Array:
    """K of some leaves alone, (outputs of a, outputs of b) flattened, from its columns.

    Args:
        push: J_a, the push-forward of a linearisation.
        pull: J_bᵀ, the pull-back of the same or of another.
        outputs: shaped like those of b.
        params: the parameters of both.
        leaves: the positions of the leaves.
        inverse: D⁻¹; `None` for the identity.
        budget: numbers that the columns which are computed together may hold.
    """
    dtype, structure = tree.accumulation_dtype(params), jax.tree.structure(params)
    count = tree.size(outputs)
    weights = [None] * structure.num_leaves if inverse is None else jax.tree.leaves(inverse)

    def column(place: jax.Array) -> jax.Array:
        basis = tree.unflatten(jnp.zeros([count], dtype).at[place].set(1), outputs)
        # D⁻¹ Jᵀ eᵢ at the leaves asked for. Zeros elsewhere take the other leaves out of the sum.
        pulled = jax.tree.leaves(pull(basis))
        for index, leaf in enumerate(pulled):
            if index not in leaves:
                pulled[index] = jnp.zeros_like(leaf)
            elif weights[index] is not None:
                pulled[index] = (leaf * weights[index].astype(leaf.dtype)).astype(leaf.dtype)
        return tree.flatten(push(jax.tree.unflatten(structure, pulled)), dtype)

    held = numbers_held(column, jnp.int32(0))
    # Column i comes out as row i.
    return map_together(column, count, max(1, budget // held)).T
