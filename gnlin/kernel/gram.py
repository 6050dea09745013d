r"""Kernel matrices K = J_a D⁻¹ J_bᵀ of linearised models, without their Jacobians.

Each leaf of the parameters adds to K by the cheapest of three routes that its use in the model allows:

* a dense layer y = xW + b with one row for each example and no scaling, s being cotangents of y for
  output c:

  .. math:: K_{(n,c),(m,d)} \mathrel{+}= (\langle x_n, x_m\rangle + 1)\,\langle s_{nc}, s_{md}\rangle;

* other layers, and leaves in no layer: the Jacobian's rows U at that leaf, a block of the fan-in at
  a time, and :math:`K \mathrel{+}= U_a D^{-1} U_b^\top`;
* what is left: columns :math:`J_a D^{-1} J_b^\top e_i`, one pull-back and one push-forward for each
  output.

The first two take the `rows` of J, where examples are proved apart; what cannot be proved takes the
third route, which assumes nothing.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gnlin import tree
from gnlin.jaxprs import numbers_held_by
from gnlin.kernel.rows import (
    BUDGET,
    Found,
    Rows,
    find_rows,
    map_together,
    number_of_examples,
    product_of,
)
from gnlin.structure.layers import matrix_shape
from gnlin.tree import Outputs, Params

# Which products of rows K is made of: all, those of the same output, or the sum of those.
Pairs = Literal["full", "diagonal", "trace"]


class Kernel(NamedTuple):
    """K = J D⁻¹ Jᵀ, (M, M) with the outputs as `tree.flatten` orders them, and what it took."""

    matrix: jax.Array
    pull_backs: int  # through the whole network; as many push-forwards where there are more than outputs of an example


def kernel_matrix(
    jvp: Callable[[Params], Outputs],
    vjp: Callable[[Outputs], Params],
    params: Params,
    scaling: Params | None = None,
    budget: int = BUDGET,
) -> Kernel:
    """K of a linearisation at `params`, in their accumulation dtype; `scaling` is D, `None` being
    the identity.

    Where D is 0, D⁻¹ counts as 0: such a parameter is held.
    """
    dtype = tree.accumulation_dtype(params)
    outputs = jax.eval_shape(jvp, params)
    count, inverse = tree.size(outputs), inverse_of(scaling)
    found = find_rows(jvp, params, budget, keep=budget)
    total, pull_backs = jnp.zeros([count, count], dtype), found.pull_backs
    if found.pull_backs:
        order = order_by_example(outputs)
        weights = _by_row(found, params, inverse)
        total = contract(found.rows, found.rows, "full", weights, budget).reshape(count, count)[
            order
        ][:, order]
    if found.left:
        total += columns((jvp, vjp), (jvp, vjp), params, found.left, inverse, budget)
        pull_backs += count
    return Kernel((total + total.T) / 2, pull_backs)


def inverse_of(scaling: Params | None) -> Params | None:
    """D⁻¹, with 0 where D is 0."""
    if scaling is None:
        return None
    return jax.tree.map(lambda d: jnp.where(d > 0, 1 / jnp.where(d > 0, d, 1), 0), scaling)


def order_by_example(outputs: Outputs) -> np.ndarray:
    """Where in the order (example, output) each entry of the flattened outputs stands."""
    examples = number_of_examples(outputs)
    places = np.arange(tree.size(outputs)).reshape(examples, -1)
    ends = np.cumsum([leaf.size // examples for leaf in jax.tree.leaves(outputs)])[:-1]
    return np.concatenate([part.ravel() for part in np.split(places, ends, axis=1)])


# Products of rows.


def contract(
    a: Rows,
    b: Rows,
    pairs: Pairs,
    weights: Mapping[int, jax.Array] | None = None,
    budget: int = BUDGET,
) -> jax.Array:
    """K of the rows a and b: (N, C, M, C), of the diagonal (C, N, M), of the trace (N, M).

    `weights` are D⁻¹ at each leaf of the rows, as one vector; without them it is the identity.
    """
    total: Any = 0

    def in_turn(x, y):
        """Both, to be used when `total` is there: side by side the leaves would need as much memory as all together."""
        nonlocal total
        if not isinstance(total, jax.Array):  # the first
            return x, y
        if jax.tree.leaves(x)[0] is jax.tree.leaves(y)[0]:
            x, total = jax.lax.optimization_barrier((x, total))
            return x, x
        x, y, total = jax.lax.optimization_barrier((x, y, total))
        return x, y

    for index in [*a.factored, *(index for index in b.factored if index not in a.factored)]:
        weight = None if weights is None else weights[index]
        if index in a.factored and index in b.factored:
            x, y = in_turn(a.factored[index], b.factored[index])
            total = total + _of_factored(x, y, pairs, weight, budget)
        else:  # the shorter of two sequences may have its rows whole
            total = total + _of_whole(_whole(a, index), _whole(b, index), pairs, weight)
    for index in a.whole.keys() - a.factored.keys() - b.factored.keys():
        x, y = in_turn(a.whole[index], b.whole[index])
        total = total + _of_whole(x, y, pairs, None if weights is None else weights[index])
    return total


def _by_row(found: Found, params: Params, inverse: Params | None) -> dict[int, jax.Array] | None:
    """D⁻¹ at each leaf of the rows, ordered as they are."""
    if inverse is None:
        return None
    leaves = jax.tree.leaves(inverse)
    weights = {index: leaves[index].reshape(-1) for index in found.rows.whole}
    for layer in found.layers:
        shape = matrix_shape(jax.tree.leaves(params)[layer.weight].shape)
        matrix = leaves[layer.weight].reshape(shape)
        matrix = matrix.T if layer.transposed else matrix
        biases = [] if layer.bias is None else [leaves[layer.bias].reshape(1, -1)]
        weights[layer.weight] = jnp.concatenate([matrix, *biases]).reshape(-1)
    return weights


def _whole(rows: Rows, index: int) -> jax.Array:
    if index in rows.whole:
        return rows.whole[index]
    product = product_of(*rows.factored[index])
    return product.reshape(*product.shape[:2], -1)


def _of_whole(u: jax.Array, v: jax.Array, pairs: Pairs, weight: jax.Array | None) -> jax.Array:
    """U D⁻¹ Vᵀ; what an accelerator saves on products in float32 would cost K its definiteness."""
    if weight is not None:
        root = jnp.sqrt(weight)[None, None, :]
        u, v = u * root, v * root
    (examples, colours, size), others = u.shape, len(v)
    if pairs == "diagonal":
        return jnp.einsum("ncp,mcp->cnm", u, v, precision="highest")
    # As products of matrices, which are faster than those of arrays.
    if pairs == "trace":
        return jnp.matmul(u.reshape(examples, -1), v.reshape(others, -1).T, precision="highest")
    product = jnp.matmul(u.reshape(-1, size), v.reshape(-1, size).T, precision="highest")
    return product.reshape(examples, colours, others, colours)


def _of_factored(a, b, pairs: Pairs, weight: jax.Array | None, budget: int) -> jax.Array:
    """By whichever takes less work: products of inputs and of cotangents, for each pair of places, or of whole rows."""
    (x, s), (y, t) = a, b
    examples, length, fan_in = x.shape
    others, other_length, _ = y.shape
    colours, fan_out = s.shape[1], s.shape[-1]
    products = colours**2 if pairs == "full" else colours
    by_place = length * other_length * (products * fan_out + fan_in)
    by_row = (
        products * fan_in * fan_out
        + (length / others + other_length / examples) * colours * fan_in * fan_out
    )
    fits = length == 1 or examples * others * products * other_length <= budget
    if weight is None and by_place < by_row and fits:
        return _sum_of(
            lambda place: _at_place(place, b, pairs), (jnp.moveaxis(x, 1, 0), jnp.moveaxis(s, 2, 0))
        )

    def rows(factors):
        return product_of(*factors).reshape(len(factors[0]), colours, -1)

    # A block of the fan-in at a time.
    blocks = math.ceil(fan_in * (examples + others) * colours * fan_out / budget)
    if blocks == 1:
        own = rows(a)
        return _of_whole(own, own if x is y and s is t else rows(b), pairs, weight)
    width = math.ceil(fan_in / blocks)
    padding = blocks * width - fan_in

    def in_blocks(inputs):
        inputs = jnp.pad(inputs, ((0, 0), (0, 0), (0, padding)))
        return jnp.moveaxis(inputs.reshape(*inputs.shape[:2], blocks, width), 2, 0)

    if weight is not None:
        weight = jnp.pad(weight.reshape(fan_in, fan_out), ((0, padding), (0, 0))).reshape(
            blocks, width * fan_out
        )

    def of_block(block):
        x, y, weight = block
        return _of_whole(rows((x, s)), rows((y, t)), pairs, weight)

    return _sum_of(of_block, (in_blocks(x), in_blocks(y), weight))


# s tᵀ of one place of a with all places u of b.
_AT_PLACE: dict[Pairs, str] = {
    "full": "nco,mduo->ncmdu",
    "diagonal": "nco,mcuo->cnmu",
    "trace": "nco,mcuo->nmu",
}


def _at_place(
    place: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array], pairs: Pairs
) -> jax.Array:
    (x, s), (y, t) = place, b
    of_inputs = jnp.einsum("ni,mui->nmu", x, y, precision="highest")
    of_cotangents = jnp.einsum(_AT_PLACE[pairs], s, t, precision="highest")
    if pairs == "full":
        of_inputs = of_inputs[:, None, :, None]
    elif pairs == "diagonal":
        of_inputs = of_inputs[None]
    return jnp.sum(of_inputs * of_cotangents, axis=-1)


def _sum_of(function: Callable[[Any], jax.Array], items: Any) -> jax.Array:
    """Sum over the first axis of `items`; without a loop where that is all."""
    total, rest = (
        function(jax.tree.map(lambda leaf: leaf[0], items)),
        jax.tree.map(lambda leaf: leaf[1:], items),
    )
    if not len(jax.tree.leaves(rest)[0]):
        return total
    return jax.lax.scan(lambda total, item: (total + function(item), None), total, rest)[0]


# One pull-back and one push-forward for each output.


def columns(
    of_a, of_b, params: Params, left: frozenset[int], inverse: Params | None, budget: int
) -> jax.Array:
    """K (outputs of a, outputs of b), flattened, of the leaves `left` alone; a and b are ``(jvp, vjp)``."""
    (push, _), (push_b, pull) = of_a, of_b
    dtype, outputs = tree.accumulation_dtype(params), jax.eval_shape(push_b, params)
    count, structure = tree.size(outputs), jax.tree.structure(params)
    weights = [None] * structure.num_leaves if inverse is None else jax.tree.leaves(inverse)

    def kernel_product(place):
        basis = tree.unflatten(jnp.zeros([count], dtype).at[place].set(1), outputs)
        pulled = jax.tree.leaves(pull(basis))
        for index, leaf in enumerate(pulled):
            if index not in left:
                pulled[index] = jnp.zeros_like(leaf)
            elif weights[index] is not None:
                pulled[index] = (leaf * weights[index].astype(leaf.dtype)).astype(leaf.dtype)
        return tree.flatten(push(jax.tree.unflatten(structure, pulled)), dtype)

    size = numbers_held_by(jax.make_jaxpr(kernel_product)(jnp.int32(0)).jaxpr)
    return map_together(kernel_product, count, max(1, budget // size)).T
