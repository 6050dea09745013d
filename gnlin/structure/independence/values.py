"""The values of the rules: three properties of an array that depends on the examples.

* `ByExample`: along one axis, slice n comes from example n alone.
* `Summed`: it is a sum over examples, held as its N addends.
* `MIXED`: neither. Examples were brought together other than in a final sum, or by an operation
  that has no rule. Whatever depends on it is mixed, too.

An array that does not depend on the examples stays an array.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlin.jaxprs import Operation

MIXED = object()


class ByExample(NamedTuple):
    """An array whose axis `axis` is N = `examples` blocks of equal length.

    Block n depends on example n alone.
    """

    array: jax.Array
    axis: int
    examples: int


class Summed(NamedTuple):
    """The addends (N, ...) of an array that is a sum over examples."""

    addends: jax.Array


# From an operation to the properties of its outputs. Its inputs are `ByExample` or known arrays, at
# least one of them `ByExample`. `None` says that examples would be mixed.
Rule = Callable[[Operation], Sequence[ByExample | Summed] | None]


def array_of(value: Any) -> Any:
    """The array itself, of a `ByExample` or of a known array."""
    return value.array if isinstance(value, ByExample) else value


def example_axes(operation: Operation) -> set[int]:
    """Axes along which the inputs have their examples."""
    return {value.axis for value in operation.inputs if isinstance(value, ByExample)}


def computed(operation: Operation, axis: int) -> list[ByExample]:
    """The outputs of an operation, which have their examples along `axis`."""
    examples = next(v.examples for v in operation.inputs if isinstance(v, ByExample))
    outputs = operation.apply([array_of(value) for value in operation.inputs])
    return [ByExample(output, axis, examples) for output in outputs]


def by_block(array: jax.Array, axis: int, examples: int) -> jax.Array:
    """(N, ...): the blocks of an axis of examples, each with its part of that axis in place."""
    shape = array.shape
    blocks = array.reshape(*shape[:axis], examples, shape[axis] // examples, *shape[axis + 1 :])
    return jnp.moveaxis(blocks, axis, 0)
