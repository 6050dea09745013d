"""Rules of operations on single entries, and of those that move, cut or join axes."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from gnlin.jaxprs import Operation
from gnlin.structure.independence.values import (
    ByExample,
    Rule,
    array_of,
    computed,
    example_axes,
)


def elementwise(operation: Operation) -> list[ByExample] | None:
    """Every entry of the output comes from the same entries of the inputs."""
    axis, *others = example_axes(operation)
    if others or not all(_fits(value, operation.shape, axis) for value in operation.inputs):
        return None
    return computed(operation, axis)


def _fits(value: Any, shape: Sequence[int], axis: int) -> bool:
    """Whether an input has its examples where the output has them, and is the same for all else.

    Newer versions of JAX stretch axes of length 1. One that holds examples must not be stretched.
    """
    own = jnp.shape(array_of(value))
    if isinstance(value, ByExample) and own[axis] != shape[axis]:
        return False
    if own == ():
        return True
    return len(own) == len(shape) and all(a in (b, 1) for a, b in zip(own, shape, strict=True))


def apart_from_axes(name: str) -> Rule:
    """The rule of operations along the axes in their parameter `name`, which keep the others."""

    def rule(operation: Operation) -> list[ByExample] | None:
        axis, *others = example_axes(operation)
        touched = operation.params[name]
        touched = touched if isinstance(touched, tuple) else (touched,)
        # A scalar among the inputs has no axis of examples.
        all_have_axes = all(
            isinstance(value, ByExample) or jnp.ndim(value) > 0 for value in operation.inputs
        )
        if others or not all_have_axes or axis in touched:
            return None
        return computed(operation, axis)

    return rule


def transpose(operation: Operation) -> list[ByExample]:
    (value,) = operation.inputs
    return computed(operation, operation.params["permutation"].index(value.axis))


def reshape(operation: Operation) -> list[ByExample] | None:
    """Other lengths of axes. Also for squeeze.

    Blocks of consecutive entries stay the same where as many entries come before an axis of the
    output, and N divides its length.
    """
    value = operation.inputs[0]
    if operation.name == "reshape" and operation.params["dimensions"] is not None:
        return None
    before = math.prod(value.array.shape[: value.axis])
    for axis, length in enumerate(operation.shape):
        divides = length > 0 and length % value.examples == 0
        if math.prod(operation.shape[:axis]) == before and divides:
            return computed(operation, axis)
    return None


def broadcast_in_dim(operation: Operation) -> list[ByExample] | None:
    value = operation.inputs[0]
    axis = operation.params["broadcast_dimensions"][value.axis]
    if operation.shape[axis] != value.array.shape[value.axis]:
        return None
    return computed(operation, axis)


def slice_(operation: Operation) -> list[ByExample] | None:
    """A part of an array that has all of the examples."""
    (value,), params = operation.inputs, operation.params
    axis, strides = value.axis, params["strides"]
    start, end = params["start_indices"][axis], params["limit_indices"][axis]
    stride = 1 if strides is None else strides[axis]
    is_whole = (start, end, stride) == (0, value.array.shape[axis], 1)
    return computed(operation, axis) if is_whole else None


def dynamic_slice(operation: Operation) -> list[ByExample] | None:
    """A part that has all of the examples, from a place that is the same for all."""
    value, *starts = operation.inputs
    if not isinstance(value, ByExample) or any(isinstance(start, ByExample) for start in starts):
        return None
    is_whole = operation.params["slice_sizes"][value.axis] == value.array.shape[value.axis]
    return computed(operation, value.axis) if is_whole else None


def pad(operation: Operation) -> list[ByExample] | None:
    value, padding = operation.inputs
    if not isinstance(value, ByExample) or isinstance(padding, ByExample):
        return None
    untouched = operation.params["padding_config"][value.axis] == (0, 0, 0)
    return computed(operation, value.axis) if untouched else None


def stack(operation: Operation) -> list[ByExample] | None:
    """Arrays along a new axis. All have to have examples, along the same axis."""
    axis, *others = example_axes(operation)
    if others or not all(isinstance(value, ByExample) for value in operation.inputs):
        return None
    is_after = operation.params["axis"] <= axis
    return computed(operation, axis + is_after)


def unstack(operation: Operation) -> list[ByExample] | None:
    (value,), along = operation.inputs, operation.params["axis"]
    if value.axis == along:
        return None
    return computed(operation, value.axis - (along < value.axis))


def gather(operation: Operation) -> list[ByExample] | None:
    """Entries of a table that is the same for all examples."""
    (table, indices), numbers = operation.inputs, operation.params["dimension_numbers"]
    if isinstance(table, ByExample) or getattr(numbers, "start_indices_batching_dims", ()):
        return None
    # The output has the axes of the indices, but for their last, and those of a slice of the table.
    places = range(len(operation.shape))
    of_indices = [axis for axis in places if axis not in numbers.offset_dims]
    return computed(operation, of_indices[indices.axis])
