"""Parts of a batch: which leaves hold examples, and whether a part can stand for itself.

A model is a function of its whole batch. Where output n depends on example n alone, the outputs of
a part are that part of the outputs. Batch normalisation breaks this, and so does anything else that
brings examples together, without a mark in the shapes. `gnlin.structure.independence` has a proof.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.jaxprs import has_custom_pull_back, has_custom_push_forward
from gnlin.structure.independence import keeps_examples_apart
from gnlin.tree import Batch, Outputs, Params


class Cut(NamedTuple):
    """How a batch is cut into parts.

    Attributes:
        examples: N, along the first axis of every output; 1 where the outputs are scalars.
        outputs_per_example: C.
        batched: which leaves of the batch have N along the first axis, and are cut.
        apart: whether the outputs of a part are shown to be that part of the outputs.
    """

    examples: int
    outputs_per_example: int
    batched: tuple[bool, ...]
    apart: bool


def cut_of(model: Callable[[Params, Batch], Outputs], params: Params, batch: Batch) -> Cut:
    """How the batch of a model can be cut, from the shapes of its outputs and from a proof.

    Raises:
        ValueError: there are no outputs, or they differ in how many examples they are for.
    """
    outputs = jax.tree.leaves(jax.eval_shape(model, params, batch))
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in outputs}
    if any(jnp.size(leaf) == 0 for leaf in jax.tree.leaves(batch)):
        raise ValueError(f"`batch` is empty: {jax.tree.map(jnp.shape, batch)}")
    size = tree.size(outputs)
    if len(lengths) != 1 or not size:
        raise ValueError(
            "`model` must return outputs with one and the same number of examples along their "
            f"first axes (or scalars); got the shapes {[leaf.shape for leaf in outputs]}"
        )
    examples = lengths.pop()
    batched = tuple(
        jnp.ndim(leaf) > 0 and jnp.shape(leaf)[0] == examples for leaf in jax.tree.leaves(batch)
    )
    apart = examples is not None and any(batched) and _is_apart(model, params, batch, batched)
    return Cut(examples or 1, size // (examples or 1), batched, apart)


def _is_apart(
    model: Callable[[Params, Batch], Outputs],
    params: Params,
    batch: Batch,
    batched: tuple[bool, ...],
) -> bool:
    """Whether the model and its derivative are shown to treat the examples one by one.

    A derivative that the user wrote may bring examples together where the model does not. The proof
    cannot enter a `jax.custom_vjp`. Of a `jax.custom_jvp` it has the derivative along some
    direction.
    """
    jaxpr = jax.make_jaxpr(model)(params, batch).jaxpr
    if has_custom_pull_back(jaxpr):
        return False
    if not keeps_examples_apart(lambda batch: model(params, batch), batch, batched):
        return False
    if not has_custom_push_forward(jaxpr):
        return True

    def derivative(batch: Batch) -> Any:
        return jax.jvp(lambda params: model(params, batch), (params,), (params,))

    return keeps_examples_apart(derivative, batch, batched)


def part_of(batch: Batch, cut: Cut, start: jax.typing.ArrayLike, length: int) -> Batch:
    """`length` examples from `start` on."""
    leaves, structure = jax.tree.flatten(batch)
    parts = [
        jax.lax.dynamic_slice_in_dim(leaf, start, length, axis=0) if split else leaf
        for leaf, split in zip(leaves, cut.batched, strict=True)
    ]
    return jax.tree.unflatten(structure, parts)


def joined(first: Batch, second: Batch, cut: Cut) -> Batch:
    """The examples of one batch, then those of another. Leaves that are not cut are the first's."""
    leaves, others = jax.tree.leaves(first), jax.tree.leaves(second)
    both = [
        jnp.concatenate([a, b]) if split else a
        for a, b, split in zip(leaves, others, cut.batched, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(first), both)


def assemble(
    function: Callable[[jax.typing.ArrayLike], Any], total: int, length: int, axis: int
) -> Any:
    """Arrays of `total` along `axis`, made of blocks: ``function(start)`` gives `length` of them.

    There is no loop where one block is all. The last block overlaps the one before. So all are of
    one size, and nothing has to be cut off.
    """
    if length >= total:
        return function(0)
    starts = jnp.minimum(jnp.arange(0, total, length, dtype=jnp.int32), total - length)

    def put(whole: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, block, start, axis)

    def add(wholes: Any, start: jax.Array) -> tuple[Any, None]:
        blocks = function(start)
        return jax.tree.map(lambda whole, block: put(whole, block, start), wholes, blocks), None

    def empty(block: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros([*block.shape[:axis], total, *block.shape[axis + 1 :]], block.dtype)

    wholes = jax.tree.map(empty, jax.eval_shape(function, starts[0]))
    return jax.lax.scan(add, wholes, starts)[0]
