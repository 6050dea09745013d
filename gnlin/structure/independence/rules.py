"""The table of rules: from the name of a primitive to its rule.

To let another operation pass, write a rule, in `rearranging`, `products` or `reductions`, and enter
it here. A primitive that is in no table mixes the examples.
"""

from collections.abc import Iterable

from gnlin.structure.independence import products, rearranging, reductions
from gnlin.structure.independence.rearranging import apart_from_axes, elementwise
from gnlin.structure.independence.values import Rule


def _each(names: Iterable[str], rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


# What a pull-back is made of. Sums over examples may be kept open, for all of this is linear.
LINEAR: dict[str, Rule] = {
    **_each(("convert_element_type", "reduce_precision", "copy", "neg", "select_n"), elementwise),
    **_each(("add", "add_any", "sub", "mul", "div"), elementwise),
    "rev": apart_from_axes("dimensions"),
    "concatenate": apart_from_axes("dimension"),
    **_each(("cumsum", "split"), apart_from_axes("axis")),
    "stack": rearranging.stack,
    "unstack": rearranging.unstack,
    "transpose": rearranging.transpose,
    **_each(("reshape", "squeeze"), rearranging.reshape),
    "broadcast_in_dim": rearranging.broadcast_in_dim,
    "slice": rearranging.slice_,
    "pad": rearranging.pad,
    "dot_general": products.dot_general,
    "conv_general_dilated": products.conv_general_dilated,
    "reduce_sum": reductions.reduce_sum,
    **_each(("select_and_scatter_add", "reduce_window_sum"), reductions.window),
}

_ELEMENTWISE = """
    abs acos acosh and asin asinh atan atan2 atanh cbrt ceil clamp cos cosh digamma eq erf erf_inv
    erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic lt max min ne
    nextafter not one_minus_square or pow rem round rsqrt sign sin sinh sqrt square stop_gradient
    tan tanh xor
"""
_REDUCTIONS = """
    argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod
"""

# All that a model may do, for a proof.
ALL: dict[str, Rule] = {
    **LINEAR,
    **_each(_ELEMENTWISE.split(), elementwise),
    **_each(_REDUCTIONS.split(), reductions.reduce_sum),
    **_each(("cumlogsumexp", "cummax", "cummin", "cumprod"), apart_from_axes("axis")),
    "sort": apart_from_axes("dimension"),
    "gather": rearranging.gather,
    "dynamic_slice": rearranging.dynamic_slice,
    "top_k": reductions.top_k,
    **_each(("reduce_window_max", "reduce_window_min", "select_and_gather_add"), reductions.window),
}
