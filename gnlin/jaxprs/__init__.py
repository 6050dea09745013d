"""Walking, running and sizing jaxprs: the only room that knows JAX's insides.

A jaxpr is a list of equations. Each equation binds a primitive to its inputs and names its outputs.
Some equations hold other jaxprs, which they call, choose among or repeat. JAX changes these names
and parameters between versions. A change in JAX is then a change in this room.

The meaning of a single primitive is known elsewhere, one function a primitive:
`gnlin.structure.layers` has recognisers, `gnlin.structure.independence` has rules.

* `walking`: the equations of a jaxpr, the programs inside them, its arrays. Start here.
* `nesting`: loops, choices and calls, as records.
* `running`: computes a jaxpr on other values, or other outputs in place of its own.
* `sizing`: bounds the numbers that a jaxpr holds at once.
"""

from gnlin.jaxprs.nesting import (
    Branches,
    Call,
    Implementation,
    Scan,
    WhileLoop,
    carries_from,
    computed_jaxprs,
    control_flow,
)
from gnlin.jaxprs.running import (
    Operation,
    Path,
    apply_equation,
    as_function,
    interpret,
    run_jaxpr,
    run_live,
)
from gnlin.jaxprs.sizing import numbers_held, numbers_held_by
from gnlin.jaxprs.walking import (
    ArrayType,
    all_equations,
    constants_and_literals,
    has_custom_pull_back,
    has_custom_push_forward,
    inner_jaxprs,
    input_arrays,
    live_equations,
    output_arrays,
    parameters,
    primitive_name,
    primitive_names,
)

__all__ = [
    "ArrayType",
    "Branches",
    "Call",
    "Implementation",
    "Operation",
    "Path",
    "Scan",
    "WhileLoop",
    "all_equations",
    "apply_equation",
    "as_function",
    "carries_from",
    "computed_jaxprs",
    "constants_and_literals",
    "control_flow",
    "has_custom_pull_back",
    "has_custom_push_forward",
    "inner_jaxprs",
    "input_arrays",
    "interpret",
    "live_equations",
    "numbers_held",
    "numbers_held_by",
    "output_arrays",
    "parameters",
    "primitive_name",
    "primitive_names",
    "run_jaxpr",
    "run_live",
]
