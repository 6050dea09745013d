"""Rules of reductions: along whole axes, in windows, and to the largest few."""

import jax.numpy as jnp

from gnlin.jaxprs import Operation
from gnlin.structure.independence.values import (
    ByExample,
    Summed,
    by_block,
    computed,
    example_axes,
)


def reduce_sum(operation: Operation) -> list[ByExample] | list[Summed]:
    """A sum along axes. One over examples is kept open.

    Other reductions share this rule in a proof, where sums over examples count as mixed.
    """
    (value,), axes = operation.inputs, operation.params["axes"]
    if value.axis not in axes:
        return computed(operation, value.axis - sum(axis < value.axis for axis in axes))
    blocks = by_block(value.array, value.axis, value.examples)
    return [Summed(jnp.sum(blocks, axis=tuple(axis + 1 for axis in axes)))]


def window(operation: Operation) -> list[ByExample] | None:
    """Pooling and its derivatives: windows that hold a single example."""
    axis, *others = example_axes(operation)
    params = operation.params
    length, stride = params["window_dimensions"][axis], params["window_strides"][axis]
    dilations = [params[name][axis] for name in _DILATIONS if name in params]
    is_padded = params["padding"][axis] != (0, 0)
    if others or (length, stride) != (1, 1) or any(d != 1 for d in dilations) or is_padded:
        return None
    return computed(operation, axis)


_DILATIONS = ("base_dilation", "window_dilation")


def top_k(operation: Operation) -> list[ByExample] | None:
    (value,) = operation.inputs
    along = operation.params.get("axis", -1) % value.array.ndim
    return computed(operation, value.axis) if value.axis != along else None
