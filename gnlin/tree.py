"""Pytree arithmetic that keeps the dtypes of parameters and reduces in at least float32."""

import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from gnlin.sharding import sharded_like, unsharded

# Any pytree of arrays. chex.ArrayTree spells this out, but arithmetic on its leaves does not
# type-check.
Tree = Any
Params = Tree
Outputs = Tree
Batch = Tree


def accumulation_dtype(*trees: Tree) -> jnp.dtype:
    """The widest dtype among the leaves, and at least float32: sums and scalars have it."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(trees)]
    widest = max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits, default=jnp.dtype("float32"))
    # bfloat16 and float16 have two or three digits, too few for a sum of many terms.
    return jnp.dtype("float32") if jnp.finfo(widest).bits < 32 else jnp.dtype(widest)


def cast(tree: Tree, dtype) -> Tree:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), tree)


def cast_like(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(
        lambda leaf, ref: jnp.asarray(leaf).astype(jnp.result_type(ref)), tree, like
    )


def copy(tree: Tree) -> Tree:
    """Fresh buffers with equal contents; an alias would break buffer donation."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def spread(labels: Tree, tree: Tree) -> list[Any]:
    """The label of each leaf of `tree`, in order; `labels` is like `tree` or its upper part."""
    found: list[Any] = []
    jax.tree.map(
        lambda label, part: found.extend([label] * len(jax.tree.leaves(part))), labels, tree
    )
    return found


def zeros_like(tree: Tree, dtype=None) -> Tree:
    # Of an array that is no tracer JAX would give zeros that are whole on every device.
    return jax.tree.map(lambda leaf: sharded_like(jnp.zeros_like(leaf, dtype=dtype), leaf), tree)


def add(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.add, a, b)


def subtract(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.subtract, a, b)


def scale(factor: chex.Numeric, tree: Tree) -> Tree:
    """``factor * tree``, computed in the accumulation dtype and rounded to that of each leaf."""

    def scaled(leaf):
        dtype = accumulation_dtype(leaf)
        # Without the last cast a float32 factor would promote leaves of half precision.
        return (jnp.asarray(factor, dtype) * leaf.astype(dtype)).astype(leaf.dtype)

    return jax.tree.map(scaled, tree)


def add_scaled(a: Tree, factor: chex.Numeric, b: Tree) -> Tree:
    """``a + factor * b``, rounded once, to the dtype of `a`."""

    def combined(x, y):
        dtype = accumulation_dtype(x, y)
        return (x.astype(dtype) + jnp.asarray(factor, dtype) * y.astype(dtype)).astype(x.dtype)

    return jax.tree.map(combined, a, b)


def select(condition: chex.Numeric, on_true: Tree, on_false: Tree) -> Tree:
    """Leafwise `jnp.where`. Multiplying by a flag instead would let a NaN through."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def inner(a: Tree, b: Tree) -> jax.Array:
    """Euclidean inner product over all leaves, in the accumulation dtype."""
    dtype = accumulation_dtype(a, b)
    products = jax.tree.map(lambda x, y: jnp.sum(x.astype(dtype) * y.astype(dtype)), a, b)
    return _alone(sum(jax.tree.leaves(products), start=jnp.zeros([], dtype)))


def norm(tree: Tree) -> jax.Array:
    """Euclidean norm over all leaves, free of overflow and underflow in the squares."""
    # Squares of gradients underflow long before gradients do. So entries are divided by the largest
    # one first.
    largest = max_abs(tree)
    # The unit is 1 for zeros, and where the largest is NaN, which then reaches the result.
    unit = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    dtype = unit.dtype
    relative = jax.tree.map(lambda leaf: leaf.astype(dtype) / unit, tree)
    return unit * jnp.sqrt(inner(relative, relative))


def max_abs(tree: Tree) -> jax.Array:
    """Largest absolute entry; NaN where any entry is NaN, 0 for a tree without entries."""
    dtype = accumulation_dtype(tree)
    # The maximum of no entries is an error in JAX, so empty leaves are passed over.
    sizes = [jnp.max(jnp.abs(leaf)).astype(dtype) for leaf in jax.tree.leaves(tree) if leaf.size]
    return _alone(jnp.max(jnp.stack(sizes)) if sizes else jnp.zeros([], dtype))


def if_finite(tree: Tree, otherwise: Tree) -> Tree:
    """`tree`, and `otherwise` where an entry of it is not finite."""
    return select(all_finite(tree), tree, otherwise)


def all_finite(tree: Tree) -> jax.Array:
    # The largest entry tells. XLA compiles a maximum in a third of the time of a conjunction.
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    sizes = [jnp.abs(leaf) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.isfinite(max_abs(sizes))


def _alone(scalar: jax.Array) -> jax.Array:
    """The same number, computed once.

    XLA would copy the sum over the leaves into the program of every leaf that uses it. The square
    of the number of leaves took a third of the time of a compilation. JAX 0.10 copies all the same.
    """
    return jax.lax.optimization_barrier(scalar)


def size(tree: Tree) -> int:
    """Number of entries over all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def flatten(tree: Tree, dtype) -> jax.Array:
    """All entries as one vector of `dtype`, on every device."""
    leaves = [jnp.ravel(unsharded(leaf)).astype(dtype) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves) if leaves else jnp.zeros([0], dtype)


def unflatten(vector: jax.Array, like: Tree) -> Tree:
    """The inverse of `flatten`, with the shapes, dtypes and shardings of `like`."""
    leaves, structure = jax.tree.flatten(like)
    ends = list(itertools.accumulate((leaf.size for leaf in leaves), initial=0))
    parts = [vector[start:end] for start, end in itertools.pairwise(ends)]
    shaped = [
        sharded_like(part.reshape(leaf.shape).astype(leaf.dtype), leaf)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, shaped)


def is_masked(node: Any) -> bool:
    """Whether `node` is one of the holes that `optax.masked` leaves in a tree."""
    return isinstance(node, optax.MaskedNode)


def has_holes(tree: Any) -> bool:
    return any(is_masked(node) for node in jax.tree.leaves(tree, is_leaf=is_masked))


def fill_holes(tree: Any, full: Any) -> Any:
    """`tree`, with the subtree of `full` in place of every `optax.MaskedNode`."""
    return jax.tree.map(
        lambda node, whole: whole if is_masked(node) else node, tree, full, is_leaf=is_masked
    )
