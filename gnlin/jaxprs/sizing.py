"""Sizing a jaxpr: a bound on the numbers that it holds at once."""

import math
from collections.abc import Callable
from typing import Any

import jax

from gnlin.jaxprs.walking import inner_jaxprs, variables

# XLA copies what it transposes, and runs a program in an order of its own: of the networks that
# were compiled (those of examples/kernels.py and tests/test_kernel.py) it took up to 3.4 times what
# the equations hold at once, on JAX 0.6 4.4.
_COPIES = 5
_VIEWS = {"reshape", "squeeze", "expand_dims"}


def numbers_held(function: Callable[..., Any], *arguments: Any) -> int:
    """Bound on the numbers that a compiled function holds at once beside its arguments."""
    return numbers_held_by(jax.make_jaxpr(function)(*arguments).jaxpr)


def numbers_held_by(jaxpr: Any) -> int:
    """Bound on the numbers that a compiled jaxpr holds at once beside its arguments."""
    return _COPIES * max(_held(jaxpr), 1)


def _held(jaxpr: Any) -> int:
    """Most numbers held at once where equations are run in order and free what is used up."""
    last = _last_uses(jaxpr)
    size: dict[Any, int] = {}
    held, most = 0, 0
    for place, equation in enumerate(jaxpr.eqns):
        is_view = equation.primitive.name in _VIEWS
        for variable in equation.outvars:
            size[variable] = 0 if is_view else math.prod(variable.aval.shape)
            held += size[variable]
        inside = max((_held(inner) for inner in inner_jaxprs(equation)), default=0)
        most = max(most, held + inside)
        for variable in {*equation.outvars, *variables(equation.invars)}:
            # An output that nothing reads is in no entry of `last`: it goes at once.
            if last.get(variable, place) == place:
                held -= size.pop(variable, 0)
    return most


def _last_uses(jaxpr: Any) -> dict[Any, int]:
    """The last equation that reads each variable; the end, for the outputs."""
    end = len(jaxpr.eqns)
    last = dict.fromkeys(variables(jaxpr.outvars), end)
    for place in reversed(range(end)):
        for variable in variables(jaxpr.eqns[place].invars):
            last.setdefault(variable, place)
    return last
