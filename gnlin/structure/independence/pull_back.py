"""A pull-back that is followed example by example.

Where examples meet in a sum, the N addends are carried on. The sum can stay open to the end,
because all that follows is linear in it. So a gradient comes out as its N shares.
"""

from collections.abc import Sequence
from typing import Any

import jax

from gnlin.jaxprs import Operation, run_jaxpr
from gnlin.structure.independence.rules import LINEAR
from gnlin.structure.independence.values import MIXED, ByExample, Summed


def run_by_example(function: Any, arguments: Sequence[jax.Array], examples: int) -> list[Any]:
    """Outputs of a closed jaxpr that is linear in its arguments.

    Each argument has N examples along its first axis. Each output is a `ByExample`, a `Summed`,
    `MIXED`, or an array, which does not depend on the arguments.
    """
    given = [ByExample(leaf, 0, examples) for leaf in arguments]
    return run_jaxpr(function, given, _follow)


def _follow(operation: Operation) -> Sequence[Any] | None:
    """Replaces the outputs of an operation by the properties that they have."""
    if any(value is MIXED for value in operation.inputs):
        return operation.all_outputs(lambda: MIXED)
    by_example = any(isinstance(value, ByExample) for value in operation.inputs)
    summed = any(isinstance(value, Summed) for value in operation.inputs)
    if not by_example and not summed:
        return None  # known: it is computed
    outputs = None
    if not by_example:
        outputs = _on_addends(operation)
    elif not summed and (rule := LINEAR.get(operation.name)) is not None:
        outputs = rule(operation)
    return operation.all_outputs(lambda: MIXED) if outputs is None else outputs


def _on_addends(operation: Operation) -> list[Summed]:
    """An operation that is linear in its sums, on the addends of each example."""
    is_sum = [isinstance(value, Summed) for value in operation.inputs]
    arrays = [value.addends if isinstance(value, Summed) else value for value in operation.inputs]
    in_axes = [0 if summed else None for summed in is_sum]
    apply = jax.vmap(lambda *inputs: list(operation.apply(inputs)), in_axes=in_axes)
    return [Summed(output) for output in apply(*arrays)]
