"""Running a jaxpr equation by equation, on arrays or on values of another kind."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

# Not where it is used, in the midst of a trace. In JAX 0.12 this import adds options to the key
# of compiled functions, and all that was compiled before would be compiled again.
from jax.extend.core import jaxpr_as_fun

from gnlin.jaxprs.nesting import CALLS
from gnlin.jaxprs.walking import is_literal, live_equations

Value = TypeVar("Value")  # an array, or something that stands for it

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

    @property
    def output_shapes(self) -> Iterator[tuple[int, ...]]:
        """Of all outputs, one after another."""
        return (variable.aval.shape for variable in self.equation.outvars)

    def all_outputs(self, value: Callable[[], Any]) -> list[Any]:
        """A ``value()`` for each output."""
        return [value() for _ in self.equation.outvars]

    def apply(self, inputs: Sequence[Any] | None = None) -> Sequence[Any]:
        """Outputs for these inputs; for its own where none are given."""
        return apply_equation(self.equation, self.inputs if inputs is None else inputs)


# Gives the outputs of an operation, or `None` to have them computed.
Replace = Callable[[Operation], Sequence[Any] | None]


def run_jaxpr(
    closed: Any, arguments: Sequence[Any], replace: Replace, path: Path = ()
) -> list[Any]:
    """Outputs of a closed jaxpr, where `replace` may give the outputs of any operation.

    The inputs and outputs may be of any type that `replace` deals with. Calls of other jaxprs are
    entered: `replace` sees the operations inside. Their paths begin with `path`.
    """
    return _run(closed.jaxpr, closed.consts, arguments, replace, path)


def _run(
    jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any], replace: Replace, path: Path
) -> list[Any]:
    """Outputs of a jaxpr at the place `path`."""
    places = itertools.count()

    def compute(equation: Any, inputs: list[Any]) -> Sequence[Any]:
        here, name = (*path, next(places)), equation.primitive.name
        if name in CALLS:
            called = equation.params[CALLS[name]]
            # Some calls hold a closed jaxpr, others a jaxpr without constants.
            inner, inner_constants = getattr(called, "jaxpr", called), getattr(called, "consts", ())
            outputs = _run(inner, inner_constants, inputs, replace, here)
        else:
            with equation.ctx.manager:
                outputs = replace(Operation(here, equation, inputs))
        return apply_equation(equation, inputs) if outputs is None else outputs

    return _in_order(jaxpr, jaxpr.eqns, [*constants, *arguments], _own_value, compute)


def apply_equation(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """Outputs of one equation of a jaxpr."""
    bound = equation.primitive.get_bind_params(equation.params)
    # From JAX 0.9 on these are the parameters alone.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    # Inside `jax.sharding.auto_axes` and the like the mesh is another one.
    with equation.ctx.manager:
        outputs = equation.primitive.bind(*functions, *inputs, **params)
    return outputs if equation.primitive.multiple_results else [outputs]


def run_live(
    closed: Any, arguments: Sequence[Any], compute: Callable[[Any, list[Any]], Sequence[Any]]
) -> list[Any]:
    """Outputs of a jaxpr whose live equations are computed one after another by `compute`.

    Unlike `run_jaxpr` it does not go into calls. A jaxpr that is not closed has no constants.
    """
    jaxpr, constants = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
    inputs = [*constants, *arguments]
    return _in_order(jaxpr, live_equations(jaxpr), inputs, _own_value, compute)


def interpret(
    jaxpr: Any,
    given: Callable[[int], Value],
    literal: Callable[[Any], Value],
    compute: Callable[[Any, list[Value]], Sequence[Value]],
) -> list[Value]:
    """Outputs of a jaxpr that is run on values of another kind, all equations one after another.

    Args:
        jaxpr: not closed: its constants are the first of its inputs. Calls are not entered.
        given: stands for an input, from its number.
        literal: stands for a number that is written into the jaxpr.
        compute: stands for an equation: it gives the outputs for these inputs.
    """
    inputs = [given(place) for place in range(len(jaxpr.constvars) + len(jaxpr.invars))]
    return _in_order(jaxpr, jaxpr.eqns, inputs, literal, compute)


def _in_order(
    jaxpr: Any,
    equations: Sequence[Any],
    inputs: Sequence[Value],
    literal: Callable[[Any], Value],
    compute: Callable[[Any, list[Value]], Sequence[Value]],
) -> list[Value]:
    """Outputs of a jaxpr, where `compute` gives the outputs of these equations of it."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))

    def read(atom: Any) -> Value:
        return literal(atom.val) if is_literal(atom) else values[atom]

    for equation in equations:
        outputs = compute(equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _own_value(number: Any) -> Any:
    """A literal stands for itself."""
    return number


def as_function(closed: Any) -> Callable[..., list[Any]]:
    """A closed jaxpr as a function of its inputs."""
    return jaxpr_as_fun(closed)
