"""Dense layers, read from a model's linearisation.

In the push-forward dθ ↦ J dθ a dense layer y = x W + b appears as ``dot_general`` of a known array, x, with the tangent
of a parameter. So the inputs of every such layer can be had without registration and whatever library the network was
written in, and so can the cotangents of its outputs: y is cut out, and made an argument of the linear function.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from gnlin.tree import Outputs, Params


class Layer(NamedTuple):
    """One dense layer that is applied once, to R rows: R = N for a perceptron, N·T for a sequence."""

    weight: int  # which leaf of the parameters is W
    bias: int | None  # which leaf is b
    inputs: jax.Array  # x, (R, fan-in)
    transposed: bool  # whether W's trailing axes are the inputs, y = x Wᵀ


class Reading(NamedTuple):
    """What a linearisation says of its layers.

    ``pull_back(u)`` takes a cotangent of the model's outputs to ``(cotangents, others)``: of the layers' outputs y,
    each (R, fan-out), and Jᵀu at the leaves that are in no layer, as a dictionary from their positions.
    """

    layers: tuple[Layer, ...]
    pull_back: Callable[[Outputs], tuple[list[jax.Array], dict[int, jax.Array]]]


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a leaf seen as a matrix: its axes split where the sides are most alike, the later of two ties.

    For convolution kernels (H, W, in, out) that is (H·W·in, out), for attention (features, heads, width) it is
    (features, heads·width). Vectors and scalars are columns.
    """
    if len(shape) < 2:
        return int(np.prod(shape)), 1
    sides = [(int(np.prod(shape[:split])), int(np.prod(shape[split:]))) for split in range(1, len(shape))]
    return min(reversed(sides), key=lambda side: abs(np.log(max(side[0], 1) / max(side[1], 1))))


def read_layers(jvp: Callable[[Params], Outputs], params: Params) -> Reading:
    """Find the dense layers in ``jvp``, the push-forward of a linearisation at `params`.

    A leaf that is used more than once (shared weights), inside a loop, or in any other way than a product with all its
    inputs and a sum, is in no layer.
    """
    leaves, structure = jax.tree.flatten(params)
    shapes = [jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    closed = jax.make_jaxpr(jvp)(jax.tree.unflatten(structure, shapes))
    outputs = jax.tree.structure(jax.eval_shape(jvp, jax.tree.unflatten(structure, shapes)))

    inspector = _Inspector([leaf.shape for leaf in shapes])
    tangents = [_View(index, tuple(range(len(leaf.shape)))) for index, leaf in enumerate(shapes)]
    inspector.spoil(_run(closed.jaxpr, closed.consts, tangents, inspector))
    sites = inspector.sites_that_hold()
    read = {index for site in sites.values() for index in (site.weight, site.bias)}
    others = [index for index in range(len(leaves)) if index not in read]

    def cut(tangents: dict[int, jax.Array], layer_outputs: dict[Any, jax.Array]) -> Outputs:
        def replace(path, equation, values):
            if path in layer_outputs:
                return [layer_outputs[path]]
            if path in biases:  # b moves y as x W does: the cotangent of x W serves both
                return [next(value for value in values if value is not _ABSENT)]
            return [_ABSENT] * len(equation.outvars) if any(value is _ABSENT for value in values) else None

        given = [tangents.get(index, _ABSENT) for index in range(len(leaves))]
        return jax.tree.unflatten(outputs, _run(closed.jaxpr, closed.consts, given, replace))

    biases = {site.bias_path for site in sites.values() if site.bias is not None}

    def pull_back(cotangent: Outputs) -> tuple[list[jax.Array], dict[int, jax.Array]]:
        transpose = jax.linear_transpose(
            cut, {index: shapes[index] for index in others}, {path: site.output for path, site in sites.items()}
        )
        of_others, of_layers = transpose(cotangent)
        return [site.rows_of(of_layers[path]) for path, site in sites.items()], of_others

    layers = tuple(Layer(site.weight, site.bias, site.inputs, site.transposed) for site in sites.values())
    return Reading(layers, pull_back)


# Walking through a jaxpr. Primitives that do nothing but call another ↦ the parameter that holds it.
_CALLS = {
    **dict.fromkeys(("jit", "pjit", "checkpoint", "remat2"), "jaxpr"),
    **dict.fromkeys(("closed_call", "core_call", "custom_jvp_call"), "call_jaxpr"),
}

_ABSENT = object()  # the tangent of a parameter that only enters through layers that were cut out

# (path of an equation, the equation, its inputs) ↦ its outputs, or `None` to compute them.
_Replace = Callable[[tuple[int, ...], Any, list[Any]], list[Any] | None]


def _run(jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any], replace: _Replace, path=()) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for place, equation in enumerate(jaxpr.eqns):
        here, inputs = (*path, place), [read(variable) for variable in equation.invars]
        name = equation.primitive.name
        if name in _CALLS:
            called = equation.params[_CALLS[name]]
            outputs = _run(getattr(called, "jaxpr", called), getattr(called, "consts", ()), inputs, replace, here)
        else:
            outputs = replace(here, equation, inputs)
        if outputs is None:
            outputs = apply_equation(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def apply_equation(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """Outputs of one equation of a jaxpr."""
    bound = equation.primitive.get_bind_params(equation.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # from JAX 0.9 the parameters alone
    outputs = equation.primitive.bind(*functions, *inputs, **params)
    return outputs if equation.primitive.multiple_results else [outputs]


# What an input of an equation can be, beside a known array.


class _View(NamedTuple):
    """The tangent of one leaf with its axes in another order, and with new ones of length 1."""

    leaf: int
    axes: tuple[int | None, ...]  # the leaf's axis at each place; `None` for a new one


class _Tangent(NamedTuple):
    """Anything else that depends on tangents; `addends` are the products of layers that it is a plain sum with."""

    addends: tuple[tuple[int, ...], ...] = ()


class _Site(NamedTuple):
    weight: int
    inputs: jax.Array
    transposed: bool
    output: jax.ShapeDtypeStruct
    weight_first: bool  # the product has W's free axes before those of x
    bias: int | None = None
    bias_path: tuple[int, ...] = ()

    def rows_of(self, cotangent: jax.Array) -> jax.Array:
        """(R, fan-out) of a cotangent shaped like the product."""
        rows = self.inputs.shape[0]
        return cotangent.reshape(-1, rows).T if self.weight_first else cotangent.reshape(rows, -1)


class _Inspector:
    """Follows the tangents of parameters through a jaxpr and notes the products in which they meet known arrays."""

    def __init__(self, shapes: list[tuple[int, ...]]):
        self.shapes = shapes
        self.uses = [0] * len(shapes)
        self.sites: dict[tuple[int, ...], _Site] = {}

    def __call__(self, path: tuple[int, ...], equation: Any, values: list[Any]) -> list[Any] | None:
        if not any(isinstance(value, (_View, _Tangent)) for value in values):
            return None
        name = equation.primitive.name
        if len(values) == 1 and isinstance(values[0], _View):
            if (view := self._rearranged(name, equation, values[0])) is not None:
                return [view]
        elif name == "dot_general" and (site := self._product(equation, *values)) is not None:
            self.uses[site.weight] += 1
            self.sites[path] = site
            return [_Tangent((path,))]
        elif name in ("add", "add_any"):
            return [self._sum(path, equation, values)]
        self.spoil(values)
        return [_Tangent() for _ in equation.outvars]

    def spoil(self, values: Sequence[Any]) -> None:
        """These views are used in a way that is not understood."""
        for value in values:
            if isinstance(value, _View):
                self.uses[value.leaf] += 2

    def sites_that_hold(self) -> dict[tuple[int, ...], _Site]:
        """Those whose leaves are used nowhere else."""
        held = {path: site for path, site in self.sites.items() if self.uses[site.weight] == 1}
        return {
            path: site if site.bias is None or self.uses[site.bias] == 1 else site._replace(bias=None)
            for path, site in held.items()
        }

    def _rearranged(self, name: str, equation: Any, view: _View) -> _View | None:
        shape = equation.outvars[0].aval.shape
        if name == "convert_element_type":
            return view
        if name == "transpose":
            return view._replace(axes=tuple(view.axes[axis] for axis in equation.params["permutation"]))
        if name == "broadcast_in_dim":
            axes: list[int | None] = [None] * len(shape)
            for place, axis in zip(equation.params["broadcast_dimensions"], view.axes, strict=True):
                axes[place] = axis
            grown = any(axis is None and length > 1 for axis, length in zip(axes, shape, strict=True))
            stretched = any(
                axis is not None and self.shapes[view.leaf][axis] != length
                for axis, length in zip(axes, shape, strict=True)
            )
            return None if grown or stretched else _View(view.leaf, tuple(axes))
        if name in ("reshape", "squeeze", "expand_dims"):
            old = [axis for axis in view.axes if axis is not None and self.shapes[view.leaf][axis] != 1]
            lengths = [self.shapes[view.leaf][axis] for axis in old]
            if 1 in self.shapes[view.leaf] or [length for length in shape if length != 1] != lengths:
                return None  # axes are merged or split, or cannot be told apart
            remaining = iter(old)
            return _View(view.leaf, tuple(None if length == 1 else next(remaining) for length in shape))
        return None

    def _product(self, equation: Any, left: Any, right: Any) -> _Site | None:
        weight_first = isinstance(left, _View)
        view, known = (left, right) if weight_first else (right, left)
        if not isinstance(view, _View) or isinstance(known, (_View, _Tangent)) or None in view.axes:
            return None
        contracting, batch = equation.params["dimension_numbers"]
        if batch[0]:
            return None
        of_weight, of_known = contracting if weight_first else contracting[::-1]
        pairs = sorted((view.axes[w], x) for w, x in zip(of_weight, of_known, strict=True))
        fan_in = [axis for axis, _ in pairs]
        fan_out = [axis for place, axis in enumerate(view.axes) if place not in of_weight]
        shape = self.shapes[view.leaf]
        transposed = fan_out + fan_in == list(range(len(shape)))
        if not transposed and fan_in + fan_out != list(range(len(shape))):
            return None
        sides = [int(np.prod([shape[axis] for axis in axes])) for axes in (fan_in, fan_out)]
        if not fan_in or not fan_out or tuple(sides[::-1] if transposed else sides) != matrix_shape(shape):
            return None
        free = [axis for axis in range(jnp.ndim(known)) if axis not in of_known]
        inputs = jnp.transpose(known, [*free, *(x for _, x in pairs)]).reshape(-1, sides[0])
        aval = equation.outvars[0].aval
        return _Site(view.leaf, inputs, transposed, jax.ShapeDtypeStruct(aval.shape, aval.dtype), weight_first)

    def _sum(self, path: tuple[int, ...], equation: Any, values: list[Any]) -> _Tangent:
        bias = next((value for value in values if isinstance(value, _View)), None)
        addends = tuple(path for value in values if isinstance(value, _Tangent) for path in value.addends)
        if bias is None or all(isinstance(value, _View) for value in values):
            self.spoil(values)
            return _Tangent(addends)
        shape = equation.outvars[0].aval.shape
        for product in addends:
            site = self.sites[product]
            # b has the axes of y's fan-out, which come last, and is the same in every row.
            own = [axis for axis in bias.axes if axis is not None]
            width = int(np.prod(self.shapes[bias.leaf]))
            last = bias.axes[len(bias.axes) - len(own) :] == tuple(range(len(self.shapes[bias.leaf])))
            if site.bias is None and not site.weight_first and last and site.output.shape == shape:
                if site.inputs.shape[0] * width == int(np.prod(shape)):
                    self.uses[bias.leaf] += 1
                    self.sites[product] = site._replace(bias=bias.leaf, bias_path=path)
                    return _Tangent(addends)
        self.spoil([bias])
        return _Tangent(addends)
