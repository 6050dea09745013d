"""The inspector: which operations of a push-forward are layers.

It runs the jaxpr of a push-forward dθ ↦ J dθ. In place of the tangent of each leaf it puts a
`View`. Each operation that reads one goes to the recogniser of its primitive. Recognisers write
layers into the `Notes`. They return the output: a `View` of the leaf again, or a `Tangent`.

To read another kind of layer, write a recogniser and enter it under its primitive in `RECOGNISERS`.
"""

# An example. The model is x @ W + b, with x (5, 3), W (3, 4) as leaf 0 and b (4,) as leaf 1. JAX
# prints its push-forward like this; a is x, b is dW, c is db.
#
#     { lambda a:f32[5,3]; b:f32[3,4] c:f32[4]. let
#         d:f32[5,4] = dot_general[
#           dimension_numbers=(([1], [0]), ([], []))
#           preferred_element_type=float32
#         ] a b
#         e:f32[1,4] = broadcast_in_dim[broadcast_dimensions=(1,)] c
#         f:f32[5,4] = add d e
#       in (f,) }
#
# The inspector notes
#
#     b   a view of leaf 0, with axes (0,) and (1,)
#     c   a view of leaf 1, with the axis (0,)
#     d   `dense`: a site at path (0,). Its leaf is 0, its inputs are a, with axes () and (0,). The
#         product has the axes () and (1,). So the applications are numbered by the first axis of
#         both. d is tangent 0, a sum of this product alone.
#     e   `views`: a view of leaf 1, with axes () and (0,)
#     f   `bias`: a site at path (2,), of leaf 1. It runs along the fan-out of d. So leaf 1 may be
#         the bias of the site before. f is tangent 1, a sum of the same product.
#
# At the end each leaf has one site, and tangent 0 has one reader: nothing sees d without its bias.
# So leaf 1 is the bias of the dense layer.

from collections.abc import Callable, Sequence
from typing import Any

from gnlin.jaxprs import Branches, Operation, Scan, control_flow, run_jaxpr
from gnlin.structure.layers.bias import add, subtract
from gnlin.structure.layers.convolution import conv_general_dilated
from gnlin.structure.layers.dense import dot_general
from gnlin.structure.layers.embedding import gather
from gnlin.structure.layers.gain import div, mul
from gnlin.structure.layers.loops import follow_branches, follow_scan
from gnlin.structure.layers.notes import Notes, Tangent, View, depends
from gnlin.structure.layers.views import (
    broadcast_in_dim,
    negate,
    reshape,
    same,
    split,
    take,
    transpose,
    unstack,
)

# Takes an operation that reads a `View` or a `Tangent`, and returns its output, or a list of them.
# A layer or a bias goes into the notes. `None` says that the operation is not recognised; then
# nothing is noted.
Recogniser = Callable[[Operation, Notes], View | Tangent | list[View] | None]

RECOGNISERS: dict[str, Recogniser] = {
    "dot_general": dot_general,
    "conv_general_dilated": conv_general_dilated,
    "gather": gather,
    "mul": mul,
    "div": div,
    "add": add,
    "add_any": add,
    "sub": subtract,
    "neg": negate,
    "slice": take,
    "split": split,
    "unstack": unstack,
    "transpose": transpose,
    "convert_element_type": same,
    "copy": same,
    "sharding_constraint": same,
    "reshard": same,
    "broadcast_in_dim": broadcast_in_dim,
    "reshape": reshape,
    "squeeze": reshape,
    "expand_dims": reshape,
}


def inspect(push_forward: Any, shapes: Sequence[tuple[int, ...]]) -> Notes:
    """The layers in the closed jaxpr of a push-forward, and the other uses of its leaves.

    Args:
        push_forward: a closed jaxpr, linear in the tangents of all leaves.
        shapes: of the leaves.
    """
    notes = Notes(len(shapes))

    def follow(operation: Operation) -> list[Any] | None:
        if not any(map(depends, operation.inputs)):
            return None  # known to the linear function: it is computed
        notes.read(operation.inputs)
        if any(isinstance(value, View) for value in operation.inputs):
            match control_flow(operation.equation):
                case Scan() as scan:
                    return follow_scan(operation, scan, notes, follow)
                case Branches() as choice:
                    return follow_branches(operation, choice, notes, follow)
        recognise = RECOGNISERS.get(operation.name)
        output = None if recognise is None else recognise(operation, notes)
        if output is not None:
            return output if isinstance(output, list) else [output]
        notes.spoil(operation.inputs, operation.name)
        return operation.all_outputs(notes.new_tangent)

    tangents = [View.of_leaf(leaf, shape) for leaf, shape in enumerate(shapes)]
    outputs = run_jaxpr(push_forward, tangents, follow)
    # An output is a reader, and a leaf that is an output is in no layer.
    notes.read(outputs)
    notes.spoil(outputs, "output of the model")
    return notes
