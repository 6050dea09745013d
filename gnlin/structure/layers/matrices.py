"""Leaves as matrices: which axes are rows, and which are columns."""

import math
from collections.abc import Sequence


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


def is_transposed(
    shape: Sequence[int], fan_in: Sequence[int], fan_out: Sequence[int]
) -> bool | None:
    """Whether the matrix of a leaf is (fan-out, fan-in), from the axes of the leaf on either side.

    `None` where it is neither that nor (fan-in, fan-out).
    """
    if not fan_in or not fan_out:
        return None
    axes = list(range(len(shape)))
    matrix = matrix_shape(shape)
    inputs = math.prod(shape[axis] for axis in fan_in)
    outputs = math.prod(shape[axis] for axis in fan_out)
    if [*fan_in, *fan_out] == axes and (inputs, outputs) == matrix:
        return False
    if [*fan_out, *fan_in] == axes and (outputs, inputs) == matrix:
        return True
    return None
