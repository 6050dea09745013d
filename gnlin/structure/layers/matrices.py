"""Leaves as matrices: which axes are rows, which are columns, and which number equal layers."""

import math
from collections.abc import Collection, Hashable, Sequence
from typing import NamedTuple

import jax

from gnlin.tree import Params


class Layout(NamedTuple):
    """A leaf as a stack of matrices, or of vectors.

    The first `stack` axes number the members of the stack. Each member is a matrix (rows, columns),
    or a vector, which has one column.
    """

    shape: tuple[int, ...]  # of the leaf
    stack: int = 0

    @property
    def stacked(self) -> tuple[int, ...]:
        """Lengths of the axes that number the members."""
        return self.shape[: self.stack]

    @property
    def member(self) -> tuple[int, ...]:
        """Shape of a member."""
        return self.shape[self.stack :]

    @property
    def is_vector(self) -> bool:
        return len(self.member) < 2

    @property
    def sides(self) -> tuple[int, int]:
        """(rows, columns) of a member."""
        return matrix_shape(self.member)

    @property
    def matrices(self) -> tuple[int, ...]:
        """(stack..., rows, columns)."""
        return (*self.stacked, *self.sides)

    def is_transposed(self, fan_in: Collection[int], fan_out: Collection[int]) -> bool | None:
        """Whether a member is (fan-out, fan-in), from the axes of the leaf on either side.

        `None` where it is neither that nor (fan-in, fan-out). Axes of the stack may be on any side.
        """
        first, last = (
            sorted(axis for axis in side if axis >= self.stack) for side in (fan_in, fan_out)
        )
        axes = list(range(self.stack, len(self.shape)))
        lengths = [math.prod(self.shape[axis] for axis in side) for side in (first, last)]
        if not first or not last:
            return None
        if [*first, *last] == axes and tuple(lengths) == self.sides:
            return False
        if [*last, *first] == axes and tuple(lengths[::-1]) == self.sides:
            return True
        return None


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a leaf seen as a matrix.

    The axes are split where the two sides are most alike, at the later of two ties. Attention's
    (features, heads, width) becomes (features, heads·width). From four axes on, all but the first
    or all but the last stay together. So it is right for the kernels of convolutions, (H, W, in,
    out) or (out, in, H, W). Vectors and scalars are columns.
    """
    if len(shape) < 2:
        return math.prod(shape), 1
    splits = range(1, len(shape)) if len(shape) < 4 else (1, len(shape) - 1)
    sides = [(math.prod(shape[:split]), math.prod(shape[split:])) for split in splits]
    return min(reversed(sides), key=lambda side: abs(math.log(max(side[0], 1) / max(side[1], 1))))


def layouts(params: Params) -> list[Layout]:
    """The layout of each leaf, from the shapes in the tree alone.

    The layers under `jax.lax.scan` or `jax.vmap` lie in leaves with one axis more in front. Such a
    stack is a subtree whose leaves all begin with the same length L, in which members have
    matrices: (L, in, out) beside gains or biases (L, features), or beside another (L, ., .). A
    subtree of a stack may be one again. Where this takes heads of attention for a stack, its
    factors are those of each head.
    """
    found = jax.tree_util.tree_leaves_with_path(params)
    paths = [path for path, _ in found]
    shapes = [tuple(map(int, leaf.shape)) for _, leaf in found]
    stacks = [0] * len(shapes)

    def visit(members: list[int], level: int, stack: int) -> None:
        while _is_stack([shapes[leaf][stack:] for leaf in members]):
            stack += 1
        parts: dict[Hashable, list[int]] = {}
        for leaf in members:
            stacks[leaf] = stack
            if len(paths[leaf]) > level:
                parts.setdefault(paths[leaf][level], []).append(leaf)
        for part in parts.values():
            visit(part, level + 1, stack)

    visit(list(range(len(shapes))), 0, 0)
    return [Layout(shape, stack) for shape, stack in zip(shapes, stacks, strict=True)]


def _is_stack(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether the first axis of these leaves numbers equal layers."""
    matrices = [shape for shape in shapes if len(shape) >= 3]
    if not matrices or not all(shapes) or len({shape[0] for shape in shapes}) > 1:
        return False
    # (features, heads, width) of an attention without biases begins with its longest axis.
    if any(shape[0] >= max(shape[1:]) for shape in matrices):
        return False
    # A window of convolutions is no stack, and neither is one leaf alone.
    return len(shapes) > 1 and any(len(shape) <= 3 for shape in shapes)
