"""Walking a jaxpr: its equations, the programs inside them, its arrays and its constants."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax


def all_equations(jaxpr: Any) -> list[Any]:
    """The equations of a jaxpr, in order."""
    return list(jaxpr.eqns)


def live_equations(jaxpr: Any) -> list[Any]:
    """Equations that an output depends on, in order. XLA removes the others."""
    wanted = variables(jaxpr.outvars)
    found = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not wanted.isdisjoint(equation.outvars):
            wanted |= variables(equation.invars)
            found.append(equation)
    return found[::-1]


def primitive_name(equation: Any) -> str:
    """Name of the primitive that an equation binds."""
    return equation.primitive.name


def parameters(equation: Any) -> dict[str, Any]:
    """Parameters of the primitive, such as axes. Their meaning depends on the primitive."""
    return equation.params


def primitive_names(jaxpr: Any) -> Iterator[str]:
    """Names of the primitives in a jaxpr, those of its inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield primitive_name(equation)
        for inner in inner_jaxprs(equation):
            yield from primitive_names(inner)


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """Jaxprs among the parameters of an equation.

    These are the jaxpr that it calls, its branches, or the body and the condition of a loop.
    """
    for value in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda value: as_jaxpr(value) is not None
    ):
        if (found := as_jaxpr(value)) is not None:
            yield found


def as_jaxpr(value: Any) -> Any:
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
            held = list(equation.params.values())
            for value in jax.tree.leaves(held, is_leaf=lambda node: hasattr(node, "consts")):
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


def variables(atoms: Iterable[Any]) -> set[Any]:
    """All but the literals."""
    return {atom for atom in atoms if not is_literal(atom)}


class ArrayType(NamedTuple):
    """Shape and dtype of an input or an output; () and `None` where it is not an array."""

    shape: tuple[int, ...]
    dtype: Any


def input_arrays(written: Any) -> list[ArrayType]:
    """Types of the inputs of an equation, or of a jaxpr, whose constants are left out."""
    return [_array_type(atom) for atom in written.invars]


def output_arrays(written: Any) -> list[ArrayType]:
    """Types of the outputs of an equation, or of a jaxpr."""
    return [_array_type(atom) for atom in written.outvars]


def _array_type(atom: Any) -> ArrayType:
    return ArrayType(getattr(atom.aval, "shape", ()), getattr(atom.aval, "dtype", None))
