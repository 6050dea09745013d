"""Recogniser of a gain: the product, entry by entry, of a known array and a leaf."""

import jax.numpy as jnp

from gnlin.jaxprs import Operation
from gnlin.structure.layers.dense import scaled
from gnlin.structure.layers.notes import Notes, Site, Tangent, View, depends


def mul(operation: Operation, notes: Notes) -> View | Tangent | None:
    """X ⊙ g, where g is repeated over the applications of a normalisation.

    A leaf times one known number is a view of the leaf.
    """
    views = [value for value in operation.inputs if isinstance(value, View)]
    known = [value for value in operation.inputs if not depends(value)]
    if len(views) != 1 or len(known) != 1:
        return None
    (view,), (factor,) = views, known
    if jnp.ndim(factor) == 0:
        return view._replace(factor=scaled(factor, view.factor))
    if view.axes and len(view.axes) != len(operation.shape):
        return None
    axes = view.axes_in(operation.shape)
    # Some versions of JAX repeat axes of length 1 in the product itself, so the rank will do.
    rank = len(operation.shape) - jnp.ndim(factor)
    site = Site(
        kind="gain",
        leaf=view.leaf,
        inputs=scaled(jnp.expand_dims(factor, range(rank)), view.factor),
        input_axes=axes,
        output=operation.output,
        output_axes=axes,
        loops=view.loops,
        taken=view.taken,
    )
    return notes.add_site(operation.path, site)


def div(operation: Operation, notes: Notes) -> View | Tangent | None:
    """G / x, the product with 1 / x."""
    leaf, known = operation.inputs
    if not isinstance(leaf, View) or depends(known):
        return None
    return mul(operation._replace(inputs=[leaf, 1 / known]), notes)
