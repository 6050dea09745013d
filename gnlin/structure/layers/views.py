"""Recognisers of a leaf that is rearranged or taken from, and of a sum that is transposed."""

from gnlin.jaxprs import Operation
from gnlin.structure.layers.dense import scaled
from gnlin.structure.layers.notes import Notes, Tangent, View


def same(operation: Operation, notes: Notes) -> View | Tangent:
    """A leaf or a sum, maybe in another dtype: inputs and cotangents are cast where needed."""
    (value,) = operation.inputs
    return value if isinstance(value, View) else notes.new_tangent(value.addends)


def transpose(operation: Operation, notes: Notes) -> View | Tangent:
    """A leaf or a sum with its axes in another order."""
    (value,), order = operation.inputs, operation.params["permutation"]
    if isinstance(value, View):
        axes = tuple(value.axes[axis] for axis in order)
        return value._replace(axes=axes, shape=operation.shape)
    moved = [
        addend._replace(order=tuple(addend.order[axis] for axis in order))
        for addend in value.addends
    ]
    return notes.new_tangent(moved)


def broadcast_in_dim(operation: Operation, notes: Notes) -> View | None:
    """A leaf with new axes. Along a longer one it is repeated."""
    del notes
    value = operation.inputs[0]
    if not isinstance(value, View):
        return None
    axes: list[tuple[int, ...]] = [()] * len(operation.shape)
    places = operation.params["broadcast_dimensions"]
    for place, group, length in zip(places, value.axes, value.shape, strict=True):
        if length == operation.shape[place]:
            axes[place] = group
        elif group:
            return None  # an axis of the leaf, of length 1, that is repeated
    return value._replace(axes=tuple(axes), shape=operation.shape)


def reshape(operation: Operation, notes: Notes) -> View | None:
    """A leaf with neighbouring axes merged, or with axes of length 1 that come and go.

    `None` where an axis of the leaf would have to be split. Also for squeeze and expand_dims.
    """
    del notes
    value = operation.inputs[0]
    if not isinstance(value, View):
        return None
    repeated = zip(value.axes, value.shape, strict=True)
    if any(not group and length > 1 for group, length in repeated):
        return None
    remaining = [axis for group in value.axes for axis in group]
    axes: list[tuple[int, ...]] = []
    for length in operation.shape:
        group: tuple[int, ...] = ()
        while remaining and value.length(group) < length:
            group += (remaining.pop(0),)
        axes.append(group)
    if not axes:
        return None
    axes[-1] += tuple(remaining)  # only axes of length 1, or the shape below is another
    view = value._replace(axes=tuple(axes), shape=operation.shape)
    return view if tuple(map(view.length, axes)) == operation.shape else None


def negate(operation: Operation, notes: Notes) -> View | Tangent:
    """The negative of a leaf."""
    (value,) = operation.inputs
    if isinstance(value, View):
        return value._replace(factor=scaled(-1.0, value.factor))
    return notes.new_tangent()


def unstack(operation: Operation, notes: Notes) -> list[View] | None:
    """Each entry along an axis of a leaf, as in ``for w in stack``."""
    (value,), axis = operation.inputs, operation.params["axis"]
    if not isinstance(value, View) or len(value.axes[axis]) > 1:
        return None
    group, length = value.axes[axis], value.shape[axis]
    if length == 1:
        one = reshape(operation, notes)
        return None if one is None else [one]
    axes = value.axes[:axis] + value.axes[axis + 1 :]
    shape = value.shape[:axis] + value.shape[axis + 1 :]
    if not group:
        return [value._replace(axes=axes, shape=shape)] * length
    return [
        value._replace(axes=axes, shape=shape, taken=(*value.taken, (group[0], entry)))
        for entry in range(length)
    ]


def split(operation: Operation, notes: Notes) -> list[View] | None:
    """The same with the axis kept, of length 1. `None` where a part has several entries."""
    axis, sizes = operation.params["axis"], list(map(int, operation.params["sizes"]))
    if len(sizes) == 1:
        return list(operation.inputs)
    found = unstack(operation, notes) if set(sizes) == {1} else None
    if found is None:
        return None
    return [
        view._replace(
            axes=(*view.axes[:axis], (), *view.axes[axis:]),
            shape=(*view.shape[:axis], 1, *view.shape[axis:]),
        )
        for view in found
    ]


def take(operation: Operation, notes: Notes) -> View | None:
    """One entry along axes of a leaf, as of a stack of layers that is written out in Python.

    `None` where more are left out.
    """
    del notes
    (value,), params = operation.inputs, operation.params
    if not isinstance(value, View):
        return None
    axes, taken = [], list(value.taken)
    for group, length, start, kept in zip(
        value.axes, value.shape, params["start_indices"], operation.shape, strict=True
    ):
        if kept < length and (kept > 1 or len(group) > 1):
            return None
        if kept < length and group:
            taken.append((group[0], int(start)))
            group = ()
        axes.append(group)
    return value._replace(axes=tuple(axes), shape=operation.shape, taken=tuple(taken))
