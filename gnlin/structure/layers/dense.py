"""Recogniser of a dense layer: the product of a known array with the tangent of a weight."""

from typing import Any

from gnlin.jaxprs import Operation
from gnlin.structure.layers.notes import Notes, Site, Tangent, View, depends


def dot_general(operation: Operation, notes: Notes) -> Tangent | None:
    """Σ over the fan-in of known inputs times a weight, from either side.

    Axes that both sides share number layers that are equal, as experts or heads.
    """
    left, right = operation.inputs
    weight_first = isinstance(left, View)
    view, known = (left, right) if weight_first else (right, left)
    if not isinstance(view, View) or depends(known):
        return None
    contracting, batch = operation.params["dimension_numbers"]
    of_weight, of_known = contracting if weight_first else contracting[::-1]
    batch_of_weight, batch_of_known = batch if weight_first else batch[::-1]
    free = [p for p in range(len(view.axes)) if p not in (*of_weight, *batch_of_weight)]
    # A leaf that is repeated along these axes is used once for each repetition.
    if any(not view.axes[place] and view.shape[place] > 1 for place in (*of_weight, *free)):
        return None

    input_axes: list[tuple[int, ...]] = [()] * known.ndim
    for place, other in [
        *zip(of_weight, of_known, strict=True),
        *zip(batch_of_weight, batch_of_known, strict=True),
    ]:
        input_axes[other] = view.axes[place]
    # Shared axes come first in the product, then those that the left factor keeps.
    shared = [view.axes[place] for place in batch_of_weight]
    features = [view.axes[place] for place in free]
    applications = [()] * (known.ndim - len(of_known) - len(batch_of_known))
    kept = [*features, *applications] if weight_first else [*applications, *features]
    # The inputs in the order that the product has them: shared ones, others, then the fan-in.
    others = [p for p in range(known.ndim) if p not in (*of_known, *batch_of_known)]
    order = [*batch_of_known, *others, *of_known]
    site = Site(
        kind="dense",
        leaf=view.leaf,
        inputs=scaled(known.transpose(order), view.factor),
        input_axes=tuple(input_axes[place] for place in order),
        output=operation.output,
        output_axes=(*shared, *kept),
        loops=view.loops,
        taken=view.taken,
    )
    return notes.add_site(operation.path, site)


def scaled(known: Any, factor: Any) -> Any:
    """The inputs of a weight that is a multiple of its leaf."""
    return known if factor is None else known * factor
