"""Walking, running and sizing jaxprs: the one module that knows how JAX writes its programs down.

A jaxpr is a list of equations. Each equation binds a primitive to its inputs and names its outputs.
Some equations hold other jaxprs, which they call, choose among or repeat. JAX changes these names
and parameters between versions. A change in JAX is then a change in this file.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def live_equations(jaxpr: Any) -> list[Any]:
    """Equations that an output depends on, in order. XLA removes the others."""
    wanted = _variables(jaxpr.outvars)
    found = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not wanted.isdisjoint(equation.outvars):
            wanted |= _variables(equation.invars)
            found.append(equation)
    return found[::-1]


def _variables(atoms: Iterable[Any]) -> set[Any]:
    """All but the literals."""
    return {atom for atom in atoms if not hasattr(atom, "val")}


def input_shapes(equation: Any) -> list[tuple[int, ...]]:
    """Shapes of the inputs of an equation."""
    return [atom.aval.shape for atom in equation.invars]


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


def run_live(
    closed: Any, arguments: Sequence[Any], compute: Callable[[Any, list[Any]], Sequence[Any]]
) -> list[Any]:
    """Outputs of a jaxpr whose live equations are computed one after another by `compute`.

    Unlike `run_jaxpr` it does not go into calls. A jaxpr that is not closed has no constants.
    """
    jaxpr, constants = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(atom):
        return atom.val if hasattr(atom, "val") else values[atom]  # a literal or a variable

    for equation in live_equations(jaxpr):
        outputs = compute(equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def as_function(closed: Any) -> Callable[..., list[Any]]:
    """A closed jaxpr as a function of its inputs."""
    from jax.extend.core import jaxpr_as_fun  # here, for importing gnlin must stay quick

    return jaxpr_as_fun(closed)


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


# Control flow and calls, as records.


class WhileLoop(NamedTuple):
    """A `while` loop: repeats its body as long as its condition holds.

    Attributes:
        condition: closed jaxpr, (*constants of the condition, *carry) ↦ (whether to go on,).
        body: closed jaxpr, (*constants of the body, *carry) ↦ carry.
        of_condition: places of the condition's constants among the inputs.
        of_body: places of the body's constants.
        carried: places of the first carry.
    """

    condition: Any
    body: Any
    of_condition: range
    of_body: range
    carried: range


class Scan(NamedTuple):
    """A loop of known length.

    Attributes:
        body: closed jaxpr, (*constants, *carry, *row) ↦ (*carry, *row of the results).
        length: number of turns.
        reverse: whether the last row comes first.
        unroll: turns that are written out in one turn of the compiled loop.
        split: places of constants, carry and rows among the inputs.
    """

    body: Any
    length: int
    reverse: bool
    unroll: int
    split: ScanSplit


class Branches(NamedTuple):
    """A choice: input 0 numbers the branch, a closed jaxpr of the other inputs."""

    branches: tuple[Any, ...]


class Call(NamedTuple):
    """A jaxpr that is computed once, and the places of its arguments among the inputs."""

    called: Any
    places: list[int]


class Implementation(NamedTuple):
    """A primitive that is a function of its inputs, in terms of other primitives."""

    function: Callable[..., Any]


def control_flow(equation: Any) -> WhileLoop | Scan | Branches | Call | Implementation | None:
    """How an equation computes the jaxprs that it holds; `None` where this module cannot tell."""
    name, params = equation.primitive.name, equation.params
    if name == "while":
        ends = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        return WhileLoop(
            params["cond_jaxpr"],
            params["body_jaxpr"],
            range(ends[0]),
            range(*ends),
            range(ends[1], len(equation.invars)),
        )
    if name == "scan":
        how = bool(params["reverse"]), int(params["unroll"])
        return Scan(params["jaxpr"], params["length"], *how, split_scan(equation))
    if name == "cond":
        return Branches(tuple(params["branches"]))
    if name == "custom_linear_solve":  # JAX's own; the inputs of `solve` follow those of products
        lengths = params["const_lengths"]
        before = lengths.matvec + lengths.vecmat
        places = [
            *range(before, before + lengths.solve),
            *range(sum(lengths), len(equation.invars)),
        ]
        return Call(params["jaxprs"].solve, places)
    if name == "linear_solve":  # lineax's
        return Implementation(functools.partial(equation.primitive.impl, **params))
    if name in CALLS:
        return Call(params[CALLS[name]], list(range(len(equation.invars))))
    return None


def computed_jaxprs(equation: Any) -> list[Any]:
    """The inner jaxprs that are computed. A linear solve has others, for its derivatives alone."""
    if equation.primitive.name == "custom_linear_solve":
        return [_as_jaxpr(equation.params["jaxprs"].solve)]
    return list(inner_jaxprs(equation))


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
