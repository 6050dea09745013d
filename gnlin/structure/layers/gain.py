"""Recogniser of a gain: the product, entry by entry, of a known array and a leaf."""

import jax.numpy as jnp

from gnlin.jaxprs import Operation
from gnlin.structure.layers.notes import Notes, Site, Tangent, View, depends


def mul(operation: Operation, notes: Notes) -> Tangent | None:
    """x ⊙ g, where g is repeated over the applications of a normalisation."""
    views = [value for value in operation.inputs if isinstance(value, View)]
    known = [value for value in operation.inputs if not depends(value)]
    if len(views) != 1 or len(known) != 1:
        return None
    (view,), (factor,) = views, known
    if len(view.axes) != len(operation.shape):
        return None
    axes = view.axes_in(operation.shape)
    # Some versions of JAX repeat axes of length 1 in the product itself, so the rank will do.
    rank = len(operation.shape) - jnp.ndim(factor)
    site = Site(
        kind="gain",
        leaf=view.leaf,
        inputs=jnp.expand_dims(factor, range(rank)),
        input_axes=axes,
        output=operation.output,
        output_axes=axes,
        loops=view.loops,
    )
    return notes.add_site(operation.path, site)
