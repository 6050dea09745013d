"""Equations that hold other jaxprs: loops, choices and calls, as records."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gnlin.jaxprs.walking import as_jaxpr, inner_jaxprs, is_literal, primitive_names

# `jax.checkpoint` in the versions of JAX; the last is behind a flag.
CHECKPOINTS = {"checkpoint", "remat2", "RematTraced"}
# Primitives that do nothing but call a jaxpr ↦ the parameter that holds it. Versions of JAX differ.
CALLS = {
    **dict.fromkeys(("jit", "pjit", *CHECKPOINTS), "jaxpr"),
    **dict.fromkeys(
        ("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"
    ),
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


class ScanSplit(NamedTuple):
    """Which inputs of a scan are its constants, which it carries, and which it goes over.

    The carried values are the first of its outputs. The others are stacked.
    """

    constants: range
    carried: range
    scanned: range


def split_scan(equation: Any) -> ScanSplit:
    """Read off the ranks: an array that is scanned or stacked has one axis more outside.

    The parameters of a scan would say it too, but not in all versions of JAX.
    """
    body = equation.params["jaxpr"]

    def longer_outside(variables: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(variables, inside, strict=True)
        return sum(variable.aval.ndim > aval.ndim for variable, aval in pairs)

    scanned = longer_outside(equation.invars, body.in_avals)
    stacked = longer_outside(equation.outvars, body.out_avals)
    carried, before = len(body.out_avals) - stacked, len(body.in_avals) - scanned
    return ScanSplit(
        range(before - carried), range(before - carried, before), range(before, before + scanned)
    )


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
        computes_again: whether the body has a `jax.checkpoint`.
    """

    body: Any
    length: int
    reverse: bool
    unroll: int
    split: ScanSplit
    computes_again: bool


def carries_from(scan: Scan, dependent: Sequence[bool]) -> list[bool]:
    """Which carried values depend on these inputs of a scan, in any turn."""
    split = scan.split
    carried = [dependent[place] for place in split.carried]
    while True:
        flags = [
            *(dependent[place] for place in split.constants),
            *carried,
            *(dependent[place] for place in split.scanned),
        ]
        outputs = _dependent_outputs(scan.body.jaxpr, flags)[: len(carried)]
        later = [before or now for before, now in zip(carried, outputs, strict=True)]
        if later == carried:
            return carried
        carried = later


def _dependent_outputs(jaxpr: Any, dependent: Sequence[bool]) -> list[bool]:
    """Which outputs of a jaxpr depend on these inputs. Calls are entered."""
    reached = {v for v, flag in zip(jaxpr.invars, dependent, strict=True) if flag}

    def is_reached(atom: Any) -> bool:
        return not is_literal(atom) and atom in reached

    for equation in jaxpr.eqns:
        flags = list(map(is_reached, equation.invars))
        name, outputs = equation.primitive.name, [any(flags)] * len(equation.outvars)
        if name in CALLS and any(flags):
            outputs = _dependent_outputs(as_jaxpr(equation.params[CALLS[name]]), flags)
        elif name == "cond" and any(flags[1:]):
            branches = [_dependent_outputs(b.jaxpr, flags[1:]) for b in equation.params["branches"]]
            outputs = [flags[0] or any(each) for each in zip(*branches, strict=True)]
        reached.update(v for v, flag in zip(equation.outvars, outputs, strict=True) if flag)
    return list(map(is_reached, jaxpr.outvars))


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
        body = params["jaxpr"]
        again = not CHECKPOINTS.isdisjoint(primitive_names(body.jaxpr))
        return Scan(body, params["length"], *how, split_scan(equation), again)
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
        return [as_jaxpr(equation.params["jaxprs"].solve)]
    return list(inner_jaxprs(equation))
