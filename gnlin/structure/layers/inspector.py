"""Dense layers, read from a model's linearisation.

In the push-forward dθ ↦ J dθ a dense layer y = x W + b appears as ``dot_general`` of a known array,
x, with the tangent of a parameter. So the inputs of every such layer can be had without
registration and whatever library the network was written in, and so can the cotangents of its
outputs: y is cut out, and made an argument of the linear function.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlin.jaxprs import run_jaxpr
from gnlin.tree import Outputs, Params


class Layer(NamedTuple):
    """One dense layer that is applied once, to R rows: R = N for a perceptron, N·T for a sequence."""

    weight: int  # which leaf of the parameters is W
    bias: int | None  # which leaf is b
    inputs: jax.Array  # x, (R, fan-in)
    transposed: bool  # whether W's trailing axes are the inputs, y = x Wᵀ


class Reading(NamedTuple):
    """What a linearisation says of its layers.

    ``pull_back(u)`` takes a cotangent of the model's outputs to ``(cotangents, others)``: of the
    layers' outputs y, each (R, fan-out), and Jᵀu at the leaves that are in no layer, as a
    dictionary from their positions.
    """

    layers: tuple[Layer, ...]
    pull_back: Callable[[Outputs], tuple[list[jax.Array], dict[int, jax.Array]]]


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a leaf seen as a matrix: its axes split where the sides are most alike,
    the later of two ties.

    Attention's (features, heads, width) becomes (features, heads·width). From four axes on, as in
    the kernels of convolutions, (H, W, in, out) or (out, in, H, W), all but the first or all but
    the last stay together. Vectors and scalars are columns.
    """
    if len(shape) < 2:
        return math.prod(shape), 1
    splits = range(1, len(shape)) if len(shape) < 4 else (1, len(shape) - 1)
    sides = [(math.prod(shape[:split]), math.prod(shape[split:])) for split in splits]
    return min(reversed(sides), key=lambda side: abs(math.log(max(side[0], 1) / max(side[1], 1))))


def read_layers(jvp: Callable[[Params], Outputs], params: Params) -> Reading:
    """Find the dense layers in ``jvp``, the push-forward of a linearisation at `params`.

    A leaf that is used more than once (shared weights), inside a loop, or in any other way than a
    product with all its inputs and a sum, is in no layer.
    """
    leaves, structure = jax.tree.flatten(params)
    shapes = [jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    closed = jax.make_jaxpr(jvp)(jax.tree.unflatten(structure, shapes))
    outputs = jax.tree.structure(jax.eval_shape(jvp, jax.tree.unflatten(structure, shapes)))

    inspector = _Inspector([leaf.shape for leaf in shapes])
    tangents = [
        _View(index, tuple((axis,) for axis in range(leaf.ndim)))
        for index, leaf in enumerate(shapes)
    ]
    sites = inspector.sites_that_hold(run_jaxpr(closed.jaxpr, closed.consts, tangents, inspector))
    read = {index for site in sites.values() for index in (site.weight, site.bias)}
    others = [index for index in range(len(leaves)) if index not in read]

    def cut(tangents: dict[int, jax.Array], layer_outputs: dict[Any, jax.Array]) -> Outputs:
        def replace(path, equation, values):
            if path in layer_outputs:
                return [layer_outputs[path]]
            if path in biases:  # b moves y as x W does: the cotangent of x W serves both
                return [next(value for value in values if value is not _ABSENT)]
            return (
                [_ABSENT] * len(equation.outvars)
                if any(value is _ABSENT for value in values)
                else None
            )

        given = [tangents.get(index, _ABSENT) for index in range(len(leaves))]
        return jax.tree.unflatten(outputs, run_jaxpr(closed.jaxpr, closed.consts, given, replace))

    biases = {site.bias_path for site in sites.values() if site.bias is not None}

    def pull_back(cotangent: Outputs) -> tuple[list[jax.Array], dict[int, jax.Array]]:
        transpose = jax.linear_transpose(
            cut,
            {index: shapes[index] for index in others},
            {path: site.output for path, site in sites.items()},
        )
        of_others, of_layers = transpose(cotangent)
        return [site.rows_of(of_layers[path]) for path, site in sites.items()], of_others

    layers = tuple(
        Layer(site.weight, site.bias, site.inputs, site.transposed) for site in sites.values()
    )
    return Reading(layers, pull_back)


_ABSENT = object()  # the tangent of a parameter that only enters through layers that were cut out

# What an input of an equation can be, beside a known array.


class _View(NamedTuple):
    """The tangent of one leaf with its axes in another order, with some merged, or with new ones of length 1."""

    leaf: int
    axes: tuple[tuple[int, ...], ...]  # the leaf's axes at each place; none at a new one


class _Addend(NamedTuple):
    """The product of a layer, inside a plain sum."""

    product: tuple[int, ...]  # its path
    order: tuple[int, ...]  # its axes, where they are now
    trail: tuple[int, ...]  # the tangents from the product to this sum


class _Tangent(NamedTuple):
    """Anything else that depends on tangents, and what it is known to be a sum of."""

    number: int
    addends: tuple[_Addend, ...] = ()


class _Site(NamedTuple):
    """A product of a known array with the tangent of a weight."""

    weight: int
    inputs: jax.Array
    transposed: bool
    output: jax.ShapeDtypeStruct
    rows: tuple[int, ...]  # axes of the product that number the rows
    fan_out: tuple[int, ...]  # and its other axes
    bias: int | None = None
    bias_path: tuple[int, ...] = ()
    trail: tuple[int, ...] = ()  # the tangents between the product and the sum with the bias

    def rows_of(self, cotangent: jax.Array) -> jax.Array:
        """(R, fan-out) of a cotangent shaped like the product."""
        return cotangent.transpose(*self.rows, *self.fan_out).reshape(self.inputs.shape[0], -1)


class _Inspector:
    """Follows the tangents of parameters through a jaxpr and notes the products in which they meet known arrays."""

    def __init__(self, shapes: list[tuple[int, ...]]):
        self.shapes = shapes
        self.uses = [0] * len(shapes)  # of each leaf
        self.readers: list[int] = []  # of each tangent, how many equations read it
        self.sites: dict[tuple[int, ...], _Site] = {}

    def __call__(self, path: tuple[int, ...], equation: Any, values: list[Any]) -> list[Any] | None:
        if not any(isinstance(value, (_View, _Tangent)) for value in values):
            return None
        self._read(values)
        name, first = equation.primitive.name, values[0]
        if name in ("dot_general", "conv_general_dilated"):
            find = self._product if name == "dot_general" else self._convolution
            if (site := find(equation, *values)) is not None:
                self.uses[site.weight] += 1
                self.sites[path] = site
                return [self._sum_of([_Addend(path, tuple(range(site.output.ndim)), ())])]
        elif name in ("add", "add_any"):
            return [self._sum(path, values)]
        elif (
            isinstance(first, _View)
            and (view := self._rearranged(name, equation, first)) is not None
        ):
            return [view]
        elif isinstance(first, _Tangent) and name == "transpose":
            order = equation.params["permutation"]
            moved = [
                each._replace(order=tuple(each.order[axis] for axis in order))
                for each in first.addends
            ]
            return [self._sum_of(moved)]
        self.spoil(values)
        return [self._sum_of([]) for _ in equation.outvars]

    def spoil(self, values: Sequence[Any]) -> None:
        """These views are used in a way that is not understood."""
        for value in values:
            if isinstance(value, _View):
                self.uses[value.leaf] += 2

    def sites_that_hold(self, outputs: Sequence[Any]) -> dict[tuple[int, ...], _Site]:
        """Those whose leaves are used nowhere else; a bias only where nothing sees its layer's product without it."""
        self.spoil(outputs)
        self._read(outputs)
        return {
            path: site if self._has_bias(site) else site._replace(bias=None)
            for path, site in self.sites.items()
            if self.uses[site.weight] == 1
        }

    def _has_bias(self, site: _Site) -> bool:
        return (
            site.bias is not None
            and self.uses[site.bias] == 1
            and all(self.readers[n] == 1 for n in site.trail)
        )

    def _read(self, values: Sequence[Any]) -> None:
        for value in values:
            if isinstance(value, _Tangent):
                self.readers[value.number] += 1

    def _sum_of(self, addends: Sequence[_Addend]) -> _Tangent:
        self.readers.append(0)
        number = len(self.readers) - 1
        return _Tangent(
            number, tuple(each._replace(trail=(*each.trail, number)) for each in addends)
        )

    # Views of a leaf.

    def _rearranged(self, name: str, equation: Any, view: _View) -> _View | None:
        if name == "convert_element_type":
            return view
        if name == "transpose":
            return view._replace(
                axes=tuple(view.axes[axis] for axis in equation.params["permutation"])
            )
        shape = equation.outvars[0].aval.shape
        if name == "broadcast_in_dim":
            axes: list[tuple[int, ...]] = [()] * len(shape)
            for place, group in zip(
                equation.params["broadcast_dimensions"], view.axes, strict=True
            ):
                axes[place] = group
            return (
                _View(view.leaf, tuple(axes)) if self._lengths(view.leaf, axes) == shape else None
            )
        if name in ("reshape", "squeeze", "expand_dims"):
            return self._regrouped(view, shape)
        return None

    def _regrouped(self, view: _View, shape: tuple[int, ...]) -> _View | None:
        """The view with neighbouring axes merged to lengths `shape`; `None` where one would have to be split."""
        remaining = [axis for group in view.axes for axis in group]
        axes: list[tuple[int, ...]] = []
        for length in shape:
            group: tuple[int, ...] = ()
            while remaining and self._length(view.leaf, group) < length:
                group += (remaining.pop(0),)
            axes.append(group)
        axes[-1:] = [(*group, *remaining) for group in axes[-1:]]  # axes of length 1
        return (
            _View(view.leaf, tuple(axes))
            if axes and self._lengths(view.leaf, axes) == shape
            else None
        )

    def _length(self, leaf: int, axes: Sequence[int]) -> int:
        return math.prod(self.shapes[leaf][axis] for axis in axes)

    def _lengths(self, leaf: int, groups: Sequence[Sequence[int]]) -> tuple[int, ...]:
        return tuple(self._length(leaf, group) for group in groups)

    # Layers.

    def _product(self, equation: Any, left: Any, right: Any) -> _Site | None:
        weight_first = isinstance(left, _View)
        view, known = (left, right) if weight_first else (right, left)
        contracting, batch = equation.params["dimension_numbers"]
        if not isinstance(view, _View) or isinstance(known, (_View, _Tangent)) or batch[0]:
            return None
        of_weight, of_known = contracting if weight_first else contracting[::-1]
        pairs = sorted((view.axes[w], x) for w, x in zip(of_weight, of_known, strict=True))
        fan_in = [axis for group, _ in pairs for axis in group]
        fan_out = [
            axis
            for place, group in enumerate(view.axes)
            if place not in of_weight
            for axis in group
        ]
        transposed = self._orientation(view.leaf, fan_in, fan_out)
        if transposed is None:
            return None
        free = [axis for axis in range(jnp.ndim(known)) if axis not in of_known]
        inputs = jnp.transpose(known, [*free, *(x for _, x in pairs)]).reshape(
            -1, self._length(view.leaf, fan_in)
        )
        places = tuple(range(equation.outvars[0].aval.ndim))
        split = len(places) - len(free) if weight_first else len(free)
        ends = (
            (places[split:], places[:split]) if weight_first else (places[:split], places[split:])
        )
        return _Site(view.leaf, inputs, transposed, _shape_of(equation), *ends)

    def _convolution(self, equation: Any, known: Any, view: Any) -> _Site | None:
        params = equation.params
        ordinary = params["feature_group_count"] == params["batch_group_count"] == 1
        if not isinstance(view, _View) or isinstance(known, (_View, _Tangent)) or not ordinary:
            return None
        numbers = params["dimension_numbers"]
        out, *fan_in = (axis for place in numbers.rhs_spec for axis in view.axes[place])
        transposed = self._orientation(view.leaf, sorted(fan_in), [out])
        if len(view.axes) != len(fan_in) + 1 or transposed is None:
            return None
        patches = jax.lax.conv_general_dilated_patches(
            jnp.transpose(known, numbers.lhs_spec),
            [self._length(view.leaf, view.axes[place]) for place in numbers.rhs_spec[2:]],
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
        )
        # (N, in · window, positions), and of W the same axes in the order in which the leaf has
        # them.
        patches = jnp.moveaxis(patches, 1, -1).reshape(
            -1, *self._lengths(view.leaf, [[axis] for axis in fan_in])
        )
        order = [1 + fan_in.index(axis) for axis in sorted(fan_in)]
        inputs = patches.transpose(0, *order).reshape(len(patches), -1)
        images, channels, *positions = numbers.out_spec
        return _Site(
            view.leaf, inputs, transposed, _shape_of(equation), (images, *positions), (channels,)
        )

    def _orientation(self, leaf: int, fan_in: list[int], fan_out: list[int]) -> bool | None:
        """Whether W is (fan-out, fan-in) where it is seen as a matrix; `None` where it is that in neither order."""
        sides = self._length(leaf, fan_in), self._length(leaf, fan_out)
        axes = list(range(len(self.shapes[leaf])))
        if not fan_in or not fan_out:
            return None
        if fan_in + fan_out == axes and sides == matrix_shape(self.shapes[leaf]):
            return False
        return (
            True
            if fan_out + fan_in == axes and sides[::-1] == matrix_shape(self.shapes[leaf])
            else None
        )

    def _sum(self, path: tuple[int, ...], values: list[Any]) -> _Tangent:
        addends = [
            addend for value in values if isinstance(value, _Tangent) for addend in value.addends
        ]
        views = [value for value in values if isinstance(value, _View)]
        found = self._addend_with(views[0], addends) if len(views) == 1 else None
        if found is None:
            self.spoil(views)
        else:
            self.uses[views[0].leaf] += 1
            site = self.sites[found.product]
            self.sites[found.product] = site._replace(
                bias=views[0].leaf, bias_path=path, trail=found.trail
            )
        return self._sum_of(addends)

    def _addend_with(self, bias: _View, addends: Sequence[_Addend]) -> _Addend | None:
        """The product that `bias` is added to in every row."""
        own = [place for place, group in enumerate(bias.axes) if group]
        in_order = [axis for group in bias.axes for axis in group] == list(
            range(len(self.shapes[bias.leaf]))
        )
        for addend in addends:
            site = self.sites[addend.product]
            lengths = [site.output.shape[axis] for axis in site.fan_out]
            fits = [addend.order.index(axis) for axis in site.fan_out] == own
            fits &= [self._length(bias.leaf, bias.axes[place]) for place in own] == lengths
            if own and in_order and fits and site.bias is None:
                return addend
        return None


def _shape_of(equation: Any) -> jax.ShapeDtypeStruct:
    aval = equation.outvars[0].aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
