"""Recogniser of a bias: a sum with a leaf in it, behind the product of a layer or elsewhere."""

from collections.abc import Sequence

import jax.numpy as jnp

from gnlin.jaxprs import Operation
from gnlin.structure.layers.dense import scaled
from gnlin.structure.layers.notes import Addend, Notes, Site, Tangent, View, depends


def add(operation: Operation, notes: Notes) -> Tangent:
    """A sum: of tangents with any number of products in them, and maybe of a leaf."""
    tangents = [value for value in operation.inputs if isinstance(value, Tangent)]
    views = [value for value in operation.inputs if isinstance(value, View)]
    addends = [addend for tangent in tangents for addend in tangent.addends]
    fits = all(_is_repeated(view, operation.shape) for view in views)
    if len(views) != 1 or not fits or not all(map(depends, operation.inputs)):
        notes.spoil(views, operation.name)
        return notes.new_tangent(addends)
    (view,) = views
    product = _product_that_takes(view, addends, notes)
    notes.add_site(operation.path, _site(operation, view))
    if product is not None:
        notes.add_bias(product, view.leaf, operation.path)
    return notes.new_tangent(addends)


def subtract(operation: Operation, notes: Notes) -> Tangent:
    """A difference: the squares of a leaf that is subtracted are those of one that is added."""
    first, last = operation.inputs
    if isinstance(last, View):
        last = last._replace(factor=scaled(-1.0, last.factor))
    elif isinstance(last, Tangent):
        last = last._replace(addends=())  # with the other sign, they are no addends
    return add(operation._replace(inputs=[first, last]), notes)


def _is_repeated(view: View, shape: Sequence[int]) -> bool:
    """Whether the sum adds the leaf to every application of something.

    A matrix that is added to another one is no bias: the sum may be a weight.
    """
    if not view.axes:
        return True  # a scalar
    axes = sum(map(len, view.axes))
    return len(view.axes) == len(shape) and (axes < 2 or axes < len(shape))


def _site(operation: Operation, view: View) -> Site:
    """The leaf as the product of itself with ones."""
    return Site(
        kind="bias",
        leaf=view.leaf,
        inputs=scaled(jnp.ones([], operation.output.dtype), view.factor),
        input_axes=(),
        output=operation.output,
        output_axes=view.axes_in(operation.shape),
        loops=view.loops,
        taken=view.taken,
    )


def _product_that_takes(bias: View, addends: Sequence[Addend], notes: Notes) -> Addend | None:
    """The first product that `bias` is added to at every application, if there is one.

    The bias has to run along the features of the outputs, in their order, and along the axes that
    number equal layers.
    """
    axes = [axis for group in bias.axes for axis in group]
    places = [place for place, group in enumerate(bias.axes) if group]
    looped = [axis for axis in bias.loops if axis is not None]
    if (
        bias.factor is not None
        or not places
        or [*looped, *axes] != list(range(len(bias.leaf_shape)))
    ):
        return None
    lengths = [bias.shape[place] for place in places]
    for addend in addends:
        site = notes.sites[addend.product]
        if site.kind not in ("dense", "convolution") or site.bias is not None:
            continue
        features = [place for place, group in enumerate(site.output_axes) if group]
        features.sort(key=lambda place, axes=site.output_axes: axes[place])  # as in the leaf
        moved = [addend.order.index(place) for place in features]
        same_loops = [axis is None for axis in site.loops] == [axis is None for axis in bias.loops]
        same = moved == places and [site.output.shape[place] for place in features] == lengths
        if same and same_loops:
            return addend
    return None
