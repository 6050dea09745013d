"""Products of rows of J, leaf by leaf: K += U_a D⁻¹ U_bᵀ.

At most layers the rows U are never formed. With one application for each example, and D = I,

    K[(n, c), (m, d)] += (⟨x_n, x_m⟩ + 1) ⟨s_nc, s_md⟩

where x are the inputs and s the cotangents for each output. Where rows are cheaper they are formed
a block of the fan-in at a time.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gnlin.kernel.rows import BUDGET, Factors, Rows

# Which products of rows K has: of all pairs of outputs, of each output with itself, or the sum of
# the latter.
Pairs = Literal["full", "diagonal", "trace"]


def contract(
    a: Rows,
    b: Rows,
    pairs: Pairs,
    weights: Mapping[int, jax.Array] | None = None,
    budget: int = BUDGET,
) -> jax.Array:
    """K of the rows a and b: (N, C, M, C), of the diagonal (C, N, M), of the trace (N, M).

    Args:
        a: rows for N examples.
        b: rows for M examples.
        pairs: which pairs of outputs K has.
        weights: D⁻¹ at each leaf of the rows, as one vector; `None` for the identity.
        budget: numbers that a block of rows may hold.
    """
    total: Any = 0
    for leaf in _leaves_of_both(a, b):
        weight = None if weights is None else weights[leaf]
        if leaf in a.factored and leaf in b.factored:
            total, x, y = _after(total, a.factored[leaf], b.factored[leaf])
            total = total + _of_factors(x, y, pairs, weight, budget)
        elif leaf in a.whole and leaf in b.whole:
            total, x, y = _after(total, a.whole[leaf], b.whole[leaf])
            total = total + _of_whole(x, y, pairs, weight)
        else:  # the shorter of two sequences may have its rows whole
            total = total + _of_whole(a.at(leaf), b.at(leaf), pairs, weight)
    return total


def _leaves_of_both(a: Rows, b: Rows) -> list[int]:
    """The leaves at which both have rows, those with factors first. Others have no influence."""
    both = (a.factored.keys() | a.whole.keys()) & (b.factored.keys() | b.whole.keys())
    factored = [leaf for leaf in {**a.factored, **b.factored} if leaf in both]
    return [*factored, *sorted(both.difference(factored))]


def _after(total: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
    """The same three, the rows x and y to be used once `total` is there.

    Side by side, the leaves would need as much memory as all together.
    """
    if not isinstance(total, jax.Array):  # the first leaf
        return total, x, y
    if jax.tree.leaves(x)[0] is jax.tree.leaves(y)[0]:
        x, total = jax.lax.optimization_barrier((x, total))
        return total, x, x  # still one array, so that its product is formed once
    return jax.lax.optimization_barrier((total, x, y))


def _of_whole(u: jax.Array, v: jax.Array, pairs: Pairs, weight: jax.Array | None) -> jax.Array:
    """U D⁻¹ Vᵀ, of U (N, C, size) and V (M, C, size).

    In the highest precision: the savings of an accelerator on float32 would cost K its
    definiteness.
    """
    if weight is not None:
        # (U D^-½)(V D^-½)ᵀ
        root = jnp.sqrt(weight)[None, None, :]
        u, v = u * root, v * root
    (examples, per_example, size), others = u.shape, len(v)
    if pairs == "diagonal":
        return jnp.einsum("ncp,mcp->cnm", u, v, precision="highest")
    # As products of matrices, which are faster than those of arrays.
    if pairs == "trace":
        u, v = u.reshape(examples, per_example * size), v.reshape(others, per_example * size)
        return jnp.matmul(u, v.T, precision="highest")
    u, v = u.reshape(examples * per_example, size), v.reshape(others * per_example, size)
    product = jnp.matmul(u, v.T, precision="highest")
    return product.reshape(examples, per_example, others, per_example)


def _of_factors(
    a: Factors, b: Factors, pairs: Pairs, weight: jax.Array | None, budget: int
) -> jax.Array:
    """The product at a layer, by the route that takes less work."""
    if weight is None and _positions_are_cheaper(a, b, pairs, budget):
        # One position of a after another, which has the shapes (N, I) and (N, C, O).
        x, s = jnp.moveaxis(a.inputs, 1, 0), jnp.moveaxis(a.cotangents, 2, 0)
        return _sum_over(lambda of_a: _at_position(of_a[0], of_a[1], b, pairs), (x, s))
    return _by_rows(a, b, pairs, weight, budget)


def _positions_are_cheaper(a: Factors, b: Factors, pairs: Pairs, budget: int) -> bool:
    """Whether to multiply inputs and cotangents for each pair of positions, and not form rows.

    The work is counted for one example of a with one of b.
    """
    (n, positions, fan_in), (m, other_positions, _) = a.inputs.shape, b.inputs.shape
    per_example, fan_out = a.cotangents.shape[1], a.cotangents.shape[-1]
    products = per_example**2 if pairs == "full" else per_example
    # For each pair of positions: products of cotangents of length O, and of inputs of length I.
    by_position = positions * other_positions * (products * fan_out + fan_in)
    # To form the rows of one example is work for all that it meets.
    forming = (positions / m + other_positions / n) * per_example * fan_in * fan_out
    # Products of rows of length I · O, after both have been formed.
    by_row = products * fan_in * fan_out + forming
    # One position of a with all of b leaves a product for each pair of outputs and position.
    fits = positions == 1 or n * m * products * other_positions <= budget
    return by_position < by_row and fits


# Products s tᵀ of cotangents: s at one position of a, t at all positions u of b. The letters are
# examples n and m, outputs c and d, and the fan-out o.
_OF_COTANGENTS: dict[Pairs, str] = {
    "full": "nco,mduo->ncmdu",
    "diagonal": "nco,mcuo->cnmu",
    "trace": "nco,mcuo->nmu",
}


def _at_position(x: jax.Array, s: jax.Array, b: Factors, pairs: Pairs) -> jax.Array:
    """⟨x, y⟩ ⟨s, t⟩ of one position of a, x (N, I) and s (N, C, O), summed over those of b."""
    # (N, M, U) here; the axes of outputs are added below.
    of_inputs = jnp.einsum("ni,mui->nmu", x, b.inputs, precision="highest")
    of_cotangents = jnp.einsum(_OF_COTANGENTS[pairs], s, b.cotangents, precision="highest")
    if pairs == "full":
        of_inputs = of_inputs[:, None, :, None]
    elif pairs == "diagonal":
        of_inputs = of_inputs[None]
    return jnp.sum(of_inputs * of_cotangents, axis=-1)


def _by_rows(
    a: Factors, b: Factors, pairs: Pairs, weight: jax.Array | None, budget: int
) -> jax.Array:
    """The product of rows, which are formed a block of the fan-in at a time."""
    (n, _, fan_in), m = a.inputs.shape, len(b.inputs)
    per_example, fan_out = a.cotangents.shape[1], a.cotangents.shape[-1]

    def rows(factors: Factors) -> jax.Array:
        return factors.product().reshape(len(factors.inputs), per_example, -1)

    blocks = math.ceil(fan_in * (n + m) * per_example * fan_out / budget)
    if blocks == 1:
        own = rows(a)
        are_same = a.inputs is b.inputs and a.cotangents is b.cotangents
        return _of_whole(own, own if are_same else rows(b), pairs, weight)
    width = math.ceil(fan_in / blocks)
    padding = blocks * width - fan_in

    def in_blocks(inputs: jax.Array) -> jax.Array:
        padded = jnp.pad(inputs, ((0, 0), (0, 0), (0, padding)))
        return jnp.moveaxis(padded.reshape(*inputs.shape[:2], blocks, width), 2, 0)

    if weight is not None:
        padded = jnp.pad(weight.reshape(fan_in, fan_out), ((0, padding), (0, 0)))
        weight = padded.reshape(blocks, width * fan_out)

    def of_block(block: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        x, y, weight = block
        own, others = Factors(x, a.cotangents), Factors(y, b.cotangents)
        return _of_whole(rows(own), rows(others), pairs, weight)

    return _sum_over(of_block, (in_blocks(a.inputs), in_blocks(b.inputs), weight))


def _sum_over(function: Callable[[Any], jax.Array], items: Any) -> jax.Array:
    """Sum over the first axis of `items`. There is no loop where that has length 1."""
    first = function(jax.tree.map(lambda leaf: leaf[0], items))
    rest = jax.tree.map(lambda leaf: leaf[1:], items)
    if not len(jax.tree.leaves(rest)[0]):
        return first
    return jax.lax.scan(lambda total, item: (total + function(item), None), first, rest)[0]
