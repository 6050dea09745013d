"""Rules of products: matrices, arrays and convolutions.

Both factors may depend on the examples. Then only products of each example with itself are allowed.
"""

import jax

from gnlin.jaxprs import Operation
from gnlin.structure.independence.values import (
    ByExample,
    Summed,
    array_of,
    by_block,
    computed,
)


def dot_general(operation: Operation) -> list[ByExample] | list[Summed] | None:
    """A product that contracts some axes, and is taken for each index of other, shared ones.

    The examples may be among the shared axes or among those that one factor keeps: both leave them
    apart. Contracted, they are summed over.
    """
    left, right = operation.inputs
    place = 0 if isinstance(left, ByExample) else 1  # of the factor that depends on the examples
    value, other = (left, right) if place == 0 else (right, left)
    contracting, batch = operation.params["dimension_numbers"]
    own_contracting, own_batch = contracting[place], batch[place]

    if isinstance(other, ByExample):
        paired = (value.axis, other.axis) in zip(own_batch, batch[1 - place], strict=True)
        return computed(operation, own_batch.index(value.axis)) if paired else None
    if value.axis in own_batch:
        return computed(operation, own_batch.index(value.axis))
    if value.axis in own_contracting:
        other_axis = contracting[1 - place][own_contracting.index(value.axis)]
        axes = (value.axis, other_axis) if place == 0 else (other_axis, value.axis)
        return [_open_sum(operation, axes)]

    # The axis stays. The product has the axes of the batch first, then those that the left factor
    # keeps, then those that the right one keeps.
    taken = (*own_contracting, *own_batch)
    free = [axis for axis in range(value.array.ndim) if axis not in taken]
    axis = len(own_batch) + free.index(value.axis)
    if place == 1:
        axis += other.ndim - len(contracting[0]) - len(batch[0])
    return computed(operation, axis)


def conv_general_dilated(operation: Operation) -> list[ByExample] | list[Summed] | None:
    """One factor may have examples, as images, as outputs of the kernel, or as its features.

    In the pull-back to a kernel the images of the batch are the features: the sum is over these.
    """
    params, (images, kernel) = operation.params, operation.inputs
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    numbers = params["dimension_numbers"]
    left, right = isinstance(images, ByExample), isinstance(kernel, ByExample)
    if left and right:
        return None
    if left and images.axis == numbers.lhs_spec[0]:
        return computed(operation, numbers.out_spec[0])
    if right and kernel.axis == numbers.rhs_spec[0]:
        return computed(operation, numbers.out_spec[1])
    features = (numbers.lhs_spec[1], numbers.rhs_spec[1])
    is_feature = images.axis == features[0] if left else kernel.axis == features[1]
    return [_open_sum(operation, features)] if is_feature else None


def _open_sum(operation: Operation, axes: tuple[int, int]) -> Summed:
    """A product whose sum goes over the examples: each example's share, by itself.

    `axes` are the two that are contracted, of the left and of the right factor.
    """
    examples = next(v.examples for v in operation.inputs if isinstance(v, ByExample))
    shares = [
        by_block(array_of(value), axis, examples)
        for value, axis in zip(operation.inputs, axes, strict=True)
    ]
    return Summed(jax.vmap(lambda *factors: operation.apply(factors)[0])(*shares))
