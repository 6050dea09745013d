"""Recogniser of a bias: a sum of a layer's product and a leaf."""

from collections.abc import Sequence

from gnlin.jaxprs import Operation
from gnlin.structure.layers.notes import Addend, Notes, Tangent, View


def add(operation: Operation, notes: Notes) -> Tangent:
    """A sum: of tangents with any number of products in them, and maybe of a leaf."""
    tangents = [value for value in operation.inputs if isinstance(value, Tangent)]
    views = [value for value in operation.inputs if isinstance(value, View)]
    addends = [addend for tangent in tangents for addend in tangent.addends]
    found = _product_that_takes(views[0], addends, notes) if len(views) == 1 else None
    if found is None:
        notes.spoil(views)
    else:
        notes.add_bias(found, views[0].leaf, operation.path)
    return notes.new_tangent(addends)


def _product_that_takes(bias: View, addends: Sequence[Addend], notes: Notes) -> Addend | None:
    """The first product that `bias` is added to at every application, if there is one.

    The bias has to run along the features of the outputs, in their order. Along the other axes it
    has length 1.
    """
    places = [place for place, group in enumerate(bias.axes) if group]
    axes = [axis for group in bias.axes for axis in group]
    if not places or axes != list(range(len(bias.leaf_shape))):
        return None
    lengths = [bias.shape[place] for place in places]
    for addend in addends:
        site = notes.sites[addend.product]
        features = [addend.order.index(axis) for axis in site.fan_out]
        feature_lengths = [site.output.shape[axis] for axis in site.fan_out]
        if features == places and feature_lengths == lengths and site.bias is None:
            return addend
    return None
