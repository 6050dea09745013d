"""The records of the inspector: the values that it follows, and its notes on layers."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from gnlin.jaxprs import Path

# An input of an operation is a known array, or one of the next two.


class View(NamedTuple):
    """The tangent of one leaf, rearranged.

    Its axes may be in another order, neighbours among them may be merged, and there may be new ones
    of length 1.
    """

    leaf: int
    leaf_shape: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]  # axes of the leaf that each axis holds; none in a new one

    @classmethod
    def of_leaf(cls, leaf: int, shape: tuple[int, ...]) -> "View":
        """The tangent itself."""
        return cls(leaf, shape, tuple((axis,) for axis in range(len(shape))))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.length(group) for group in self.axes)

    def length(self, axes: Sequence[int]) -> int:
        """The length of these axes of the leaf, merged."""
        return math.prod(self.leaf_shape[axis] for axis in axes)


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
    """A product of a known array with the tangent of a weight: a layer without its bias.

    The axes of the product are of two kinds. Some number the R applications of the layer (examples,
    positions), the others the features of its outputs.
    """

    weight: int
    inputs: jax.Array  # (R, fan-in)
    transposed: bool
    output: jax.ShapeDtypeStruct
    applications: tuple[int, ...]
    fan_out: tuple[int, ...]
    bias: Bias | None = None

    def by_application(self, cotangent: jax.Array) -> jax.Array:
        """(R, fan-out) of a cotangent shaped like the product."""
        ordered = cotangent.transpose(*self.applications, *self.fan_out)
        return ordered.reshape(self.inputs.shape[0], -1)


class Notes:
    """Sites, and how often each leaf and each tangent is used.

    A leaf is in a layer only if that is its one use.
    """

    def __init__(self, leaves: int):
        self.sites: dict[Path, Site] = {}
        self._uses = [0] * leaves  # of each leaf
        self._readers: list[int] = []  # of each tangent: how many operations read it

    def add_site(self, path: Path, site: Site) -> Tangent:
        """Note a layer, which is one use of its weight. Returns its product."""
        self._uses[site.weight] += 1
        self.sites[path] = site
        return self.new_tangent([Addend(path, tuple(range(len(site.output.shape))), ())])

    def add_bias(self, addend: Addend, leaf: int, path: Path) -> None:
        """Note that the operation at `path` adds a leaf to a product: one use of that leaf."""
        self._uses[leaf] += 1
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

    def spoil(self, values: Sequence[Any]) -> None:
        """Note that leaves are used in a way that no recogniser knows."""
        for value in values:
            if isinstance(value, View):
                self._uses[value.leaf] += 2  # never 1 again: the leaf is in no layer

    def sites_that_hold(self) -> dict[Path, Site]:
        """The sites whose weight has no other use, each with its bias if that holds."""
        held = {}
        for path, site in self.sites.items():
            if self._uses[site.weight] == 1:
                held[path] = site if self._bias_holds(site) else site._replace(bias=None)
        return held

    def _bias_holds(self, site: Site) -> bool:
        """Whether the bias has no other use, and nothing sees the product without it.

        The two then have the same cotangent.
        """
        if site.bias is None or self._uses[site.bias.leaf] != 1:
            return False
        return all(self._readers[number] == 1 for number in site.bias.trail)
