"""The sides of the leaves, as their Kronecker factors have them.

`factorisation` inverts the factors side by side, and `direction` takes the products with them. The
state is shaped before the first batch is seen. So a moment has a spare row and column for a bias,
and a matrix even for rows that are looked up.
"""

import math
from collections.abc import Sequence

from gnlin.solve.factors import Factors, is_full
from gnlin.structure.layers import Layout, Use

# A side of a leaf: 0 for rows, 1 for columns.
Place = tuple[int, int]


def places_of_matrices(
    factors: Sequence[Factors], layouts: Sequence[Layout]
) -> dict[int, list[Place]]:
    """The places of the matrices of each size, those of equal leaves side by side."""
    found: dict[int, list[Place]] = {}
    for place in sorted(_places(layouts), key=lambda place: (layouts[place[0]].sides, place[1])):
        moment = factors[place[0]][place[1]]
        if is_full(moment, layouts[place[0]]):
            found.setdefault(moment.shape[-1], []).append(place)
    return found


def places_of_diagonals(factors: Sequence[Factors], layouts: Sequence[Layout]) -> list[Place]:
    """The places of the diagonals, those of vectors among them."""
    return [
        (leaf, side)
        for leaf, side in _places(layouts)
        if not is_full(factors[leaf][side], layouts[leaf])
    ]


def _places(layouts: Sequence[Layout]) -> list[Place]:
    """A vector has one side."""
    return [
        (leaf, side)
        for leaf, layout in enumerate(layouts)
        for side in range(1 if layout.is_vector else 2)
    ]


def member_count(layout: Layout) -> int:
    """Matrices in a stack, 1 without."""
    return math.prod(layout.stacked)


def used_lengths(use: Use) -> list[int]:
    """Lengths of both sides, with the row or the column of a bias."""
    lengths = list(use.layout.sides)
    if use.bias is not None:
        lengths[side_of_inputs(use)] += 1
    return lengths


def side_of_inputs(use: Use) -> int:
    """The side of a leaf that the fan-in of its site is on: 0 for rows, 1 for columns."""
    (site,) = use.sites
    return 1 if use.layout.is_transposed(site.fan_in, site.fan_out) else 0


def have_diagonals(use: Use) -> tuple[bool, bool]:
    """Which sides of a leaf have a diagonal moment, whatever its shape: rows that are looked up."""
    if len(use.sites) != 1 or use.sites[0].kind not in ("gain", "bias", "embedding"):
        return False, False
    (site,) = use.sites
    transposed = site.kind == "embedding" and site.fills(0)
    return not transposed, transposed
