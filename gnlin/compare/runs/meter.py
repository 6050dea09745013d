"""Work that depends on the data, counted while it is done.

`cost` counts a function as if each loop turned once and each branch were the dearest. A metered
function computes the same as before and says how many FLOPs to add: for a loop that turned t times
t − 1 times its body and t times its condition, for a branch taken what it costs less than the
dearest. So no optimiser has to tell how its conjugate gradients or line searches went.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxpr_as_fun

from gnlin.compare.runs.cost import (
    compiled_flops,
    inner_jaxprs,
    jaxpr_flops,
    live_equations,
    unseen_flops,
)
from gnlin.jaxprs import CALLS, apply_equation, split_scan


class Metered(NamedTuple):
    """A function with a meter.

    Attributes:
        flops: of a call whose loops turn once and whose branches are the dearest.
        varies: whether calls may need more or less than that.
        call: the function; returns its outputs, and the FLOPs to add to `flops`, below zero where
            it needed less.
    """

    flops: float
    varies: bool
    call: Callable[..., tuple[Any, jax.Array]]


def metered(function: Callable[..., Any], *shapes: Any) -> Metered:
    """Put a meter to a function of arguments of these shapes."""
    plain, outputs = jax.make_jaxpr(function, return_shape=True)(*shapes)
    varies, with_meter = _varies(plain.jaxpr), plain
    if varies:
        with_meter = jax.make_jaxpr(lambda *leaves: _evaluate(plain, leaves))(
            *jax.tree.leaves(shapes)
        )

    def call(*arguments: Any) -> tuple[Any, jax.Array]:
        leaves = jaxpr_as_fun(with_meter)(*jax.tree.leaves(arguments))
        more = leaves.pop() if varies else jnp.float32(0)
        return jax.tree.unflatten(jax.tree.structure(outputs), leaves), more

    return Metered(jaxpr_flops(plain), varies, call)


def _varies(jaxpr: Any) -> bool:
    return any(
        equation.primitive.name in ("while", "cond", "linear_solve")
        or any(map(_varies, inner_jaxprs(equation)))
        for equation in live_equations(jaxpr)
    )


def _evaluate(closed: Any, arguments: Sequence[Any]) -> tuple[list[Any], jax.Array]:
    """Outputs of a jaxpr, and the FLOPs to add; one that is not closed has no constants."""
    jaxpr, constants = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
    more = jnp.float32(0)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in live_equations(jaxpr):
        outputs, added = _apply(equation, [read(variable) for variable in equation.invars])
        values.update(zip(equation.outvars, outputs, strict=True))
        more = more if added is None else more + added
    return [read(variable) for variable in jaxpr.outvars], more


def _apply(equation: Any, inputs: list[Any]) -> tuple[Sequence[Any], jax.Array | None]:
    name, params = equation.primitive.name, equation.params
    if name == "while":
        return _while(params, inputs)
    if name == "cond":
        return _branch(params["branches"], inputs)
    if name == "linear_solve":  # lineax's
        return _evaluate(
            jax.make_jaxpr(functools.partial(equation.primitive.impl, **params))(*inputs), inputs
        )
    if any(map(_varies, inner_jaxprs(equation))):
        if name == "scan":
            return _scan(equation, inputs)
        if name == "custom_linear_solve":  # JAX's own
            lengths = params["const_lengths"]
            before = lengths.matvec + lengths.vecmat
            own = [*inputs[before : before + lengths.solve], *inputs[sum(lengths) :]]
            return _evaluate(params["jaxprs"].solve, own)
        if name in CALLS:
            return _evaluate(params[CALLS[name]], inputs)
        raise NotImplementedError(
            f"the work of loops or branches within {name!r} cannot be counted"
        )
    return apply_equation(equation, inputs), None


def _while(params: Mapping[str, Any], inputs: list[Any]) -> tuple[list[Any], jax.Array]:
    split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    outer, inner, start = inputs[: split[0]], inputs[split[0] : split[1]], inputs[split[1] :]
    condition, body = jaxpr_as_fun(params["cond_jaxpr"]), params["body_jaxpr"]
    each, asking = jaxpr_flops(body), jaxpr_flops(params["cond_jaxpr"])

    def goes_on(carry):
        return condition(*outer, *carry[1:])[0]

    def turn(carry):
        outputs, more = _evaluate(body, [*inner, *carry[1:]])
        return [carry[0] + more + each + asking, *outputs]

    total, *outputs = jax.lax.while_loop(goes_on, turn, [jnp.float32(-each), *start])
    return outputs, total


def _scan(equation: Any, inputs: list[Any]) -> tuple[list[Any], jax.Array]:
    body, how = (
        equation.params["jaxpr"],
        {name: equation.params[name] for name in ("length", "reverse", "unroll")},
    )
    constants, start, rows = (
        [inputs[place] for place in places] for places in split_scan(equation)
    )
    carried = len(start)

    def turn(carry, row):
        outputs, more = _evaluate(body, [*constants, *carry[1:], *row])
        return [carry[0] + more, *outputs[:carried]], outputs[carried:]

    (total, *carry), results = jax.lax.scan(turn, [jnp.float32(0), *start], rows, **how)
    return [*carry, *results], total


def _branch(branches: Sequence[Any], inputs: list[Any]) -> tuple[Sequence[Any], jax.Array]:
    """The dearest is counted by XLA and by `cost` separately."""
    seen, unseen = (
        [compiled_flops(each) for each in branches],
        [unseen_flops(each.jaxpr) for each in branches],
    )

    def taken(branch: Any, less: float, *inputs: Any) -> tuple[list[Any], jax.Array]:
        outputs, more = _evaluate(branch, inputs)
        return outputs, more - less

    dearest = max(seen) + max(unseen)
    choices = [
        functools.partial(taken, branch, dearest - own - hidden)
        for branch, own, hidden in zip(branches, seen, unseen, strict=True)
    ]
    return jax.lax.switch(inputs[0], choices, *inputs[1:])
