"""Work, in FLOPs of compiled programs.

The unit of the comparison is one gradient on one mini-batch of the task. Clocks are noisy and
differ between machines; the count does not. XLA misses two kinds of work, which are added here:

* It counts the body of a loop once. Loops of a known length (`jax.lax.scan`, and `fori_loop`
  between constants) are found in the jaxpr, and their other turns are added.
* It counts nothing for factorisations, which LAPACK computes. The textbook's leading terms are
  added.

XLA counts the dearest of all branches. The turns and branches that depend on the data are left to
`meter`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from gnlin.compare.tasks.task import Task
from gnlin.jaxprs import (
    Branches,
    Scan,
    as_function,
    computed_jaxprs,
    control_flow,
    input_arrays,
    live_equations,
    parameters,
    primitive_name,
)

_COUNTED: dict[str, float] = {}  # jaxprs that read alike cost the same


def flops(function: Callable[..., Any], *shapes: Any) -> float:
    """FLOPs of a function.

    Loops whose length depends on the data are counted as one turn, branches as the dearest.

    Args:
        function: any function that JAX can trace.
        *shapes: its arguments, or their shapes.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*shapes))


def gradient_flops(task: Task) -> float:
    """FLOPs of one value-and-gradient on one mini-batch of the task, which is the unit."""
    batch = task.batch_shapes(task.batch_size or task.train_size)
    return flops(task.objective.value_and_grad, task.params_shapes(), batch)


def jaxpr_flops(closed: Any) -> float:
    """The FLOPs of a closed jaxpr, counted as `flops` counts them."""
    return compiled_flops(closed) + unseen_flops(closed.jaxpr)


def compiled_flops(closed: Any) -> float:
    """XLA's count for a closed jaxpr."""
    text = str(closed.jaxpr)
    if text not in _COUNTED:
        shapes = [jax.ShapeDtypeStruct(*array) for array in input_arrays(closed.jaxpr)]
        analysis = jax.jit(as_function(closed)).lower(*shapes).compile().cost_analysis()
        if isinstance(analysis, list):  # older versions of JAX: a dictionary for each computation
            analysis = analysis[0]
        # For a lone call of LAPACK the count is below zero, which stands for unknown.
        _COUNTED[text] = max((analysis or {}).get("flops", 0.0), 0.0)
    return _COUNTED[text]


# The work that XLA does not see.


def unseen_flops(jaxpr: Any) -> float:
    """FLOPs of factorisations, and of the turns of known loops that XLA does not count."""
    total = 0.0
    for equation in live_equations(jaxpr):
        name, flow = primitive_name(equation), control_flow(equation)
        if name in _LAPACK:
            total += _LAPACK[name](equation)
        elif isinstance(flow, Scan):
            total += _unseen_of_scan(flow)
        elif isinstance(flow, Branches):
            total += max(unseen_flops(branch.jaxpr) for branch in flow.branches)
        else:
            total += sum(unseen_flops(inner) for inner in computed_jaxprs(equation))
    return total


def _unseen_of_scan(scan: Scan) -> float:
    """XLA sees a body for each unrolled turn, and for each turn that is left over at the end."""
    seen = scan.length
    if scan.unroll < scan.length:
        seen = scan.unroll + scan.length % scan.unroll
    others = (scan.length - seen) * compiled_flops(scan.body) if scan.length > seen else 0.0
    return others + scan.length * unseen_flops(scan.body.jaxpr)


class _Matrices(NamedTuple):
    """The first operand of a factorisation."""

    count: int
    longer: int  # side
    shorter: int


def _matrices(equation: Any) -> _Matrices:
    *batch, rows, columns = input_arrays(equation)[0].shape
    return _Matrices(math.prod(batch), max(rows, columns), min(rows, columns))


def _householder(equation: Any) -> float:
    count, m, n = _matrices(equation)
    return count * 2 * n**2 * (m - n / 3)


def _qr(equation: Any) -> float:
    """The triangle, and as much again for the factor Q."""
    return 2 * _householder(equation)


def _svd(equation: Any) -> float:
    count, m, n = _matrices(equation)
    vectors = parameters(equation).get("compute_uv", True)
    return count * (6 * m * n**2 + 20 * n**3 if vectors else 2 * m * n**2 + 2 * n**3)


def _cubic(factor: float) -> Callable[[Any], float]:
    """`factor` times n³ for each matrix."""

    def work(equation: Any) -> float:
        matrices = _matrices(equation)
        return matrices.count * factor * matrices.shorter**3

    return work


def _triangular_solve(equation: Any) -> float:
    count, n, _ = _matrices(equation)
    return count * n * math.prod(input_arrays(equation)[1].shape[-2:])


# Leading terms as Golub and Van Loan give them (Matrix Computations, 4th edition).
_LAPACK: dict[str, Callable[[Any], float]] = {
    "geqrf": _householder,
    "geqp3": _householder,
    "householder_product": _householder,
    "qr": _qr,
    "svd": _svd,
    "eigh": _cubic(9),
    "cholesky": _cubic(1 / 3),
    "lu": _cubic(2 / 3),
    "triangular_solve": _triangular_solve,
}
