"""Rows of a linearised model's Jacobian, one pull-back for each output of an example.

One pull-back serves output c of all N examples at once: C pull-backs instead of N·C. That is right
only where each example's outputs depend on its own rows, which `by_example` proves from the
equations of the pull-back. Of a dense layer the rows are kept as what they are made of, its inputs
and cotangents, where that is less.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gnlin import tree
from gnlin.jaxprs import numbers_held_by
from gnlin.structure.independence import ByExample, Summed, run_by_example
from gnlin.structure.layers import Layer, Reading, read_layers
from gnlin.tree import Outputs, Params

# Numbers held at once beside the M² of K itself: cotangents and rows that are kept, a block of
# rows, the intermediate results of the pull-backs that run together. Half a gigabyte in float32.
BUDGET = 2**27


class Rows(NamedTuple):
    """Rows of J, one for output c of example n, at each leaf by its position; of a layer with a bias at W's."""

    factored: dict[
        int, tuple[jax.Array, jax.Array]
    ]  # Σ_t x̃_t s_tᵀ: x̃ = (x, 1) (N, T, I) and s (N, C, T, O)
    whole: dict[int, jax.Array]  # (N, C, size)


class Found(NamedTuple):
    """What rows could be had by one pull-back for each output of an example."""

    rows: Rows
    layers: tuple[Layer, ...]
    left: frozenset[
        int
    ]  # leaves that are in none of the rows, and have an influence on the outputs
    pull_backs: int

    def without(self, left: frozenset[int]) -> Rows:
        """The rows but those that `left` has leaves of; all that are left then have to be in it.

        Raises:
            LeftOutError: they are not.
        """
        layers = {layer.weight: {layer.weight, layer.bias} - {None} for layer in self.layers}
        kinds = self.rows.factored, self.rows.whole
        dropped = {index for kind in kinds for index in kind if layers.get(index, {index}) & left}
        if missing := self.left.union(*(layers.get(index, {index}) for index in dropped)) - left:
            raise LeftOutError(missing)
        return Rows(
            {index: row for index, row in self.rows.factored.items() if index not in dropped},
            {index: row for index, row in self.rows.whole.items() if index not in dropped},
        )


class LeftOutError(Exception):
    """Leaves of the parameters whose rows could not be had: how a product is contracted may depend on the batch."""

    def __init__(self, leaves: frozenset[int]):
        super().__init__(f"leaves {sorted(leaves)}")
        self.leaves = leaves


def number_of_examples(outputs: Outputs) -> int:
    """The length that all leaves have along their first axis; 1 where there is none."""
    lengths = {leaf.shape[0] if leaf.ndim else 1 for leaf in jax.tree.leaves(outputs)}
    return lengths.pop() if len(lengths) == 1 else 1


def find_rows(
    jvp: Callable[[Params], Outputs], params: Params, budget: int = BUDGET, keep: float = math.inf
) -> Found:
    """Rows of a linearisation at `params` where examples are proved apart, as long as no more than `keep` numbers."""
    outputs, leaves = jax.eval_shape(jvp, params), jax.tree.leaves(params)
    examples, dtype = number_of_examples(outputs), tree.accumulation_dtype(params)
    left = {index for index, leaf in enumerate(leaves) if leaf.size}
    if examples < 2:
        return Found(Rows({}, {}), (), frozenset(left), 0)
    reading, colours = read_layers(jvp, params), tree.size(outputs) // examples
    layers, others, idle = _rows_by_example(reading, outputs, examples, budget, keep)
    rows, kept = Rows({}, {}), []
    for index, cotangents in layers.items():
        layer = reading.layers[index]
        inputs = layer.inputs.astype(dtype).reshape(examples, -1, layer.inputs.shape[-1])
        if layer.bias is not None:
            inputs = jnp.concatenate([inputs, jnp.ones_like(inputs[..., :1])], axis=-1)
        factors = inputs, jnp.swapaxes(cotangents.astype(dtype), 0, 1)
        (_, length, fan_in), fan_out = inputs.shape, cotangents.shape[-1]
        if colours * fan_in * fan_out <= length * (fan_in + colours * fan_out):
            rows.whole[layer.weight] = product_of(*factors).reshape(examples, colours, -1)
        else:
            rows.factored[layer.weight] = factors
        kept.append(layer)
        left -= {layer.weight, layer.bias}
    for index, each in others.items():
        rows.whole[index] = jnp.swapaxes(each, 0, 1).astype(dtype)
    return Found(
        rows,
        tuple(kept),
        frozenset(left - others.keys() - idle),
        colours if layers or others else 0,
    )


def _rows_by_example(
    reading: Reading, outputs: Outputs, examples: int, budget: int, room: float
) -> tuple[dict, dict, set[int | None]]:
    """Where examples are proved apart: layer ↦ cotangents (C, N, T, fan-out), other leaf ↦ rows (C,
    N, size).

    And the leaves that have no influence on the outputs.
    """
    pull_back, shape = jax.make_jaxpr(reading.pull_back, return_shape=True)(outputs)
    structure, like = jax.tree.structure(shape), jax.tree.leaves(outputs)
    colours = tree.size(outputs) // examples
    idle: set[int | None] = set()

    def rows_of(colour):
        hot = (jnp.arange(colours, dtype=jnp.int32) == colour).astype(
            tree.accumulation_dtype(outputs)
        )
        ends = np.cumsum([leaf.size // examples for leaf in like])[:-1]
        parts = [
            jnp.broadcast_to(part[None, :], [examples, part.size]) for part in jnp.split(hot, ends)
        ]
        parts = [
            part.reshape(leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(parts, like, strict=True)
        ]
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
            elif isinstance(
                value, jax.Array
            ):  # a linear function that does not depend on its arguments is 0
                idle.add(index)
        return layers, others

    kept = jax.eval_shape(rows_of, jax.ShapeDtypeStruct((), jnp.int32))
    chosen: tuple[set[int], set[int]] = (set(), set())
    for kind, found in zip(chosen, kept, strict=True):
        for index, leaf in found.items():
            if (needed := colours * leaf.size) <= room:
                kind.add(index)
                room -= needed

    def kept_rows_of(colour):
        return tuple(
            {index: leaf for index, leaf in found.items() if index in kind}
            for kind, found in zip(chosen, rows_of(colour), strict=True)
        )

    if not any(chosen):
        return {}, {}, idle
    together = max(1, budget // numbers_held_by(pull_back.jaxpr))
    return *map_together(kept_rows_of, colours, together), idle


class _Box(NamedTuple):
    """Keeps a pytree from being looked into."""

    value: Any


def product_of(inputs: jax.Array, cotangents: jax.Array) -> jax.Array:
    """Σ_t x_t s_tᵀ: (N, C, I, O)."""
    return jnp.einsum("nti,ncto->ncio", inputs, cotangents, precision="highest")


def map_together(function: Callable[[jax.Array], Any], count: int, together: int) -> Any:
    """Results for 0, ..., count − 1, so many computed together; without a loop where that is all of them."""
    places = jnp.arange(count, dtype=jnp.int32)
    return (
        jax.vmap(function)(places)
        if count <= together
        else jax.lax.map(function, places, batch_size=together)
    )
