"""Work, in gradient-equivalents counted from compiled FLOPs.

The unit is the task's value-and-gradient on one mini-batch; a full-batch step costs in proportion. Clocks are noisy and
differ between machines; the count does not. Two kinds of work are missing from what XLA counts, and are added:

* of a loop it counts the body once. Loops of a known length (`jax.lax.scan`, and `fori_loop` between constants) are
  found in the jaxpr and their other turns added; for loops whose length depends on the data the method tells how often
  they turned;
* of factorisations, which LAPACK does, it counts nothing. The textbook's leading terms are added.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Literal, jaxpr_as_fun

from gnlin import quadratic_model
from gnlin.compare.task import Task
from gnlin.tree import Batch, Params


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Work of an optimiser's steps.

    Attributes:
        step: gradient-equivalents of a step whose inner loop turns once, or of one without such a loop.
        turn: gradient-equivalents of one more turn, such as a CG iteration; 0 where there is no such loop.
        start: gradient-equivalents of the first state.
    """

    step: float
    turn: float = 0.0
    start: float = 0.0

    def of(self, steps: int, turns: int) -> float:
        """Gradient-equivalents of `steps` steps with `turns` turns among them."""
        return steps * self.step + self.turn * (turns - steps)


def flops(function: Callable[..., Any], *shapes: Any) -> float:
    """Floating-point operations of a function; a loop whose length depends on the data is counted as one turn."""
    jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
    return compiled_flops(jax.jit(function).lower(*shapes).compile()) + _unseen(jaxpr)


def compiled_flops(compiled: Any) -> float:
    """What XLA counts of a compiled function."""
    analysis = compiled.cost_analysis()
    # Older versions of JAX return one dictionary for each computation.
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return max((analysis or {}).get("flops", 0.0), 0.0)  # below zero: not known, of a lone call of LAPACK


def gradient_flops(task: Task, examples: int | None = None) -> float:
    """FLOPs of one value-and-gradient, by default on one mini-batch of the task, which is the unit."""
    size = examples or task.batch_size or task.train_size
    return flops(task.objective.value_and_grad, params_shapes(task), batch_shapes(task, size))


def product_flops(task: Task, examples: int) -> float:
    """FLOPs of one GGN product on a linearisation that is at hand: what the second of two products adds."""

    def products(count: int) -> Callable[..., Any]:
        def apply(params, vector, batch):
            model = quadratic_model(task.objective, params, batch)
            for _ in range(count):
                vector = model.ggn(vector)
            return vector

        return apply

    params, batch = params_shapes(task), batch_shapes(task, examples)
    return flops(products(2), params, params, batch) - flops(products(1), params, params, batch)


def params_shapes(task: Task) -> Params:
    return jax.eval_shape(task.init, jax.random.key(0))


def batch_shapes(task: Task, examples: int) -> Batch:
    if task.batch_size is None:  # all of it, and its leaves may be of different lengths
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), task.train)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((examples, *leaf.shape[1:]), leaf.dtype), task.train)


# What XLA does not see.


def _unseen(jaxpr: Any) -> float:
    total = 0.0
    for equation in _live(jaxpr):
        name = equation.primitive.name
        if name in _LAPACK:
            total += _LAPACK[name](equation)
        elif name == "scan":
            body = equation.params["jaxpr"]
            shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in body.in_avals]
            turn = compiled_flops(jax.jit(jaxpr_as_fun(body)).lower(*shapes).compile())
            length, unrolled = equation.params["length"], int(equation.params["unroll"])
            seen = length if unrolled >= length else unrolled + length % unrolled
            total += (length - seen) * turn + length * _unseen(body.jaxpr)
        elif name == "cond":
            total += max(_unseen(branch.jaxpr) for branch in equation.params["branches"])
        else:
            total += sum(_unseen(inner) for inner in _inner_jaxprs(equation))
    return total


def _live(jaxpr: Any) -> Iterator[Any]:
    """The equations that an output depends on, last first; XLA removes the others, as the gradient nobody asks for."""
    wanted = {variable for variable in jaxpr.outvars if not isinstance(variable, Literal)}
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not wanted.isdisjoint(equation.outvars):
            wanted.update(variable for variable in equation.invars if not isinstance(variable, Literal))
            yield equation


def _inner_jaxprs(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
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


# Leading terms as Golub and Van Loan give them (Matrix Computations, 4th edition). `qr` makes the factor Q as well.
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
