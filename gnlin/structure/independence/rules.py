"""A linear function of a batch, followed example by example.

A pull-back u ↦ Jᵀu takes a cotangent (N, ...) of the outputs of N examples to cotangents inside the
network and to sums over examples, the gradients. Where slice n of an array depends on slice n of u
alone, one run with a cotangent for every example does the work of N runs. Shapes cannot tell (batch
normalisation and attention over the batch have the same), so the function's equations are followed,
and of each array that depends on u one of these is known:

* `ByExample`: along one axis, slice n comes from u_n alone;
* `Summed`: it is a sum over examples, held as its N addends;
* `MIXED`: neither, because examples were brought together other than in a final sum, or by an
  operation that is not understood. Whatever depends on it is mixed, too.

A sum over examples stays open to the end because all that follows is linear in it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlin.jaxprs import apply_equation, run_jaxpr

MIXED = object()


class ByExample(NamedTuple):
    """An array whose axis `axis` is N blocks of equal length; block n depends on example n alone."""

    array: jax.Array
    axis: int


class Summed(NamedTuple):
    """The addends (N, ...) of an array that is a sum over examples."""

    addends: jax.Array


def run_by_example(function: Any, arguments: Sequence[jax.Array], examples: int) -> list[Any]:
    """Outputs of a closed jaxpr that is linear in its arguments, each of these with N examples
    along its first axis.

    Each output is a `ByExample`, a `Summed`, `MIXED`, or an array, which does not depend on the
    arguments.
    """

    def follow(path, equation, values):
        del path
        known = [
            value is not MIXED and not isinstance(value, ByExample | Summed) for value in values
        ]
        if all(known):
            return None
        kinds = {type(value) for value, is_known in zip(values, known, strict=True) if not is_known}
        outputs = None
        if kinds == {Summed}:
            outputs = _linear_in_addends(equation, values)
        elif kinds == {ByExample} and (rule := RULES.get(equation.primitive.name)) is not None:
            outputs = rule(equation, values, examples)
        return [MIXED] * len(equation.outvars) if outputs is None else outputs

    return run_jaxpr(
        function.jaxpr, function.consts, [ByExample(leaf, 0) for leaf in arguments], follow
    )


def _linear_in_addends(equation: Any, values: list[Any]) -> list[Any]:
    places = [place for place, value in enumerate(values) if isinstance(value, Summed)]

    def apply(*addends):
        given = dict(zip(places, addends, strict=True))
        return list(
            apply_equation(
                equation, [given.get(place, value) for place, value in enumerate(values)]
            )
        )

    return [
        Summed(output) for output in jax.vmap(apply)(*(values[place].addends for place in places))
    ]


# Rules: (equation, inputs, N) ↦ outputs, or `None` where examples would be mixed. All inputs that
# depend on the arguments are `ByExample`; the others are arrays.

Rule = Callable[[Any, list[Any], int], list[Any] | None]


def computed(equation: Any, values: list[Any], axis: int) -> list[Any]:
    arrays = [value.array if isinstance(value, ByExample) else value for value in values]
    return [ByExample(output, axis) for output in apply_equation(equation, arrays)]


def _split(array: jax.Array, axis: int, examples: int) -> jax.Array:
    """(N, ...) with what each example has of the axis where it was."""
    shape = array.shape
    split = array.reshape(*shape[:axis], examples, shape[axis] // examples, *shape[axis + 1 :])
    return jnp.moveaxis(split, axis, 0)


def elementwise(equation, values, examples):
    del examples
    axes = {value.axis for value in values if isinstance(value, ByExample)}
    shape = equation.outvars[0].aval.shape
    if len(axes) > 1:
        return None
    axis = axes.pop()
    for value in values:
        own = jnp.shape(value.array if isinstance(value, ByExample) else value)
        # Newer versions of JAX stretch axes of length 1; one that holds examples must not be.
        stretches = len(own) == len(shape) and all(
            a in (b, 1) for a, b in zip(own, shape, strict=True)
        )
        if not (own == () or stretches) or (
            isinstance(value, ByExample) and own[axis] != shape[axis]
        ):
            return None
    return computed(equation, values, axis)


def apart_from_axes(name: str) -> Rule:
    """Operations along the axes that their parameter `name` says, which keep the others."""

    def rule(equation, values, examples):
        del examples
        axes = {value.axis for value in values if isinstance(value, ByExample)}
        touched = equation.params[name]
        touched = touched if isinstance(touched, tuple) else (touched,)
        all_depend = all(isinstance(value, ByExample) or jnp.ndim(value) > 0 for value in values)
        if len(axes) > 1 or not all_depend or not axes.isdisjoint(touched):
            return None
        return computed(equation, values, axes.pop())

    return rule


def reduce_sum(equation, values, examples):
    (value,), axes = values, equation.params["axes"]
    if value.axis not in axes:
        return computed(equation, values, value.axis - sum(axis < value.axis for axis in axes))
    return [
        Summed(
            jnp.sum(
                _split(value.array, value.axis, examples), axis=tuple(axis + 1 for axis in axes)
            )
        )
    ]


def _transpose(equation, values, examples):
    del examples
    return computed(equation, values, equation.params["permutation"].index(values[0].axis))


def _reshape(equation, values, examples):
    (value, *_), shape = values, equation.outvars[0].aval.shape
    if equation.primitive.name == "reshape" and equation.params["dimensions"] is not None:
        return None
    before = math.prod(value.array.shape[: value.axis])
    for axis, length in enumerate(shape):
        # Blocks of consecutive entries stay what they are where as many come before, and the axis
        # holds N of them.
        if math.prod(shape[:axis]) == before and length % examples == 0 and length:
            return computed(equation, values, axis)
    return None


def _broadcast(equation, values, examples):
    del examples
    axis = equation.params["broadcast_dimensions"][values[0].axis]
    kept = equation.params["shape"][axis] == values[0].array.shape[values[0].axis]
    return computed(equation, values, axis) if kept else None


def _slice(equation, values, examples):
    del examples
    (value,), params = values, equation.params
    strides = params["strides"] or (1,) * value.array.ndim
    length = value.array.shape[value.axis]
    whole = (
        params["start_indices"][value.axis],
        params["limit_indices"][value.axis],
        strides[value.axis],
    )
    return computed(equation, values, value.axis) if whole == (0, length, 1) else None


def _stack(equation, values, examples):
    del examples
    axes = {value.axis if isinstance(value, ByExample) else None for value in values}
    axis = axes.pop()
    if axes or axis is None:
        return None
    return computed(equation, values, axis + (equation.params["axis"] <= axis))


def _unstack(equation, values, examples):
    del examples
    axis, along = values[0].axis, equation.params["axis"]
    return None if axis == along else computed(equation, values, axis - (along < axis))


def _pad(equation, values, examples):
    del examples
    operand, padding = values
    if not isinstance(operand, ByExample) or isinstance(padding, ByExample):
        return None
    untouched = equation.params["padding_config"][operand.axis] == (0, 0, 0)
    return computed(equation, values, operand.axis) if untouched else None


def _dot_general(equation, values, examples):
    place = next(place for place, value in enumerate(values) if isinstance(value, ByExample))
    value, other = values[place], values[1 - place]
    contracting, batch = equation.params["dimension_numbers"]
    own_contracting, own_batch = contracting[place], batch[place]
    if isinstance(other, ByExample):  # of examples with examples, only those of each with itself
        paired = (value.axis, other.axis) in zip(own_batch, batch[1 - place], strict=True)
        return computed(equation, values, own_batch.index(value.axis)) if paired else None
    if value.axis in own_batch:
        return computed(equation, values, own_batch.index(value.axis))
    if value.axis not in own_contracting:
        free = [
            axis for axis in range(value.array.ndim) if axis not in (*own_contracting, *own_batch)
        ]
        position = len(own_batch) + free.index(value.axis)
        if place == 1:
            position += other.ndim - len(contracting[0]) - len(batch[0])
        return computed(equation, values, position)
    # The sum over examples, left open: each example's share is contracted by itself.
    other_axis = contracting[1 - place][own_contracting.index(value.axis)]
    shares = [_split(value.array, value.axis, examples), _split(other, other_axis, examples)]

    def contract(own, others):
        return apply_equation(equation, [own, others] if place == 0 else [others, own])[0]

    return [Summed(jax.vmap(contract)(*shares))]


def _convolution(equation, values, examples):
    params = equation.params
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    numbers = params["dimension_numbers"]
    left, right = (isinstance(value, ByExample) for value in values)
    if left and right:
        return None
    if left and values[0].axis == numbers.lhs_spec[0]:
        return computed(equation, values, numbers.out_spec[0])
    if right and values[1].axis == numbers.rhs_spec[0]:
        return computed(equation, values, numbers.out_spec[1])
    features = (numbers.lhs_spec[1], numbers.rhs_spec[1])
    if values[1 if right else 0].axis != features[1 if right else 0]:
        return None
    arrays = [value.array if isinstance(value, ByExample) else value for value in values]
    shares = [_split(array, axis, examples) for array, axis in zip(arrays, features, strict=True)]
    return [Summed(jax.vmap(lambda own, other: apply_equation(equation, [own, other])[0])(*shares))]


def pooling(equation, values, examples):
    del examples
    axes = {value.axis for value in values if isinstance(value, ByExample)}
    axis, params = axes.pop(), equation.params
    alone = params["window_dimensions"][axis] == 1 and params["window_strides"][axis] == 1
    dilated = any(
        params.get(name, (1,) * (axis + 1))[axis] != 1
        for name in ("base_dilation", "window_dilation")
    )
    if axes or not alone or dilated or params["padding"][axis] != (0, 0):
        return None
    return computed(equation, values, axis)


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "convert_element_type",
            "reduce_precision",
            "copy",
            "neg",
            "add",
            "add_any",
            "sub",
            "mul",
            "div",
            "select_n",
        ),
        elementwise,
    ),
    "rev": apart_from_axes("dimensions"),
    "concatenate": apart_from_axes("dimension"),
    **dict.fromkeys(("cumsum", "split"), apart_from_axes("axis")),
    "stack": _stack,
    "unstack": _unstack,
    "reduce_sum": reduce_sum,
    "transpose": _transpose,
    **dict.fromkeys(("reshape", "squeeze"), _reshape),
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "pad": _pad,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    **dict.fromkeys(("select_and_scatter_add", "reduce_window_sum"), pooling),
}
