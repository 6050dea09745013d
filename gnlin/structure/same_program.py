"""Sameness of programs: whether two traces of a function differ in the number of examples alone.

Two closed jaxprs are alike if three things hold.

* They have the same numbers in them: literals, and constants.
* Their outputs are the same expressions: the same operations on the same operands.
* Their equations pair up: the same primitives in the same order, with the same parameters, on
  arrays of the same dtypes. An axis is as long in both, or longer by the ratio of the examples.

Two liberties are taken where examples are few. `jnp.einsum` may contract in another order: sizes
decide on that, and results do not depend on it. And the axis of a single example may come and go.
"""

import enum
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from gnlin.jaxprs import (
    ArrayType,
    all_equations,
    constants_and_literals,
    inner_jaxprs,
    input_arrays,
    interpret,
    output_arrays,
    parameters,
    primitive_name,
)

MANY = 8191  # a prime: an axis of this length, or a multiple of it, holds examples and nothing else

# Arrays of few examples may be rearranged by other operations than those of many.
_REARRANGING = {
    "broadcast_in_dim",
    "reshape",
    "squeeze",
    "expand_dims",
    "transpose",
    "concatenate",
    "copy",
}
# Parameters of equations that are lengths of axes.
_LENGTHS = {"shape", "new_sizes", "limit_indices", "slice_sizes", "sizes"}


class _Examples(NamedTuple):
    """The numbers of examples of two traces."""

    one: int
    other: int

    @property
    def are_few(self) -> bool:
        """Whether one of the traces is on few examples, so that the liberties are taken."""
        return min(self) < MANY

    @property
    def single(self) -> bool:
        """Whether one of the traces is on a single example."""
        return min(self) == 1


def alike(one: Any, other: Any, examples: tuple[int, int]) -> bool:
    """Whether a function does the same with two numbers of examples, from a closed jaxpr of each.

    Args:
        one: the trace on ``examples[0]`` examples.
        other: the trace on ``examples[1]`` examples.
        examples: both numbers.
    """
    of_both = _Examples(*examples)
    numbers = constants_and_literals(one), constants_and_literals(other)
    if len(numbers[0]) != len(numbers[1]) or not all(map(_same_number, *numbers)):
        return False
    table: dict[Any, int] = {}
    expressions = [_Numbering(table, of_both).outputs(each.jaxpr) for each in (one, other)]
    return expressions[0] == expressions[1] and _pair_up(one.jaxpr, other.jaxpr, of_both)


def _same_number(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tracer) or isinstance(b, Tracer) or np.shape(a) != np.shape(b):
        return False
    a, b = np.asarray(a), np.asarray(b)
    both_nan = (a != a) & (b != b)
    return a.dtype == b.dtype and bool(np.all((a == b) | both_nan))


# Expressions.


class _Numbering:
    """Gives a number to each expression, the same to the same operation on the same operands.

    Args:
        table: the numbers given so far. It is shared by the traces that are compared.
        examples: of both traces.
    """

    def __init__(self, table: dict[Any, int], examples: _Examples):
        self._table = table
        self._examples = examples
        self._factors: dict[int, list[int]] = {}  # of those expressions that are products

    def outputs(self, jaxpr: Any) -> list[int]:
        """The numbers of the outputs of a jaxpr."""
        return interpret(
            jaxpr,
            given=lambda place: self._number(("given", place)),
            literal=lambda _: self._number("literal"),
            compute=self._of_equation,
        )

    def _number(self, expression: Any) -> int:
        return self._table.setdefault(expression, len(self._table))

    def _of_equation(self, equation: Any, operands: list[int]) -> list[int]:
        """The numbers of the outputs of one equation."""
        name, few = primitive_name(equation), self._examples.are_few
        rearranged = name in _REARRANGING and len(operands) == 1
        # The axis of a single example comes and goes, and products in another order have their
        # axes moved. The expression is still its operand.
        if rearranged and (self._examples.single or (few and operands[0] in self._factors)):
            return operands
        is_product = few and name == "dot_general"
        if is_product:
            # All factors in one order, whatever the order of the contractions.
            factors = [self._factors.get(operand, [operand]) for operand in operands]
            operands = sorted(factor for each in factors for factor in each)
        inner = tuple(tuple(self.outputs(each)) for each in inner_jaxprs(equation))
        numbers = [
            self._number((name, place, tuple(operands), inner))
            for place in range(len(output_arrays(equation)))
        ]
        if is_product:
            self._factors.update(dict.fromkeys(numbers, operands))
        return numbers


# Pairs of equations.


def _pair_up(one: Any, other: Any, examples: _Examples) -> bool:
    """Whether the equations of two jaxprs are the same, one by one."""

    def compared(jaxpr: Any) -> list[Any]:
        skipped = _REARRANGING if examples.are_few else set()
        return [each for each in all_equations(jaxpr) if primitive_name(each) not in skipped]

    equations = compared(one), compared(other)
    if not _arrays_alike(output_arrays(one), output_arrays(other), examples):
        return False
    if len(equations[0]) != len(equations[1]):
        return False
    return all(_equations_alike(a, b, examples) for a, b in zip(*equations, strict=True))


def _equations_alike(a: Any, b: Any, examples: _Examples) -> bool:
    """Whether two equations have the same primitive, parameters, arrays and inner jaxprs."""
    of_a, of_b = parameters(a), parameters(b)
    if primitive_name(a) != primitive_name(b) or of_a.keys() != of_b.keys():
        return False
    # Of products in another order, the arrays and the axes that are contracted are others.
    is_free = examples.are_few and primitive_name(a) == "dot_general"
    arrays = [[*input_arrays(each), *output_arrays(each)] for each in (a, b)]
    if not is_free and not _arrays_alike(arrays[0], arrays[1], examples):
        return False
    for name in of_a:
        values = _plain(of_a[name]), _plain(of_b[name])
        is_length = name in _LENGTHS
        same = _lengths_alike(*values, examples) if is_length else values[0] == values[1]
        if not same and not (is_free and name == "dimension_numbers"):
            return False
    inner = list(inner_jaxprs(a)), list(inner_jaxprs(b))
    if len(inner[0]) != len(inner[1]):
        return False
    return all(_pair_up(*pair, examples) for pair in zip(*inner, strict=True))


def _arrays_alike(
    some: Sequence[ArrayType], others: Sequence[ArrayType], examples: _Examples
) -> bool:
    """Whether inputs or outputs have the same dtypes, and shapes that are alike."""

    def shape(array: ArrayType) -> Sequence[int]:
        return (math.prod(array.shape),) if examples.single else array.shape

    if [array.dtype for array in some] != [array.dtype for array in others]:
        return False
    pairs = zip(some, others, strict=True)
    return all(_lengths_alike(shape(a), shape(b), examples) for a, b in pairs)


def _lengths_alike(some: Sequence[int], others: Sequence[int], examples: _Examples) -> bool:
    """Whether axes are as long, or longer by the ratio of the examples."""
    if len(some) != len(others):
        return False
    for a, b in zip(some, others, strict=True):
        if a != b and a * examples.other != b * examples.one:
            return False
    return True


def _plain(parameter: Any) -> list[Any]:
    """The numbers and names in a parameter of an equation. Functions and jaxprs are left out."""
    leaves = jax.tree.leaves(parameter)
    return [leaf for leaf in leaves if isinstance(leaf, (int, float, str, enum.Enum))]
