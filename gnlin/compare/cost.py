"""Work, in gradient-equivalents counted from compiled FLOPs.

The unit is the task's value-and-gradient on one mini-batch; a full-batch step costs in proportion. Clocks are noisy and
differ between machines; the count does not. XLA counts the body of a loop once, whatever the number of turns, which has
two consequences: the count of a `scan` over training steps is that of one step; and of the products inside a step's
conjugate gradients it holds one, so the others are added from the number of iterations that ran.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from gnlin import quadratic_model
from gnlin.compare.tasks import Task
from gnlin.tree import Batch, Params


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Work of an optimiser's steps.

    Attributes:
        step: gradient-equivalents of a step that runs one CG iteration, or of one without a solve.
        product: gradient-equivalents of one more CG iteration; 0 where there is no solve.
    """

    step: float
    product: float = 0.0

    def of(self, steps: int, iterations: int) -> float:
        """Gradient-equivalents of `steps` steps with `iterations` CG iterations among them."""
        return steps * self.step + self.product * (iterations - steps)


def flops(compiled: Any) -> float:
    """Floating-point operations of a compiled function, a loop's body counted once."""
    analysis = compiled.cost_analysis()
    # Older versions of JAX return one dictionary for each computation.
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def gradient_flops(task: Task) -> float:
    """The unit: FLOPs of one value-and-gradient on one mini-batch."""
    return _flops(task.objective.value_and_grad, _params(task), _batch(task, task.batch_size))


def product_flops(task: Task, examples: int) -> float:
    """FLOPs of one GGN product on a linearisation that is at hand: what the second of two products adds."""

    def products(count: int) -> Callable[..., Any]:
        def apply(params, vector, batch):
            model = quadratic_model(task.objective, params, batch)
            for _ in range(count):
                vector = model.ggn(vector)
            return vector

        return apply

    params, batch = _params(task), _batch(task, examples)
    return _flops(products(2), params, params, batch) - _flops(products(1), params, params, batch)


def _flops(function: Callable[..., Any], *shapes: Any) -> float:
    return flops(jax.jit(function).lower(*shapes).compile())


def _params(task: Task) -> Params:
    return jax.eval_shape(task.init, jax.random.key(0))


def _batch(task: Task, examples: int) -> Batch:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((examples, *leaf.shape[1:]), leaf.dtype), task.train)
