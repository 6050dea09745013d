"""Whether two traces of a function are one program, but for how many examples they are of."""

import enum
import math
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from gnlin.jaxprs import inner_jaxprs

MANY = 8191  # a prime: an axis of this length, or a multiple of it, holds examples and nothing else
# What arrays of few examples are rearranged by may differ from what many are.
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


def alike(one: Any, other: Any, examples: tuple[int, int]) -> bool:
    """Whether a function, traced on two numbers of examples, does the same with both.

    Closed jaxprs are alike that have the same operations in the same order, of the same operands
    and with the same numbers in them, on arrays of the same types, whose axes are as long or as
    many times longer as there are more examples. Two liberties are taken where examples are few:
    `jnp.einsum` may contract in another order, as sizes decide on that and results do not depend on
    it; and the axis of a single example may come and go.
    """
    numbers = _numbers_in(one), _numbers_in(other)
    if len(numbers[0]) != len(numbers[1]) or not all(map(_same_number, *numbers)):
        return False
    table: dict[Any, int] = {}
    expressions = [_expressions(each.jaxpr, min(examples), table, {}) for each in (one, other)]
    return expressions[0] == expressions[1] and _jaxprs_alike(one.jaxpr, other.jaxpr, examples)


def _jaxprs_alike(one: Any, other: Any, examples: tuple[int, int]) -> bool:
    """Whether the equations of two jaxprs pair up."""
    few, single = min(examples) < MANY, min(examples) == 1

    def kept(jaxpr):
        return [each for each in jaxpr.eqns if not (few and each.primitive.name in _REARRANGING)]

    def lengths_alike(a, b):
        return len(a) == len(b) and all(
            m == n or m * examples[1] == n * examples[0] for m, n in zip(a, b, strict=True)
        )

    def shape_of(variable):
        shape = getattr(variable.aval, "shape", ())
        return (math.prod(shape),) if single else shape

    def arrays_alike(some, others):
        if [getattr(a.aval, "dtype", None) for a in some] != [
            getattr(b.aval, "dtype", None) for b in others
        ]:
            return False
        return all(
            lengths_alike(shape_of(a), shape_of(b)) for a, b in zip(some, others, strict=True)
        )

    def equations_alike(a, b):
        if a.primitive.name != b.primitive.name or a.params.keys() != b.params.keys():
            return False
        contraction = few and a.primitive.name == "dot_general"
        for name in a.params.keys() - ({"dimension_numbers"} if contraction else set()):
            same = lengths_alike if name in _LENGTHS else list.__eq__
            if not same(_plain(a.params[name]), _plain(b.params[name])):
                return False
        if not contraction and not arrays_alike([*a.invars, *a.outvars], [*b.invars, *b.outvars]):
            return False
        inner = list(inner_jaxprs(a)), list(inner_jaxprs(b))
        return len(inner[0]) == len(inner[1]) and all(
            _jaxprs_alike(*pair, examples) for pair in zip(*inner, strict=True)
        )

    equations = kept(one), kept(other)
    return (
        arrays_alike(one.outvars, other.outvars)
        and len(equations[0]) == len(equations[1])
        and all(map(equations_alike, *equations))
    )


def _expressions(
    jaxpr: Any, examples: int, table: dict[Any, int], products: dict[int, list[int]]
) -> list[int]:
    """A number for each output, the same for the same operations on the same operands.

    Args:
        jaxpr: the function.
        examples: how many it is traced on.
        table: the numbers given so far, of all jaxprs that are compared.
        products: the factors of those that are products.
    """

    def numbered(expression):
        return table.setdefault(expression, len(table))

    given = [*jaxpr.constvars, *jaxpr.invars]
    numbers = {variable: numbered(("given", place)) for place, variable in enumerate(given)}

    def number_of(variable):
        return numbered("literal") if hasattr(variable, "val") else numbers[variable]

    for equation in jaxpr.eqns:
        name, operands = equation.primitive.name, list(map(number_of, equation.invars))
        comes_and_goes = examples == 1 or (
            examples < MANY and operands[:1] and operands[0] in products
        )
        if name in _REARRANGING and len(operands) == 1 and comes_and_goes:
            numbers[equation.outvars[0]] = operands[0]
            continue
        if contraction := name == "dot_general" and examples < MANY:
            operands = sorted(factor for each in operands for factor in products.get(each, [each]))
        inner = tuple(
            tuple(_expressions(each, examples, table, products)) for each in inner_jaxprs(equation)
        )
        for place, variable in enumerate(equation.outvars):
            numbers[variable] = numbered((name, place, tuple(operands), inner))
            if contraction:
                products[numbers[variable]] = operands
    return list(map(number_of, jaxpr.outvars))


def _plain(parameter: Any) -> list[Any]:
    """The numbers and names in a parameter of an equation; what is a function or a jaxpr is left out."""
    return [
        leaf
        for leaf in jax.tree.leaves(parameter)
        if isinstance(leaf, (int, float, str, enum.Enum))
    ]


def _numbers_in(closed: Any) -> list[Any]:
    """Literals and constants of a closed jaxpr, in their order."""
    found = list(closed.consts)

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            found.extend(variable.val for variable in equation.invars if hasattr(variable, "val"))
            for value in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda node: hasattr(node, "consts")
            ):
                found.extend(getattr(value, "consts", ()))
            for inner in inner_jaxprs(equation):
                visit(inner)

    visit(closed.jaxpr)
    return found


def _same_number(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tracer) or isinstance(b, Tracer) or np.shape(a) != np.shape(b):
        return False
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and bool(np.all((a == b) | ((a != a) & (b != b))))  # NaN is NaN
