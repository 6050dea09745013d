"""A proof that a function treats its examples one by one.

Output n of such a function depends on slice n of its batched arguments alone. Nothing is computed:
the function is traced, and the properties of its arrays are followed.

The trace is on `MANY` examples, a number that no other axis has. An array with such an axis may be
known to the function. It may tell one example from another, so it does not pass. Examples are
`jnp.arange` over the batch, and a dropout mask that is drawn for the whole of it.

The function must also be the same whatever the number of examples. So a mean over them does not
pass where it is written as a division by their number.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gnlin.jaxprs import Operation, Scan, control_flow, run_jaxpr
from gnlin.structure.independence.rules import ALL
from gnlin.structure.independence.values import MIXED, ByExample, Summed, array_of
from gnlin.structure.same_program import MANY, alike

_EVEN = 9240  # divisible by all numbers up to 8, by 10, 11 and 12


def keeps_examples_apart(
    function: Callable[..., Any], arguments: Any, batched: Sequence[bool]
) -> bool:
    """Whether outputs n are shown to depend on slice n of the batched arguments alone.

    Args:
        function: of one pytree, linear or not. It returns a pytree with examples along the first
            axes.
        arguments: the pytree, of arrays or their shapes.
        batched: which of its leaves have examples along the first axis.
    """
    leaves, structure = jax.tree.flatten(arguments)
    own = next(leaf.shape[0] for leaf, split in zip(leaves, batched, strict=True) if split)

    def shapes(examples: int) -> list[jax.ShapeDtypeStruct]:
        found = []
        for leaf, split in zip(leaves, batched, strict=True):
            shape = (examples, *leaf.shape[1:]) if split else jnp.shape(leaf)
            found.append(jax.ShapeDtypeStruct(shape, jnp.result_type(leaf)))
        return found

    def traced(leaves: Sequence[Any]) -> Any:
        return jax.make_jaxpr(function)(jax.tree.unflatten(structure, leaves))

    try:
        many = traced(shapes(MANY))
        # As single examples, in a small part and as a whole, and two lengths that a model should
        # not tell apart.
        for length in (1, 2, own, _EVEN):
            if not alike(traced(shapes(length)), many, (length, MANY)):
                return False
        return _is_apart(traced, shapes(MANY), batched)
    except Exception:  # a model may refuse a number of examples in any way
        return False


def _is_apart(traced: Callable[..., Any], shapes: Sequence[Any], batched: Sequence[bool]) -> bool:
    """Whether all outputs have their examples along their first axes."""
    verdict = False

    # The rules compute: `eval_shape` takes care that they do it with shapes alone.
    def run(leaves: Sequence[Any]) -> tuple[()]:
        nonlocal verdict
        values = [
            ByExample(leaf, 0, MANY) if split else leaf
            for leaf, split in zip(leaves, batched, strict=True)
        ]
        outputs = run_jaxpr(traced(leaves), values, _follow)
        verdict = all(isinstance(output, ByExample) and output.axis == 0 for output in outputs)
        return ()

    jax.eval_shape(run, shapes)
    return verdict


def _follow(operation: Operation) -> Sequence[Any] | None:
    """Replaces the outputs of an operation by the properties that they have."""
    mixed = operation.all_outputs(lambda: MIXED)
    if any(value is MIXED for value in operation.inputs):
        return mixed
    known = [value for value in operation.inputs if not isinstance(value, ByExample)]
    if len(known) == len(operation.inputs):
        return _of_known(operation)
    if any(_has_examples(jnp.shape(value)) for value in known):
        return mixed  # what is known differs from one example to the next
    outputs = None
    if operation.name == "scan":
        outputs = _scan(operation)
    elif (rule := ALL.get(operation.name)) is not None:
        outputs = rule(operation)
    # A function that is not linear does not follow a sum addend by addend.
    if outputs is None or any(isinstance(output, Summed) for output in outputs):
        return mixed
    return outputs


def _of_known(operation: Operation) -> Sequence[Any] | None:
    """The same for an operation on arrays that do not depend on the examples."""
    inputs_have = any(_has_examples(jnp.shape(value)) for value in operation.inputs)
    axes = [axis for axis, length in enumerate(operation.shape) if _holds_examples(length)]
    # The same for all examples: so it is in each part of a batch the part of the whole.
    if operation.name == "broadcast_in_dim" and len(axes) == 1 and not inputs_have:
        return [ByExample(operation.apply()[0], axes[0], MANY)]
    outputs_have = all(map(_has_examples, operation.output_shapes))
    if inputs_have and not outputs_have:
        # A sum, say, over numbers that differ from one example to the next.
        return operation.all_outputs(lambda: MIXED)
    return None


def _holds_examples(length: int) -> bool:
    """Whether an axis of this length holds examples in a trace on `MANY` of them."""
    return length > 0 and length % MANY == 0


def _has_examples(shape: Sequence[int]) -> bool:
    return any(map(_holds_examples, shape))


def _scan(operation: Operation) -> list[Any] | None:
    """A loop over another axis than the examples, whose body keeps them apart.

    Each value that it carries has to have its examples along the same axis before and after.
    """
    loop = control_flow(operation.equation)
    assert isinstance(loop, Scan)
    scanned, carried = loop.split.scanned, loop.split.carried
    inside = []
    for place, value in enumerate(operation.inputs):
        array, is_scanned = array_of(value), place in scanned
        turn = array[0] if is_scanned else array
        if not isinstance(value, ByExample):
            inside.append(turn)
        elif value.axis < is_scanned:
            return None  # the loop goes over the examples
        else:
            inside.append(ByExample(turn, value.axis - is_scanned, MANY))
    found = run_jaxpr(loop.body, inside, _follow)
    if any(value is MIXED for value in found):
        return None

    def axis_of(value: Any) -> int | None:
        return value.axis if isinstance(value, ByExample) else None

    if [axis_of(value) for value in found[: len(carried)]] != [
        axis_of(operation.inputs[place]) for place in carried
    ]:
        return None
    outputs: list[Any] = list(operation.apply([array_of(value) for value in operation.inputs]))
    for place, value in enumerate(found):
        if isinstance(value, ByExample):
            is_stacked = place >= len(carried)
            outputs[place] = ByExample(outputs[place], value.axis + is_stacked, MANY)
    return outputs
