"""Work, in FLOPs of compiled programs; the comparison's unit is one gradient on one mini-batch of
the task.

Clocks are noisy and differ between machines; the count does not. Two kinds of work are missing from
what XLA counts, and are added here:

* of a loop it counts the body once. Loops of a known length (`jax.lax.scan`, and `fori_loop`
  between constants) are found in the jaxpr and their other turns added;
* of factorisations, which LAPACK does, it counts nothing. The textbook's leading terms are added.

Of a branch it counts the dearest. What loops and branches do that depend on the data is for
`meter`.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Literal, jaxpr_as_fun

from gnlin.compare.tasks.task import Task
from gnlin.tree import Batch, Params

_COUNTED: dict[str, float] = {}  # jaxprs that read alike cost the same


def flops(function: Callable[..., Any], *shapes: Any) -> float:
    """FLOPs of a function; loops whose length depends on the data are counted as one turn, branches as the dearest."""
    return jaxpr_flops(jax.make_jaxpr(function)(*shapes))


def jaxpr_flops(closed: Any) -> float:
    """The same of a closed jaxpr."""
    return compiled_flops(closed) + unseen_flops(closed.jaxpr)


def compiled_flops(closed: Any) -> float:
    """What XLA counts of a compiled jaxpr."""
    text = str(closed.jaxpr)
    if text not in _COUNTED:
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in closed.in_avals]
        analysis = jax.jit(jaxpr_as_fun(closed)).lower(*shapes).compile().cost_analysis()
        # Older versions of JAX return one dictionary for each computation.
        analysis = analysis[0] if isinstance(analysis, list) else analysis
        _COUNTED[text] = max(
            (analysis or {}).get("flops", 0.0), 0.0
        )  # below zero: not known, of a lone LAPACK call
    return _COUNTED[text]


def gradient_flops(task: Task) -> float:
    """FLOPs of one value-and-gradient on one mini-batch of the task, which is the unit."""
    size = task.batch_size or task.train_size
    return flops(task.objective.value_and_grad, params_shapes(task), batch_shapes(task, size))


def params_shapes(task: Task) -> Params:
    return jax.eval_shape(task.init, jax.random.key(0))


def batch_shapes(task: Task, examples: int) -> Batch:
    if task.batch_size is None:  # all of it, and its leaves may be of different lengths
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), task.train)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((examples, *leaf.shape[1:]), leaf.dtype), task.train
    )


# What XLA does not see.


def unseen_flops(jaxpr: Any) -> float:
    """FLOPs of factorisations, and of the turns of loops of a known length beyond those that XLA counts."""
    total = 0.0
    for equation in live_equations(jaxpr):
        name = equation.primitive.name
        if name in _LAPACK:
            total += _LAPACK[name](equation)
        elif name == "scan":
            body = equation.params["jaxpr"]
            length, unrolled = equation.params["length"], int(equation.params["unroll"])
            seen = length if unrolled >= length else unrolled + length % unrolled
            others = (length - seen) * compiled_flops(body) if length > seen else 0.0
            total += others + length * unseen_flops(body.jaxpr)
        elif name == "cond":
            total += max(unseen_flops(branch.jaxpr) for branch in equation.params["branches"])
        else:
            total += sum(unseen_flops(inner) for inner in inner_jaxprs(equation))
    return total


def live_equations(jaxpr: Any) -> list[Any]:
    """Those that an output depends on. XLA removes the others, such as a gradient that nobody asks for."""
    wanted = {variable for variable in jaxpr.outvars if not isinstance(variable, Literal)}
    found = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not wanted.isdisjoint(equation.outvars):
            wanted.update(
                variable for variable in equation.invars if not isinstance(variable, Literal)
            )
            found.append(equation)
    return found[::-1]


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters that are computed."""
    values = equation.params.values()
    if equation.primitive.name == "custom_linear_solve":  # the others are for its derivatives
        values = [equation.params["jaxprs"].solve]
    for value in values:
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


def _matrix(equation: Any) -> tuple[int, int, int]:
    """(number of matrices, longer side, shorter side) of the first operand."""
    *batch, rows, columns = equation.invars[0].aval.shape
    return math.prod(batch), max(rows, columns), min(rows, columns)


def _householder(equation: Any) -> float:
    count, m, n = _matrix(equation)
    return count * 2 * n**2 * (m - n / 3)


def _svd(equation: Any) -> float:
    count, m, n = _matrix(equation)
    vectors = equation.params.get("compute_uv", True)
    return count * (6 * m * n**2 + 20 * n**3 if vectors else 2 * m * n**2 + 2 * n**3)


def _triangular_solve(equation: Any) -> float:
    count, n, _ = _matrix(equation)
    return count * n * math.prod(equation.invars[1].aval.shape[-2:])


# Leading terms as Golub and Van Loan give them (Matrix Computations, 4th edition). `qr` makes the
# factor Q as well.
_LAPACK: dict[str, Callable[[Any], float]] = {
    "geqrf": _householder,
    "geqp3": _householder,
    "householder_product": _householder,
    "qr": lambda equation: 2 * _householder(equation),
    "svd": _svd,
    "eigh": lambda equation: _matrix(equation)[0] * 9 * _matrix(equation)[2] ** 3,
    "cholesky": lambda equation: _matrix(equation)[0] * _matrix(equation)[2] ** 3 / 3,
    "lu": lambda equation: _matrix(equation)[0] * 2 * _matrix(equation)[2] ** 3 / 3,
    "triangular_solve": _triangular_solve,
}
