"""Rows of a linearised model's Jacobian, from one pull-back for each output of an example.

One pull-back serves output c of all N examples at once. That makes C pull-backs, not N·C. It is
right only where the outputs of each example depend on its own rows. `gnlin.structure.independence`
proves this from the equations of the pull-back.

At a dense layer the rows are kept as their factors, its inputs and cotangents, where these are
smaller.
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
from gnlin.structure.layers import DenseReading, Layer, read_dense_layers
from gnlin.tree import Outputs, Params

# Numbers held at once beside the M² of K itself: cotangents and rows, a block of rows, and the
# intermediate results of the pull-backs that run together. Half a gigabyte in float32.
BUDGET = 2**27


class Factors(NamedTuple):
    """Rows at a layer, Σ_t x̃_t s_tᵀ, as their factors. With a bias x̃ = (x, 1), without x̃ = x."""

    inputs: jax.Array  # x̃, (N, T, I)
    cotangents: jax.Array  # s, (N, C, T, O)

    def product(self) -> jax.Array:
        """The rows themselves, (N, C, I, O)."""
        return jnp.einsum("nti,ncto->ncio", *self, precision="highest")


class Rows(NamedTuple):
    """Rows of J, one for output c of example n, at each leaf by its position.

    Those of a layer with a bias are at W's position, and have those of b at their end.
    """

    factored: dict[int, Factors]
    whole: dict[int, jax.Array]  # (N, C, size)

    def at(self, leaf: int) -> jax.Array:
        """The rows at one leaf, (N, C, size)."""
        if leaf in self.whole:
            return self.whole[leaf]
        product = self.factored[leaf].product()
        return product.reshape(*product.shape[:2], -1)


class Found(NamedTuple):
    """The rows that one pull-back for each output of an example gives."""

    rows: Rows
    layers: tuple[Layer, ...]  # those that the rows have
    left: frozenset[int]  # leaves that are in none of the rows, and may influence the outputs
    pull_backs: int

    def without(self, left: frozenset[int]) -> Rows:
        """The rows, less those that share a leaf with `left`.

        Raises:
            LeftOutError: `left` lacks a leaf that is then in none of the rows.
        """
        of_layer: dict[int, set[int]] = {}
        for layer in self.layers:
            of_layer[layer.weight] = {layer.weight, layer.bias} - {None}
        held = [*self.rows.factored, *self.rows.whole]
        dropped = {leaf for leaf in held if of_layer.get(leaf, {leaf}) & left}
        missing = self.left.union(*(of_layer.get(leaf, {leaf}) for leaf in dropped)) - left
        if missing:
            raise LeftOutError(missing)
        factored = {leaf: row for leaf, row in self.rows.factored.items() if leaf not in dropped}
        whole = {leaf: row for leaf, row in self.rows.whole.items() if leaf not in dropped}
        return Rows(factored, whole)


class LeftOutError(Exception):
    """Leaves of the parameters have no rows in one part of a batch, but in another.

    The order in which a product is contracted may depend on the number of examples.
    """

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
    """Rows of a linearisation at `params`, at the leaves where examples are proved apart.

    Args:
        jvp: the push-forward.
        params: the parameters.
        budget: numbers that the pull-backs which run together may hold.
        keep: numbers that the rows may hold. Leaves beyond that have none.
    """
    outputs, leaves = jax.eval_shape(jvp, params), jax.tree.leaves(params)
    examples, dtype = number_of_examples(outputs), tree.accumulation_dtype(params)
    not_empty = {leaf for leaf, value in enumerate(leaves) if value.size}
    # Nothing can be proved from one example: an axis of length 1 could be any.
    if examples < 2:
        return Found(Rows({}, {}), (), frozenset(not_empty), 0)
    reading = read_dense_layers(jvp, params)
    pulled = _pull_back_by_example(reading, outputs, examples, budget, keep)

    rows, layers, with_rows = Rows({}, {}), [], set(pulled.others)
    for number, cotangents in pulled.layers.items():
        layer = reading.layers[number]
        factors = _factors(layer, cotangents, examples, dtype)
        if _whole_is_smaller(factors):
            product = factors.product()
            rows.whole[layer.weight] = product.reshape(*product.shape[:2], -1)
        else:
            rows.factored[layer.weight] = factors
        layers.append(layer)
        with_rows |= {layer.weight, layer.bias}
    for leaf, of_outputs in pulled.others.items():
        rows.whole[leaf] = jnp.swapaxes(of_outputs, 0, 1).astype(dtype)

    per_example = tree.size(outputs) // examples
    left = frozenset(not_empty - with_rows - pulled.idle)
    if not left and not with_rows:
        # Rows of length 0, so that their product is a kernel of zeros.
        rows.whole[0] = jnp.zeros([examples, per_example, 0], dtype)
    return Found(rows, tuple(layers), left, per_example if with_rows else 0)


def _factors(layer: Layer, cotangents: jax.Array, examples: int, dtype: Any) -> Factors:
    """The factors of a layer, from its cotangents (C, N, T, O)."""
    # The R = N·T applications, one axis for the examples and one for the positions.
    inputs = layer.inputs.astype(dtype).reshape(examples, -1, layer.inputs.shape[-1])
    if layer.bias is not None:
        # x̃ = (x, 1): a bias is the weight of a constant input.
        inputs = jnp.concatenate([inputs, jnp.ones_like(inputs[..., :1])], axis=-1)
    return Factors(inputs, jnp.swapaxes(cotangents.astype(dtype), 0, 1))


def _whole_is_smaller(factors: Factors) -> bool:
    """Whether the rows take no more numbers than their factors."""
    _, positions, fan_in = factors.inputs.shape
    _, per_example, _, fan_out = factors.cotangents.shape
    # C·I·O numbers an example, against T·I of inputs and C·T·O of cotangents.
    return per_example * fan_in * fan_out <= positions * (fan_in + per_example * fan_out)


class _Pulled(NamedTuple):
    """The results of one pull-back for each of the C outputs of an example."""

    layers: dict[int, jax.Array]  # number of a layer ↦ its cotangents, (C, N, T, O)
    others: dict[int, jax.Array]  # another leaf ↦ its rows, (C, N, size)
    idle: frozenset[int | None]  # leaves that have no influence on the outputs


class _OfOneOutput(NamedTuple):
    """The same from the pull-back for one output: without the axis C."""

    layers: dict[int, jax.Array]
    others: dict[int, jax.Array]

    def only(self, chosen: "_OfOneOutput") -> "_OfOneOutput":
        """The entries that `chosen` has as well."""
        return _OfOneOutput(
            {key: value for key, value in self.layers.items() if key in chosen.layers},
            {key: value for key, value in self.others.items() if key in chosen.others},
        )


def _pull_back_by_example(
    reading: DenseReading, outputs: Outputs, examples: int, budget: int, room: float
) -> _Pulled:
    """Cotangents and rows where examples are proved apart, as long as there is room for them."""
    # The equations of the pull-back are run on values that know their axis of examples. A result
    # tells whether examples stayed apart on the way.
    pull_back, shape = jax.make_jaxpr(reading.pull_back, return_shape=True)(outputs)
    structure = jax.tree.structure(shape)
    per_example = tree.size(outputs) // examples
    idle: set[int | None] = set()

    def of_output(place: jax.Array) -> _OfOneOutput:
        basis = _basis_cotangent(place, outputs, examples)
        values = run_by_example(pull_back, jax.tree.leaves(basis), examples)
        # Boxes, for `jax.tree` would take the values apart.
        of_layers, of_others = jax.tree.unflatten(structure, [_Box(value) for value in values])
        found = _OfOneOutput({}, {})
        for number, (value,) in enumerate(of_layers):
            if isinstance(value, ByExample) and value.axis == 0:
                # The applications of one example lie side by side: R splits into N and T.
                found.layers[number] = value.array.reshape(examples, -1, value.array.shape[1])
            elif isinstance(value, jax.Array):
                idle.update((reading.layers[number].weight, reading.layers[number].bias))
        for leaf, (value,) in of_others.items():
            if isinstance(value, Summed):
                # A leaf's gradient is a sum over examples. Its addends are the rows.
                found.others[leaf] = value.addends.reshape(examples, -1)
            elif isinstance(value, jax.Array):
                # A linear function that does not depend on its arguments is 0.
                idle.add(leaf)
        return found

    # This trace also says which leaves are idle.
    shapes = jax.eval_shape(of_output, jax.ShapeDtypeStruct((), jnp.int32))
    kept = _within(room, shapes, per_example)
    if not kept.layers and not kept.others:
        return _Pulled({}, {}, frozenset(idle))
    together = max(1, budget // numbers_held_by(pull_back.jaxpr))
    found = map_together(lambda place: of_output(place).only(kept), per_example, together)
    return _Pulled(found.layers, found.others, frozenset(idle))


class _Box(NamedTuple):
    """Keeps a pytree in one piece."""

    value: Any


def _within(room: float, found: _OfOneOutput, per_example: int) -> _OfOneOutput:
    """The first entries that fit into so many numbers, those of all outputs together."""
    kept = _OfOneOutput({}, {})
    for values, chosen in ((found.layers, kept.layers), (found.others, kept.others)):
        for key, value in values.items():
            needed = per_example * value.size
            if needed <= room:
                chosen[key] = value
                room -= needed
    return kept


def _basis_cotangent(place: jax.Array, outputs: Outputs, examples: int) -> Outputs:
    """The cotangent that is 1 at one output of each example, and 0 elsewhere."""
    leaves, structure = jax.tree.flatten(outputs)
    lengths = [leaf.size // examples for leaf in leaves]
    # 1 at output `place` of an example, counted over all leaves.
    hot = jnp.arange(sum(lengths), dtype=jnp.int32) == place
    hot = hot.astype(tree.accumulation_dtype(outputs))
    found = []
    for leaf, part in zip(leaves, jnp.split(hot, np.cumsum(lengths)[:-1]), strict=True):
        of_all = jnp.broadcast_to(part[None, :], [examples, part.size])
        found.append(of_all.reshape(leaf.shape).astype(leaf.dtype))
    return jax.tree.unflatten(structure, found)


def map_together(function: Callable[[jax.Array], Any], count: int, together: int) -> Any:
    """Results for 0, ..., count − 1, of which `together` are computed at once.

    There is no loop where that is all of them.
    """
    places = jnp.arange(count, dtype=jnp.int32)
    if count <= together:
        return jax.vmap(function)(places)
    return jax.lax.map(function, places, batch_size=together)
