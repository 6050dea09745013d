"""The records of the inspector: the values that it follows, and its notes on layers."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlin.jaxprs import Path

# An input of an operation is a known array, or one of the next two.


class View(NamedTuple):
    """The tangent of one leaf, rearranged.

    Its axes may be in another order, and neighbours among them may be merged. There may be new ones,
    of length 1 or along which the leaf is repeated.
    """

    leaf: int
    leaf_shape: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]  # axes of the leaf that each axis holds; none in a new one
    shape: tuple[int, ...]
    # The loops around it, the outermost first: the axis of the leaf that a loop goes over, or
    # `None` where each turn has the same view.
    loops: tuple[int | None, ...] = ()
    taken: tuple[tuple[int, int], ...] = ()  # axes of which one entry is taken, and which one
    factor: Any = None  # a known number that it is multiplied by

    @classmethod
    def of_leaf(cls, leaf: int, shape: tuple[int, ...]) -> "View":
        """The tangent itself."""
        return cls(leaf, shape, tuple((axis,) for axis in range(len(shape))), shape)

    def length(self, axes: Sequence[int]) -> int:
        """The length of these axes of the leaf, merged."""
        return math.prod(self.leaf_shape[axis] for axis in axes)

    def axes_in(self, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The axes of the leaf that each axis holds where the view is repeated to this shape."""
        if not self.axes:
            return ((),) * len(shape)  # a scalar
        lengths = zip(self.axes, self.shape, shape, strict=True)
        return tuple(group if own == length else () for group, own, length in lengths)


class Tangent(NamedTuple):
    """Any other array that depends on tangents. It may be a sum that has products of layers in it.

    Addends that are no product of a layer are not listed.
    """

    number: int
    addends: "tuple[Addend, ...]" = ()


class Addend(NamedTuple):
    """The product of a layer, inside a plain sum."""

    product: Path
    order: tuple[int, ...]  # the axes of the product, in the order that they have in the sum
    trail: tuple[int, ...]  # numbers of the tangents from the product to this sum


def depends(value: Any) -> bool:
    """Whether a value depends on the tangents of parameters."""
    return isinstance(value, (View, Tangent))


class Bias(NamedTuple):
    """A leaf that is added to the product of a layer."""

    leaf: int
    sum: Path  # the operation that adds it
    trail: tuple[int, ...]  # numbers of the tangents between the product and the sum


class Site(NamedTuple):
    """An operation that is linear in one leaf, with known arrays: a layer without its bias.

    The axes of inputs and product are of two kinds. Some hold axes of the leaf. The others number
    the R applications of the layer (examples, positions), in the same order in both. Behind a loop
    both have one more axis in front.

    | kind | product | inputs |
    |---|---|---|
    | dense, convolution | x W | x |
    | embedding | rows of W | their numbers |
    | gain | x ⊙ g | x, or what is repeated to it |
    | bias | b, repeated | 1, or the factor of b |
    """

    kind: str
    leaf: int
    inputs: jax.Array
    input_axes: tuple[tuple[int, ...], ...]  # axes of the leaf that each axis of the inputs holds
    output: jax.ShapeDtypeStruct  # in one turn of the loops
    output_axes: tuple[tuple[int, ...], ...]  # the same of the product
    loops: tuple[int | None, ...] = ()  # as in the `View`
    lengths: tuple[int, ...] = ()  # turns of these loops
    taken: tuple[tuple[int, int], ...] = ()  # as in the `View`
    factor: Any = None  # of an embedding, as in the `View`; the inputs of others have it
    groups: int = 1  # of a convolution
    ran: Any = None  # 1 or 0 for each turn of the loops, where the site is in a branch
    bias: Bias | None = None

    @property
    def fan_in(self) -> set[int]:
        """Axes of the leaf that the inputs alone have."""
        return _members(self.input_axes) - _members(self.output_axes)

    @property
    def fan_out(self) -> set[int]:
        """Axes of the leaf that the product alone has."""
        return _members(self.output_axes) - _members(self.input_axes)

    def fills(self, axis: int) -> bool:
        """Whether the product has this axis of the leaf."""
        return axis in _members(self.output_axes)

    @property
    def products(self) -> jax.ShapeDtypeStruct:
        """The products of all turns."""
        return jax.ShapeDtypeStruct((*self.lengths, *self.output.shape), self.output.dtype)

    def arranged_inputs(self, leaf_shape: Sequence[int], stack: int) -> jax.Array:
        """(stack..., R, fan-in) of the inputs, where the first `stack` axes of the leaf are apart.

        The length of such an axis is 1 where the inputs do not have it.
        """
        return self._arrange(self.inputs, self.input_axes, leaf_shape, stack)

    def arranged(self, cotangents: jax.Array, leaf_shape: Sequence[int], stack: int) -> jax.Array:
        """(stack..., R, fan-out) of cotangents that are shaped like the products."""
        return self._arrange(cotangents, self.output_axes, leaf_shape, stack)

    def _arrange(self, array, axes, leaf_shape, stack) -> jax.Array:
        groups = [*(() if axis is None else (axis,) for axis in self.loops), *axes]
        # One axis for each axis of the leaf, and those of applications as they are.
        labels: list[int | None] = []
        shape: list[int] = []
        for length, group in zip(array.shape, groups, strict=True):
            labels.extend(group or (None,))
            shape.extend([leaf_shape[axis] for axis in group] or [length])
        applications = [place for place, label in enumerate(labels) if label is None]
        found = {label: place for place, label in enumerate(labels) if label is not None}
        apart = [axis for axis in range(stack) if axis in found]
        features = sorted(axis for axis in found if axis >= stack)
        order = [*(found[a] for a in apart), *applications, *(found[a] for a in features)]
        lengths = [leaf_shape[axis] if axis in found else 1 for axis in range(stack)]
        last = math.prod(leaf_shape[axis] for axis in features)
        rows = math.prod(shape[place] for place in applications)
        return jnp.reshape(array, shape).transpose(order).reshape(*lengths, rows, last)


def _members(groups: Sequence[Sequence[int]]) -> set[int]:
    return {axis for group in groups for axis in group}


class Notes:
    """Sites, and how each leaf and each tangent is used."""

    def __init__(self, leaves: int):
        self.sites: dict[Path, Site] = {}
        self.strange: dict[int, str] = {}  # leaf ↦ the first use of it that is not recognised
        self.used: set[int] = set()
        self.lengths: list[int] = []  # turns of the loops around the present operation
        self.is_rebuilt = False  # whether a loop or a choice has layers inside
        self._bias_of: dict[int, list[Path]] = {leaf: [] for leaf in range(leaves)}
        self._readers: list[int] = []  # of each tangent: how many operations read it

    def add_site(self, path: Path, site: Site) -> Tangent:
        """Note a layer. Returns its product."""
        self.used.add(site.leaf)
        self.sites[path] = site._replace(lengths=tuple(self.lengths))
        return self.new_tangent([Addend(path, tuple(range(len(site.output.shape))), ())])

    def add_bias(self, addend: Addend, leaf: int, path: Path) -> None:
        """Note that the operation at `path` adds a leaf to a product."""
        self._bias_of[leaf].append(addend.product)
        site = self.sites[addend.product]
        self.sites[addend.product] = site._replace(bias=Bias(leaf, path, addend.trail))

    def new_tangent(self, addends: Sequence[Addend] = ()) -> Tangent:
        """A new tangent, the sum of these addends and maybe of others. It is on their trails."""
        number = len(self._readers)
        self._readers.append(0)
        longer = [each._replace(trail=(*each.trail, number)) for each in addends]
        return Tangent(number, tuple(longer))

    def read(self, values: Sequence[Any]) -> None:
        """Note that one operation reads these values."""
        for value in values:
            if isinstance(value, Tangent):
                self._readers[value.number] += 1

    def spoil(self, values: Sequence[Any], use: str) -> None:
        """Note that leaves are used in a way that no recogniser knows."""
        for value in values:
            if isinstance(value, View):
                self.used.add(value.leaf)
                self.strange.setdefault(value.leaf, use)

    def sites_of(self, leaf: int) -> list[Path]:
        """The places where a leaf is used, if all are recognised."""
        return [path for path, site in self.sites.items() if site.leaf == leaf]

    def bias_holds(self, path: Path) -> bool:
        """Whether the bias of a site is its own, and nothing sees the product without it.

        The two then have the same cotangent, and are the only uses of their leaves.
        """
        site = self.sites[path]
        if site.bias is None or self.sites_of(site.leaf) != [path]:
            return False
        if self.sites_of(site.bias.leaf) != [site.bias.sum] or site.bias.leaf in self.strange:
            return False
        return all(self._readers[number] == 1 for number in site.bias.trail)
