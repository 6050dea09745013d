"""Parts of a batch: which leaves hold examples, and whether a model may be evaluated on some
examples alone.

A model is a function of its whole batch. Where output n depends on example n alone, the outputs of
a part are the parts of the outputs; batch normalisation, or anything else that brings examples
together, breaks this without a trace in the shapes. So the equations of the model are followed, as
`by_example` does with those of a pull-back.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.jaxprs import apply_equation, primitive_names, run_jaxpr, split_scan
from gnlin.structure.independence.rules import (
    MIXED,
    RULES,
    ByExample,
    Rule,
    Summed,
    apart_from_axes,
    computed,
    elementwise,
    pooling,
    reduce_sum,
)
from gnlin.structure.same_program import MANY, alike
from gnlin.tree import Batch, Outputs, Params


def keeps_examples_apart(
    function: Callable[..., Any], arguments: Any, batched: Sequence[bool]
) -> bool:
    """Whether outputs n of a function, linear or not, are shown to depend on slice n of its batched
    arguments alone.

    Nothing is computed: the function is traced, on more examples than there are, of a number that
    no other axis has. What is known to the function must not tell one example from another, so that
    neither `jnp.arange` over examples nor a dropout mask drawn for the whole batch passes; and it
    must be the same function whatever their number, so that neither a mean over them passes that is
    written as a division by it.

    Args:
        function: of one pytree, returns a pytree with examples along the first axes.
        arguments: the pytree, of arrays or their shapes.
        batched: which of its leaves have examples along the first axis.
    """
    leaves, structure = jax.tree.flatten(arguments)
    own = next(leaf.shape[0] for leaf, split in zip(leaves, batched, strict=True) if split)

    def shapes(examples):
        return [
            jax.ShapeDtypeStruct(
                (examples, *leaf.shape[1:]) if split else jnp.shape(leaf), jnp.result_type(leaf)
            )
            for leaf, split in zip(leaves, batched, strict=True)
        ]

    def traced(leaves):
        return jax.make_jaxpr(function)(jax.tree.unflatten(structure, leaves))

    verdict = False

    def run(leaves):
        nonlocal verdict
        closed = traced(leaves)
        values = [
            ByExample(leaf, 0) if split else leaf
            for leaf, split in zip(leaves, batched, strict=True)
        ]
        outputs = run_jaxpr(closed.jaxpr, closed.consts, values, _follow_apart)
        verdict = all(isinstance(output, ByExample) and output.axis == 0 for output in outputs)
        return ()

    try:
        # As single examples, in a small part and as a whole, and two lengths that a model should
        # not tell apart.
        many = traced(shapes(MANY))
        if all(
            alike(traced(shapes(length)), many, (length, MANY)) for length in (1, 2, own, _EVEN)
        ):
            jax.eval_shape(run, shapes(MANY))
    except Exception:  # whatever a model has to say to a number of examples that it does not want
        return False
    return verdict


_EVEN = 9240  # divisible by all numbers up to 8, 10, 11 and 12


def _holds_examples(length: int) -> bool:
    return length > 0 and length % MANY == 0


def _follow_apart(path: tuple[int, ...], equation: Any, values: list[Any]) -> list[Any] | None:
    """Replaces equations of any function by what is known of their outputs; sums over examples are mixed."""
    del path
    name = equation.primitive.name
    if not any(value is MIXED or isinstance(value, ByExample) for value in values):
        # What is the same for all examples is, in each part of a batch, what it was in the whole.
        axes = [
            axis
            for axis, length in enumerate(equation.outvars[0].aval.shape)
            if _holds_examples(length)
        ]
        if (
            name == "broadcast_in_dim"
            and len(axes) == 1
            and not any(map(_holds_examples, jnp.shape(values[0])))
        ):
            return [ByExample(apply_equation(equation, values)[0], axes[0])]
        if any(map(_differs_by_example, values)) and not all(
            map(_differs_by_example, equation.outvars)
        ):
            return [MIXED] * len(
                equation.outvars
            )  # a sum over what differs from one example to the next
        return None
    known = [value for value in values if value is not MIXED and not isinstance(value, ByExample)]
    mixed = any(value is MIXED for value in values)
    mixed |= any(map(_differs_by_example, known))
    outputs = None
    if not mixed and name == "scan":
        outputs = _scan(equation, values)
    elif not mixed and (rule := RULES.get(name) or _NONLINEAR_RULES.get(name)) is not None:
        outputs = rule(equation, values, MANY)
    if outputs is None or any(isinstance(output, Summed) for output in outputs):
        return [MIXED] * len(equation.outvars)
    return outputs


def _differs_by_example(value: Any) -> bool:
    """Whether a known value, or a variable, has an axis of examples; what is the same for all is `ByExample`."""
    shape = (
        value.aval.shape
        if hasattr(value, "aval") and not hasattr(value, "shape")
        else jnp.shape(value)
    )
    return any(map(_holds_examples, shape))


def _scan(equation: Any, values: list[Any]) -> list[Any] | None:
    body, split = equation.params["jaxpr"], split_scan(equation)
    arrays = [value.array if isinstance(value, ByExample) else value for value in values]

    def axis_inside(place: int) -> int | None:
        value = values[place]
        return value.axis - (place in split.scanned) if isinstance(value, ByExample) else None

    axes = [axis_inside(place) for place in range(len(values))]
    if any(axis is not None and axis < 0 for axis in axes):  # the loop goes over the examples
        return None
    inside = [array[0] if place in split.scanned else array for place, array in enumerate(arrays)]
    given = [
        each if axis is None else ByExample(each, axis)
        for each, axis in zip(inside, axes, strict=True)
    ]
    found = run_jaxpr(body.jaxpr, body.consts, given, _follow_apart)
    if any(value is MIXED for value in found):
        return None
    after = [value.axis if isinstance(value, ByExample) else None for value in found]
    if after[: len(split.carried)] != [axes[place] for place in split.carried]:
        return None
    stacked = range(len(split.carried), len(found))
    outputs = apply_equation(equation, arrays)
    return [
        output if axis is None else ByExample(output, axis + (place in stacked))
        for place, (output, axis) in enumerate(zip(outputs, after, strict=True))
    ]


def _gather(equation, values, examples):
    """A table that all examples look up."""
    del examples
    (table, indices), numbers = values, equation.params["dimension_numbers"]
    if isinstance(table, ByExample) or getattr(numbers, "start_indices_batching_dims", ()):
        return None
    # Axes of the indices, but the last, are those of the output that hold no slice of the table.
    outside = [
        axis for axis in range(equation.outvars[0].aval.ndim) if axis not in numbers.offset_dims
    ]
    return computed(equation, values, outside[indices.axis])


def _dynamic_slice(equation, values, examples):
    del examples
    operand, *starts = values
    if not isinstance(operand, ByExample) or any(isinstance(start, ByExample) for start in starts):
        return None
    whole = equation.params["slice_sizes"][operand.axis] == operand.array.shape[operand.axis]
    return computed(equation, values, operand.axis) if whole else None


def _top_k(equation, values, examples):
    del examples
    (value,), along = values, equation.params.get("axis", -1)
    return (
        computed(equation, values, value.axis) if value.axis != along % value.array.ndim else None
    )


_ELEMENTWISE = """
    abs acos acosh and asin asinh atan atan2 atanh cbrt ceil clamp cos cosh digamma eq erf erf_inv
    erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic lt max min ne
    nextafter not one_minus_square or pow rem round rsqrt sign sin sinh sqrt square stop_gradient
    tan tanh xor
"""
_NONLINEAR_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(("cumlogsumexp", "cummax", "cummin", "cumprod"), apart_from_axes("axis")),
    "sort": apart_from_axes("dimension"),
    **dict.fromkeys(
        ("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod"),
        reduce_sum,
    ),
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "top_k": _top_k,
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "select_and_gather_add"), pooling),
}


class Cut(NamedTuple):
    """How a batch is cut into parts.

    Attributes:
        examples: N, along the first axis of every output; 1 where the outputs are scalars.
        colours: C, outputs of an example.
        batched: which leaves of the batch have N along the first axis, and are cut.
        apart: whether the outputs of a part are shown to be that part of the outputs.
    """

    examples: int
    colours: int
    batched: tuple[bool, ...]
    apart: bool


def cut_of(model: Callable[[Params, Batch], Outputs], params: Params, batch: Batch) -> Cut:
    """Look at a model as a function of the batch.

    Rules of differentiation that are somebody's own may bring examples together where the model
    itself does not: the derivative along some direction has to keep them apart as well.

    Raises:
        ValueError: there are no outputs, or they differ in how many examples they are for.
    """
    outputs = jax.tree.leaves(jax.eval_shape(model, params, batch))
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in outputs}
    if any(jnp.size(leaf) == 0 for leaf in jax.tree.leaves(batch)):
        raise ValueError(f"`batch` is empty: {jax.tree.map(jnp.shape, batch)}")
    if len(lengths) != 1 or not (size := tree.size(outputs)):
        raise ValueError(
            "`model` must return outputs with one and the same number of examples along their first axes (or scalars); "
            f"got the shapes {[leaf.shape for leaf in outputs]}"
        )
    examples = lengths.pop()
    batched = tuple(
        jnp.ndim(leaf) > 0 and jnp.shape(leaf)[0] == examples for leaf in jax.tree.leaves(batch)
    )
    apart = examples is not None and any(batched)
    if apart:
        rules = set(primitive_names(jax.make_jaxpr(model)(params, batch).jaxpr))
        apart = not any(name.startswith("custom_vjp_call") for name in rules)
        apart = apart and keeps_examples_apart(lambda batch: model(params, batch), batch, batched)
        if apart and "custom_jvp_call" in rules:

            def derivative(batch):
                return jax.jvp(lambda params: model(params, batch), (params,), (params,))

            apart = keeps_examples_apart(derivative, batch, batched)
    return Cut(examples or 1, size // (examples or 1), batched, apart)


def part_of(batch: Batch, cut: Cut, start: jax.typing.ArrayLike, length: int) -> Batch:
    """`length` examples from `start` on."""
    leaves, structure = jax.tree.flatten(batch)
    parts = [
        jax.lax.dynamic_slice_in_dim(leaf, start, length, axis=0) if split else leaf
        for leaf, split in zip(leaves, cut.batched, strict=True)
    ]
    return jax.tree.unflatten(structure, parts)


def joined(first: Batch, second: Batch, cut: Cut) -> Batch:
    """The examples of one batch followed by those of another; of what is not cut, the first's."""
    leaves, others = jax.tree.leaves(first), jax.tree.leaves(second)
    both = [
        jnp.concatenate([a, b]) if s else a
        for a, b, s in zip(leaves, others, cut.batched, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(first), both)


def assemble(
    function: Callable[[jax.typing.ArrayLike], Any], total: int, length: int, axis: int
) -> Any:
    """Arrays of `total` along `axis`, from ``function(start)`` which gives `length` of them; no
    loop where that is all.

    The last block overlaps the one before, so that all are of one size and nothing has to be cut
    off.
    """
    if length >= total:
        return function(0)
    starts = jnp.minimum(jnp.arange(0, total, length, dtype=jnp.int32), total - length)

    def put(whole, block, start):
        return jax.lax.dynamic_update_slice_in_dim(whole, block, start, axis)

    def add(wholes, start):
        return jax.tree.map(
            lambda whole, block: put(whole, block, start), wholes, function(start)
        ), None

    def empty(block):
        return jnp.zeros([*block.shape[:axis], total, *block.shape[axis + 1 :]], block.dtype)

    return jax.lax.scan(add, jax.tree.map(empty, jax.eval_shape(function, starts[0])), starts)[0]
