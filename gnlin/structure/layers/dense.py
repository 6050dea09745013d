"""Recogniser of a dense layer: the product of a known array with the tangent of a weight."""

import jax.numpy as jnp

from gnlin.jaxprs import Operation
from gnlin.structure.layers.matrices import is_transposed
from gnlin.structure.layers.notes import Notes, Site, Tangent, View, depends


def dot_general(operation: Operation, notes: Notes) -> Tangent | None:
    """Σ over the fan-in of known inputs times a weight, from either side.

    Axes that both sides share (a batch of products) would apply another weight to each.
    """
    left, right = operation.inputs
    weight_first = isinstance(left, View)
    view, known = (left, right) if weight_first else (right, left)
    contracting, batch = operation.params["dimension_numbers"]
    if not isinstance(view, View) or depends(known) or batch[0]:
        return None
    of_weight, of_known = contracting if weight_first else contracting[::-1]

    # The fan-in is ordered as in the leaf, and the axes of the inputs go along.
    pairs = sorted((view.axes[w], x) for w, x in zip(of_weight, of_known, strict=True))
    fan_in = [axis for group, _ in pairs for axis in group]
    kept = [group for place, group in enumerate(view.axes) if place not in of_weight]
    fan_out = [axis for group in kept for axis in group]
    transposed = is_transposed(view.leaf_shape, fan_in, fan_out)
    if transposed is None:
        return None
    free = [axis for axis in range(jnp.ndim(known)) if axis not in of_known]
    inputs = jnp.transpose(known, [*free, *(x for _, x in pairs)])
    inputs = inputs.reshape(-1, view.length(fan_in))

    # The axes that the left factor keeps come first in the product.
    places = tuple(range(len(operation.shape)))
    if weight_first:
        split = len(kept)
        applications, features = places[split:], places[:split]
    else:
        split = len(free)
        applications, features = places[:split], places[split:]
    site = Site(view.leaf, inputs, transposed, operation.output, applications, features)
    return notes.add_site(operation.path, site)
