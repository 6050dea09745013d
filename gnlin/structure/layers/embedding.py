"""Recogniser of an embedding: rows of a table, by their numbers."""

import jax
import jax.numpy as jnp

from gnlin.jaxprs import Operation
from gnlin.structure.layers.notes import Notes, Site, Tangent, View, depends


def gather(operation: Operation, notes: Notes) -> Tangent | None:
    """Rows of a table, the products of one-hot vectors with it.

    The inputs of the site are the places of the ones.
    """
    (view, numbers), params = operation.inputs, operation.params
    dimensions, sizes = params["dimension_numbers"], params["slice_sizes"]
    if not isinstance(view, View) or depends(numbers) or len(dimensions.start_index_map) != 1:
        return None
    (taken,) = dimensions.start_index_map
    whole = [length for place, length in enumerate(view.shape) if place != taken]
    others = [size for place, size in enumerate(sizes) if place != taken]
    if dimensions.collapsed_slice_dims != (taken,) or others != whole or view.loops:
        return None
    output_axes: list[tuple[int, ...]] = [()] * len(operation.shape)
    kept = [group for place, group in enumerate(view.axes) if place != taken]
    repeated = any(not group and n > 1 for group, n in zip(kept, whole, strict=True))
    if len(view.axes[taken]) != 1 or repeated:
        return None
    for place, group in zip(dimensions.offset_dims, kept, strict=True):
        output_axes[place] = group
    site = Site(
        kind="embedding",
        leaf=view.leaf,
        inputs=_places(numbers[..., 0], view.shape[taken], params["mode"]),
        input_axes=((),) * (numbers.ndim - 1),
        output=operation.output,
        output_axes=tuple(output_axes),
        taken=view.taken,
        factor=view.factor,
    )
    return notes.add_site(operation.path, site)


def _places(numbers: jax.Array, length: int, mode: jax.lax.GatherScatterMode) -> jax.Array:
    """The rows that are looked up, one far outside for a number that has none."""
    if mode == jax.lax.GatherScatterMode.CLIP:
        return jnp.clip(numbers, 0, length - 1)
    outside = jnp.iinfo(numbers.dtype).max
    return jnp.where((numbers < 0) | (numbers >= length), outside, numbers)
