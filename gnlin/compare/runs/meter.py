"""Work that depends on the data, counted while it is done.

`cost` counts a function as if each loop turned once and each branch were the dearest. A metered
function computes the same outputs and also returns the FLOPs to add to that count:

* A loop that turned t times adds t − 1 times its body and t times its condition.
* A branch subtracts the difference between the dearest branch and itself.

So no optimiser has to report how its conjugate gradients or line searches went. To count, the
jaxpr of the function is evaluated equation by equation. Control flow that depends on the data is
replaced by the same control flow with one more value in its carry: the FLOPs so far.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlin.compare.runs.cost import compiled_flops, jaxpr_flops, unseen_flops
from gnlin.jaxprs import (
    Branches,
    Call,
    Implementation,
    Scan,
    WhileLoop,
    apply_equation,
    as_function,
    computed_jaxprs,
    control_flow,
    live_equations,
    primitive_name,
    run_live,
)


class Metered(NamedTuple):
    """A function with a meter.

    Attributes:
        flops: of a call whose loops turn once and whose branches are the dearest.
        varies: whether calls may need more or less than that.
        call: the function. It returns its outputs and the FLOPs to add to `flops`, which are below
            zero where it needed less.
    """

    flops: float
    varies: bool
    call: Callable[..., tuple[Any, jax.Array]]


class Counted(NamedTuple):
    """Outputs, and the FLOPs to add to those that `cost` counts; `None` where there are none."""

    outputs: Sequence[Any]
    more: jax.Array | None


def metered(function: Callable[..., Any], *shapes: Any) -> Metered:
    """Put a meter to a function of arguments of these shapes."""
    plain, outputs = jax.make_jaxpr(function, return_shape=True)(*shapes)
    varies, with_meter = _varies(plain.jaxpr), plain
    if varies:
        leaves = jax.tree.leaves(shapes)
        with_meter = jax.make_jaxpr(lambda *leaves: _evaluate(plain, leaves))(*leaves)

    def call(*arguments: Any) -> tuple[Any, jax.Array]:
        leaves = as_function(with_meter)(*jax.tree.leaves(arguments))
        more = leaves.pop() if varies else jnp.float32(0)
        return jax.tree.unflatten(jax.tree.structure(outputs), leaves), more

    return Metered(jaxpr_flops(plain), varies, call)


def _varies(jaxpr: Any) -> bool:
    """Whether the work of a jaxpr may depend on the data."""
    return any(
        isinstance(control_flow(equation), WhileLoop | Branches | Implementation)
        or _varies_within(equation)
        for equation in live_equations(jaxpr)
    )


def _varies_within(equation: Any) -> bool:
    return any(map(_varies, computed_jaxprs(equation)))


def _evaluate(jaxpr: Any, arguments: Sequence[Any]) -> tuple[list[Any], jax.Array]:
    """Outputs of a jaxpr, and the FLOPs to add."""
    total = jnp.float32(0)

    def compute(equation: Any, inputs: list[Any]) -> Sequence[Any]:
        nonlocal total
        counted = _apply(equation, inputs)
        if counted.more is not None:
            total = total + counted.more
        return counted.outputs

    return run_live(jaxpr, arguments, compute), total


def _apply(equation: Any, inputs: list[Any]) -> Counted:
    """Compute one equation."""
    flow = control_flow(equation)
    match flow:
        case WhileLoop():
            return _while(flow, inputs)
        case Branches():
            return _branch(flow, inputs)
        case Implementation():
            inner = jax.make_jaxpr(flow.function)(*inputs)
            return Counted(*_evaluate(inner, inputs))
    if not _varies_within(equation):
        return Counted(apply_equation(equation, inputs), None)
    match flow:
        case Scan():
            return _scan(flow, inputs)
        case Call():
            own = [inputs[place] for place in flow.places]
            return Counted(*_evaluate(flow.called, own))
    raise NotImplementedError(
        f"the work of loops or branches within {primitive_name(equation)!r} cannot be counted"
    )


def _while(loop: WhileLoop, inputs: list[Any]) -> Counted:
    """The loop, with the FLOPs as the first value of its carry."""
    of_condition = [inputs[place] for place in loop.of_condition]
    of_body = [inputs[place] for place in loop.of_body]
    start = [inputs[place] for place in loop.carried]
    condition = as_function(loop.condition)
    each_turn = jaxpr_flops(loop.body)
    each_test = jaxpr_flops(loop.condition)

    def goes_on(carry):
        return condition(*of_condition, *carry[1:])[0]

    def turn(carry):
        outputs, more = _evaluate(loop.body, [*of_body, *carry[1:]])
        return [carry[0] + more + each_turn + each_test, *outputs]

    # `cost` has counted one turn and one test: t turns need t − 1 more turns, and t more tests.
    total, *outputs = jax.lax.while_loop(goes_on, turn, [jnp.float32(-each_turn), *start])
    return Counted(outputs, total)


def _scan(scan: Scan, inputs: list[Any]) -> Counted:
    """The loop, with the FLOPs as the first value of its carry; `cost` counts all its turns."""
    constants, start, rows = ([inputs[place] for place in places] for places in scan.split)
    carried = len(start)

    def turn(carry, row):
        outputs, more = _evaluate(scan.body, [*constants, *carry[1:], *row])
        return [carry[0] + more, *outputs[:carried]], outputs[carried:]

    how = {"length": scan.length, "reverse": scan.reverse, "unroll": scan.unroll}
    (total, *carry), results = jax.lax.scan(turn, [jnp.float32(0), *start], rows, **how)
    return Counted([*carry, *results], total)


def _branch(flow: Branches, inputs: list[Any]) -> Counted:
    """The choice, where each branch also returns its work less that of the dearest."""
    seen = [compiled_flops(branch) for branch in flow.branches]
    unseen = [unseen_flops(branch.jaxpr) for branch in flow.branches]
    # XLA and `cost` each take a maximum of their own, perhaps of two branches.
    dearest = max(seen) + max(unseen)

    def taken(branch: Any, less: float, *inputs: Any) -> tuple[list[Any], jax.Array]:
        outputs, more = _evaluate(branch, inputs)
        return outputs, more - less

    choices = [
        functools.partial(taken, branch, dearest - own - hidden)
        for branch, own, hidden in zip(flow.branches, seen, unseen, strict=True)
    ]
    return Counted(*jax.lax.switch(inputs[0], choices, *inputs[1:]))
