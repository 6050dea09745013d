r"""The kernel matrix K = J D⁻¹ Jᵀ of a linearised model, without its Jacobian.

Each leaf of the parameters adds to K by the cheapest of three routes that its use in the model allows:

* a dense layer y = xW + b with one row for each example and no scaling, s being cotangents of y for output c:

  .. math:: K_{(n,c),(m,d)} \mathrel{+}= (\langle x_n, x_m\rangle + 1)\,\langle s_{nc}, s_{md}\rangle;

* other layers, and leaves in no layer: the Jacobian's rows U at that leaf, a block of the fan-in at a time, and
  :math:`K \mathrel{+}= U D^{-1} U^\top`;
* what is left: columns :math:`J D^{-1} J^\top e_i`, one pull-back and one push-forward for each output.

In the first two, one pull-back serves output c of all N examples at once: C pull-backs instead of N·C. That is right
only where each example's outputs depend on its own rows, which `by_example` proves from the equations of the pull-back;
what it cannot prove takes the third route, which assumes nothing.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gnlin import tree
from gnlin.by_example import ByExample, Summed, run_by_example
from gnlin.layers import Layer, Reading, matrix_shape, read_layers
from gnlin.tree import Outputs, Params

# Numbers held at once beside the M² of K itself: cotangents and rows that are kept, a block of rows, the
# intermediate results of the pull-backs that run together. Half a gigabyte in float32.
BUDGET = 2**27


class Kernel(NamedTuple):
    """K = J D⁻¹ Jᵀ, (M, M) with the outputs as `tree.flatten` orders them, and what it took."""

    matrix: jax.Array
    pull_backs: int  # through the whole network; as many push-forwards where there are more than outputs of an example


def kernel_matrix(
    jvp: Callable[[Params], Outputs], vjp: Callable[[Outputs], Params], params: Params, scaling: Params | None = None
) -> Kernel:
    """K of a linearisation at `params`, in their accumulation dtype; `scaling` is D, `None` being the identity.

    Where D is 0, D⁻¹ counts as 0: such a parameter is held.
    """
    dtype = tree.accumulation_dtype(params)
    outputs = jax.eval_shape(jvp, params)
    count = tree.size(outputs)
    leaves, inverse = jax.tree.leaves(params), inverse_of(scaling)
    weights = [None] * len(leaves) if inverse is None else jax.tree.leaves(inverse)
    total, pull_backs = jnp.zeros([count, count], dtype), 0

    examples = _number_of_examples(outputs)
    left = set(range(len(leaves)))
    if examples > 1:
        reading = read_layers(jvp, params)
        colours = count // examples
        layers, others, idle = _rows_by_example(reading, outputs, examples)
        left -= idle
        for index, cotangents in layers.items():
            layer = reading.layers[index]
            total += _layer_gram(layer, leaves[layer.weight], cotangents.astype(dtype), examples, weights)
            left -= {layer.weight, layer.bias}
        for index, rows in others.items():
            rows = jnp.swapaxes(rows, 0, 1).reshape(count, -1).astype(dtype)
            total += _gram(rows, None if weights[index] is None else weights[index].reshape(-1))
            left.discard(index)
        pull_backs += colours if layers or others else 0
        order = _order(outputs, examples)
        total = total[order][:, order]
    left = {index for index in left if leaves[index].size}
    if left:
        total += _columns(jvp, vjp, params, inverse, left, outputs, dtype)
        pull_backs += count
    return Kernel((total + total.T) / 2, pull_backs)


def inverse_of(scaling: Params | None) -> Params | None:
    """D⁻¹, with 0 where D is 0."""
    if scaling is None:
        return None
    return jax.tree.map(lambda d: jnp.where(d > 0, 1 / jnp.where(d > 0, d, 1), 0), scaling)


def _number_of_examples(outputs: Outputs) -> int:
    """The length that all leaves have along their first axis; 1 where there is none."""
    lengths = {leaf.shape[0] if leaf.ndim else 1 for leaf in jax.tree.leaves(outputs)}
    return lengths.pop() if len(lengths) == 1 else 1


def _order(outputs: Outputs, examples: int) -> np.ndarray:
    """Where in the order (example, output) each entry of the flattened outputs stands."""
    places = np.arange(tree.size(outputs)).reshape(examples, -1)
    ends = np.cumsum([leaf.size // examples for leaf in jax.tree.leaves(outputs)])[:-1]
    return np.concatenate([part.ravel() for part in np.split(places, ends, axis=1)])


# One pull-back for output c of all examples.


def _rows_by_example(reading: Reading, outputs: Outputs, examples: int) -> tuple[dict, dict, set[int | None]]:
    """Where examples are proved apart: layer ↦ cotangents (C, N, T, fan-out), other leaf ↦ rows (C, N, size).

    And the leaves that have no influence on the outputs.
    """
    pull_back, shape = jax.make_jaxpr(reading.pull_back, return_shape=True)(outputs)
    structure, like = jax.tree.structure(shape), jax.tree.leaves(outputs)
    colours = tree.size(outputs) // examples
    idle: set[int | None] = set()

    def rows_of(colour):
        hot = (jnp.arange(colours, dtype=jnp.int32) == colour).astype(tree.accumulation_dtype(outputs))
        ends = np.cumsum([leaf.size // examples for leaf in like])[:-1]
        parts = [jnp.broadcast_to(part[None, :], [examples, part.size]) for part in jnp.split(hot, ends)]
        parts = [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, like, strict=True)]
        found = run_by_example(pull_back, parts, examples)
        of_layers, of_others = jax.tree.unflatten(structure, [_Box(value) for value in found])
        layers, others = {}, {}
        for index, (value,) in enumerate(of_layers):
            if isinstance(value, ByExample) and value.axis == 0:
                layers[index] = value.array.reshape(examples, -1, value.array.shape[1])
            elif isinstance(value, jax.Array):
                idle.update((reading.layers[index].weight, reading.layers[index].bias))
        for index, (value,) in of_others.items():
            if isinstance(value, Summed):
                others[index] = value.addends.reshape(examples, -1)
            elif isinstance(value, jax.Array):  # a linear function that does not depend on its arguments is 0
                idle.add(index)
        return layers, others

    kept, budget = jax.eval_shape(rows_of, jax.ShapeDtypeStruct((), jnp.int32)), BUDGET
    chosen: tuple[set[int], set[int]] = (set(), set())
    for kind, found in zip(chosen, kept, strict=True):
        for index, leaf in found.items():
            if (needed := colours * leaf.size) <= budget:
                kind.add(index)
                budget -= needed

    def kept_rows_of(colour):
        return tuple(
            {index: leaf for index, leaf in found.items() if index in kind}
            for kind, found in zip(chosen, rows_of(colour), strict=True)
        )

    if not any(chosen):
        return {}, {}, idle
    together = max(1, BUDGET // _intermediates(pull_back.jaxpr))
    return *_map(kept_rows_of, colours, together), idle


class _Box(NamedTuple):
    """Keeps a pytree from being looked into."""

    value: Any


def _intermediates(jaxpr: Any) -> int:
    """Numbers in all results of a jaxpr's equations: no run needs more."""
    return 1 + sum(math.prod(variable.aval.shape) for equation in jaxpr.eqns for variable in equation.outvars)


def _layer_gram(layer: Layer, weight, cotangents: jax.Array, examples: int, weights: list) -> jax.Array:
    """(M, M) in the order (example, output), from cotangents (C, N, T, fan-out)."""
    dtype = cotangents.dtype
    inputs = layer.inputs.astype(dtype).reshape(examples, -1, layer.inputs.shape[-1])
    colours, _, length, _ = cotangents.shape
    by_example = cotangents.transpose(1, 0, 2, 3)
    inverse = weights[layer.weight]
    if length == 1 and inverse is None:
        of_inputs = _gram(inputs[:, 0], None) + (1 if layer.bias is not None else 0)
        return jnp.repeat(jnp.repeat(of_inputs, colours, 0), colours, 1) * _gram(
            by_example.reshape(examples * colours, -1), None
        )
    if inverse is not None:
        inverse = inverse.reshape(matrix_shape(weight.shape))
        inverse = inverse.T if layer.transposed else inverse
    total = _blocked_gram(inputs, by_example, inverse)
    if layer.bias is not None:
        of_bias = None if weights[layer.bias] is None else weights[layer.bias].reshape(-1)
        total += _gram(jnp.sum(by_example, axis=2).reshape(examples * colours, -1), of_bias)
    return total


def _blocked_gram(inputs: jax.Array, cotangents: jax.Array, inverse: jax.Array | None) -> jax.Array:
    """U D⁻¹ Uᵀ for rows Σ_t x_nt s_nctᵀ: inputs (N, T, I), cotangents (N, C, T, O), D⁻¹ (I, O)."""
    examples, colours, _, fan_out = cotangents.shape
    count, fan_in = examples * colours, inputs.shape[-1]
    blocks = math.ceil(fan_in * count * fan_out / BUDGET)
    width = math.ceil(fan_in / blocks)
    padding = blocks * width - fan_in
    inputs = jnp.pad(inputs, ((0, 0), (0, 0), (0, padding)))
    blocks_of = {"inputs": jnp.moveaxis(inputs.reshape(*inputs.shape[:2], blocks, width), 2, 0)}
    if inverse is not None:
        blocks_of["inverse"] = jnp.pad(inverse, ((0, padding), (0, 0))).reshape(blocks, width * fan_out)

    def add(total, block):
        rows = jnp.einsum("nti,ncto->ncio", block["inputs"], cotangents, precision="highest")
        return total + _gram(rows.reshape(count, -1), block.get("inverse")), None

    return jax.lax.scan(add, jnp.zeros([count, count], cotangents.dtype), blocks_of)[0]


def _gram(rows: jax.Array, inverse: jax.Array | None) -> jax.Array:
    """U D⁻¹ Uᵀ; what an accelerator saves on products in float32 would cost K its definiteness."""
    if inverse is not None:
        rows = rows * jnp.sqrt(inverse)[None, :]
    return jnp.matmul(rows, rows.T, precision="highest")


# One pull-back and one push-forward for each output.


def _columns(jvp, vjp, params, inverse, left: set[int], outputs, dtype) -> jax.Array:
    """K of the leaves `left` alone."""
    count = tree.size(outputs)
    structure = jax.tree.structure(params)
    weights = [None] * structure.num_leaves if inverse is None else jax.tree.leaves(inverse)

    def kernel_product(place):
        basis = tree.unflatten(jnp.zeros([count], dtype).at[place].set(1), outputs)
        pulled = jax.tree.leaves(vjp(basis))
        for index, leaf in enumerate(pulled):
            if index not in left:
                pulled[index] = jnp.zeros_like(leaf)
            elif weights[index] is not None:
                pulled[index] = (leaf * weights[index].astype(leaf.dtype)).astype(leaf.dtype)
        return tree.flatten(jvp(jax.tree.unflatten(structure, pulled)), dtype)

    size = _intermediates(jax.make_jaxpr(kernel_product)(jnp.int32(0)).jaxpr)
    return _map(kernel_product, count, max(1, BUDGET // size))


def _map(function: Callable[[jax.Array], Any], count: int, together: int) -> Any:
    """Results for 0, ..., count − 1, so many computed together; without a loop where that is all of them."""
    places = jnp.arange(count, dtype=jnp.int32)
    return jax.vmap(function)(places) if count <= together else jax.lax.map(function, places, batch_size=together)
