"""Walking, running and sizing jaxprs: the one module that knows how JAX writes its programs down.

A jaxpr is a list of equations. Each equation binds a primitive to its inputs and names its outputs.
Some equations hold other jaxprs, which they call, choose among or repeat. JAX changes these names
and parameters between versions. A change in JAX is then a change in this file.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

# Walking.


def primitive_names(jaxpr: Any) -> Iterator[str]:
    """Names of the primitives in a jaxpr, those of its inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in inner_jaxprs(equation):
            yield from primitive_names(inner)


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """Jaxprs among the parameters of an equation: of what it calls, its branches, a loop's body and condition."""
    for value in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda value: _as_jaxpr(value) is not None
    ):
        if (found := _as_jaxpr(value)) is not None:
            yield found


def _as_jaxpr(value: Any) -> Any:
    value = getattr(value, "jaxpr", value)
    return value if hasattr(value, "eqns") else None


# Running.

# Primitives that do nothing but call a jaxpr ↦ the parameter that holds it. Versions of JAX differ.
CALLS = {
    **dict.fromkeys(("jit", "pjit", "checkpoint", "remat2"), "jaxpr"),
    **dict.fromkeys(
        ("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"
    ),
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}

# (path of an equation, the equation, its inputs) ↦ its outputs, or `None` to compute them.
Replace = Callable[[tuple[int, ...], Any, list[Any]], list[Any] | None]


def run_jaxpr(
    jaxpr: Any,
    constants: Sequence[Any],
    arguments: Sequence[Any],
    replace: Replace,
    path: tuple[int, ...] = (),
) -> list[Any]:
    """Outputs of a jaxpr, into whose calls of other jaxprs it goes; `replace` may give the outputs of an equation."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(variable):
        return (
            variable.val if hasattr(variable, "val") else values[variable]
        )  # a literal or a variable

    for place, equation in enumerate(jaxpr.eqns):
        here, inputs = (*path, place), [read(variable) for variable in equation.invars]
        name = equation.primitive.name
        if name in CALLS:
            called = equation.params[CALLS[name]]
            outputs = run_jaxpr(
                getattr(called, "jaxpr", called),
                getattr(called, "consts", ()),
                inputs,
                replace,
                here,
            )
        else:
            outputs = replace(here, equation, inputs)
        if outputs is None:
            outputs = apply_equation(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def apply_equation(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """Outputs of one equation of a jaxpr."""
    bound = equation.primitive.get_bind_params(equation.params)
    functions, params = (
        bound if isinstance(bound, tuple) else ((), bound)
    )  # from JAX 0.9 the parameters alone
    outputs = equation.primitive.bind(*functions, *inputs, **params)
    return outputs if equation.primitive.multiple_results else [outputs]


class ScanSplit(NamedTuple):
    """Which inputs of a scan are its constants, its carry, and what it goes over; the carry is first of its outputs."""

    constants: range
    carried: range
    scanned: range


def split_scan(equation: Any) -> ScanSplit:
    """Read off the ranks, for not all versions of JAX say it: what is scanned or stacked has an axis more outside."""
    body = equation.params["jaxpr"]
    scanned = sum(
        v.aval.ndim > aval.ndim for v, aval in zip(equation.invars, body.in_avals, strict=True)
    )
    stacked = sum(
        v.aval.ndim > aval.ndim for v, aval in zip(equation.outvars, body.out_avals, strict=True)
    )
    carried, kept = len(body.out_avals) - stacked, len(body.in_avals) - scanned
    return ScanSplit(
        range(kept - carried), range(kept - carried, kept), range(kept, kept + scanned)
    )


# Sizing.

# XLA copies what it transposes, and runs a program in an order of its own: of the networks that
# were compiled (those of examples/kernels.py and tests/test_kernel.py) it took up to 3.4 times what
# the equations hold at once, on JAX 0.6 4.4.
_COPIES = 5
_VIEWS = {"reshape", "squeeze", "expand_dims"}


def numbers_in(jaxpr: Any) -> int:
    """Bound on the numbers that a compiled jaxpr takes beside its arguments."""
    return _COPIES * max(_held(jaxpr), 1)


def _held(jaxpr: Any) -> int:
    """Most numbers held at once where equations are run in order and free what is used up."""
    last: dict[Any, int] = {
        variable: len(jaxpr.eqns) for variable in jaxpr.outvars if not hasattr(variable, "val")
    }
    for place in reversed(range(len(jaxpr.eqns))):
        for variable in jaxpr.eqns[place].invars:
            if not hasattr(variable, "val"):
                last.setdefault(variable, place)
    size, held, most = {}, 0, 0
    for place, equation in enumerate(jaxpr.eqns):
        for variable in equation.outvars:
            size[variable] = (
                0 if equation.primitive.name in _VIEWS else math.prod(variable.aval.shape)
            )
            held += size[variable]
        inside = max((_held(inner) for inner in inner_jaxprs(equation)), default=0)
        most = max(most, held + inside)
        for variable in {
            *equation.outvars,
            *(each for each in equation.invars if not hasattr(each, "val")),
        }:
            if last.get(variable, place) == place:
                held -= size.pop(variable, 0)
    return most
