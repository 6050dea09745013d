"""How often the loops inside a step turn, for optimisers that do not tell."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxpr_as_fun

from gnlin.compare.method import Method


class Counted(NamedTuple):
    """A peer's state, and how often the loops of the last step turned."""

    inner: Any
    turns: jax.Array


def counting(init: Callable[..., Any], step: Callable[..., Any], turn_flops: Callable[[], float]) -> Method:
    """A method that counts the turns of the step's loops whose length depends on the data."""

    def begin(params, batch, key):
        return Counted(init(params, batch, key), jnp.int32(0))

    def advance(params, state, batch, key):
        arguments = params, state.inner, batch, key
        jaxpr, shapes = jax.make_jaxpr(step, return_shape=True)(*arguments)
        leaves, turns = _evaluate(jaxpr, jax.tree.leaves(arguments))
        params, inner = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
        return params, Counted(inner, turns)

    return Method(begin, advance, turns=lambda state: state.turns, turn_flops=turn_flops)


def _evaluate(closed: Any, arguments: Sequence[Any]) -> tuple[list[Any], jax.Array]:
    """Outputs of a jaxpr, and the turns of its loops."""
    jaxpr, turns = closed.jaxpr, jnp.int32(0)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *arguments], strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        outputs, more = _apply(equation, [read(variable) for variable in equation.invars])
        values.update(zip(equation.outvars, outputs, strict=True))
        turns += more
    return [read(variable) for variable in jaxpr.outvars], turns


def _apply(equation: Any, inputs: list[Any]) -> tuple[Sequence[Any], Any]:
    name, params = equation.primitive.name, equation.params
    if name == "while":
        return _loop(params, inputs)
    if name == "cond":
        branches = [functools.partial(lambda branch, *inputs: _evaluate(branch, inputs), b) for b in params["branches"]]
        return jax.lax.switch(inputs[0], branches, *inputs[1:])
    if name == "custom_linear_solve":  # JAX's own
        lengths = params["const_lengths"]
        before = lengths.matvec + lengths.vecmat
        return _evaluate(params["jaxprs"].solve, [*inputs[before : before + lengths.solve], *inputs[sum(lengths) :]])
    if name == "linear_solve":  # lineax's
        inner = jax.make_jaxpr(functools.partial(equation.primitive.impl, **params))(*inputs)
        return _evaluate(inner, inputs)
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if name in ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call") and hasattr(inner, "consts"):
        return _evaluate(inner, inputs)
    bound = equation.primitive.get_bind_params(params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # from JAX 0.9 the parameters alone
    outputs = equation.primitive.bind(*functions, *inputs, **params)
    return (outputs if equation.primitive.multiple_results else [outputs]), 0


def _loop(params: Mapping[str, Any], inputs: list[Any]) -> tuple[list[Any], jax.Array]:
    split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    outer, inner, start = inputs[: split[0]], inputs[split[0] : split[1]], inputs[split[1] :]
    condition, body = jaxpr_as_fun(params["cond_jaxpr"]), jaxpr_as_fun(params["body_jaxpr"])

    def goes_on(carry):
        return condition(*outer, *carry[1:])[0]

    def turn(carry):
        return [carry[0] + 1, *body(*inner, *carry[1:])]

    turns, *outputs = jax.lax.while_loop(goes_on, turn, [jnp.int32(0), *start])
    return outputs, turns
