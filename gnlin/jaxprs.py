"""Walking, running and sizing jaxprs: the only module that knows JAX's insides.

A jaxpr is a list of equations. Each equation binds a primitive to its inputs and names its outputs.
Some equations hold other jaxprs, which they call, choose among or repeat. JAX changes these names
and parameters between versions. A change in JAX is then a change in this file.

The meaning of a single primitive is known elsewhere, one function a primitive:
`gnlin.structure.layers` has recognisers, `gnlin.structure.independence` has rules.
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
    """Jaxprs among the parameters of an equation.

    These are the jaxpr that it calls, its branches, or the body and the condition of a loop.
    """
    for value in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda value: _as_jaxpr(value) is not None
    ):
        if (found := _as_jaxpr(value)) is not None:
            yield found


def _as_jaxpr(value: Any) -> Any:
    """The jaxpr in a value, which may be closed over its constants; `None` where there is none."""
    value = getattr(value, "jaxpr", value)
    return value if hasattr(value, "eqns") else None


def is_literal(atom: Any) -> bool:
    """Whether an input of an equation is a number written into the jaxpr, not a variable."""
    return hasattr(atom, "val")


def constants_and_literals(closed: Any) -> list[Any]:
    """Constants and literals of a closed jaxpr and of its inner ones, in their order."""
    found = list(closed.consts)

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            found.extend(atom.val for atom in equation.invars if is_literal(atom))
            parameters = list(equation.params.values())
            for value in jax.tree.leaves(parameters, is_leaf=lambda node: hasattr(node, "consts")):
                found.extend(getattr(value, "consts", ()))
            for inner in inner_jaxprs(equation):
                visit(inner)

    visit(closed.jaxpr)
    return found


def has_custom_pull_back(jaxpr: Any) -> bool:
    """Whether some function in a jaxpr has a `jax.custom_vjp`."""
    return any(name.startswith("custom_vjp_call") for name in primitive_names(jaxpr))


def has_custom_push_forward(jaxpr: Any) -> bool:
    """Whether some function in a jaxpr has a `jax.custom_jvp`."""
    return "custom_jvp_call" in primitive_names(jaxpr)


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
    return {atom for atom in atoms if not is_literal(atom)}


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

# The place of an equation: its number in its jaxpr, after the numbers of the calls around it.
Path = tuple[int, ...]


class Operation(NamedTuple):
    """One equation of a jaxpr that is run, with the values of its inputs."""

    path: Path
    equation: Any
    inputs: list[Any]

    @property
    def name(self) -> str:
        """Of the primitive."""
        return self.equation.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the primitive, such as axes."""
        return self.equation.params

    @property
    def output(self) -> jax.ShapeDtypeStruct:
        """The first output, for most operations the only one."""
        aval = self.equation.outvars[0].aval
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first output."""
        return self.equation.outvars[0].aval.shape

    def all_outputs(self, value: Callable[[], Any]) -> list[Any]:
        """A ``value()`` for each output."""
        return [value() for _ in self.equation.outvars]

    def apply(self, inputs: Sequence[Any] | None = None) -> Sequence[Any]:
        """Outputs for these inputs; for its own where none are given."""
        return apply_equation(self.equation, self.inputs if inputs is None else inputs)


# Gives the outputs of an operation, or `None` to have them computed.
Replace = Callable[[Operation], Sequence[Any] | None]


def run_jaxpr(closed: Any, arguments: Sequence[Any], replace: Replace) -> list[Any]:
    """Outputs of a closed jaxpr, where `replace` may give the outputs of any operation.

    The inputs and outputs may be of any type that `replace` deals with. Calls of other jaxprs are
    entered: `replace` sees the operations inside.
    """
    return _run(closed.jaxpr, closed.consts, arguments, replace, ())


def _run(
    jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any], replace: Replace, path: Path
) -> list[Any]:
    """Outputs of a jaxpr at the place `path`."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if is_literal(atom) else values[atom]

    for place, equation in enumerate(jaxpr.eqns):
        here, inputs = (*path, place), [read(atom) for atom in equation.invars]
        name = equation.primitive.name
        if name in CALLS:
            called = equation.params[CALLS[name]]
            # Some calls hold a closed jaxpr, others a jaxpr without constants.
            inner, inner_constants = getattr(called, "jaxpr", called), getattr(called, "consts", ())
            outputs = _run(inner, inner_constants, inputs, replace, here)
        else:
            outputs = replace(Operation(here, equation, inputs))
        if outputs is None:
            outputs = apply_equation(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def apply_equation(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """Outputs of one equation of a jaxpr."""
    bound = equation.primitive.get_bind_params(equation.params)
    # From JAX 0.9 on these are the parameters alone.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
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
        return atom.val if is_literal(atom) else values[atom]

    for equation in live_equations(jaxpr):
        outputs = compute(equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def as_function(closed: Any) -> Callable[..., list[Any]]:
    """A closed jaxpr as a function of its inputs."""
    from jax.extend.core import jaxpr_as_fun  # here, for importing gnlin must stay quick

    return jaxpr_as_fun(closed)


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
        for variable in {*equation.outvars, *_variables(equation.invars)}:
            # An output that nothing reads is in no entry of `last`: it goes at once.
            if last.get(variable, place) == place:
                held -= size.pop(variable, 0)
    return most


def _last_uses(jaxpr: Any) -> dict[Any, int]:
    """The last equation that reads each variable; the end, for the outputs."""
    end = len(jaxpr.eqns)
    last = dict.fromkeys(_variables(jaxpr.outvars), end)
    for place in reversed(range(end)):
        for variable in _variables(jaxpr.eqns[place].invars):
            last.setdefault(variable, place)
    return last
