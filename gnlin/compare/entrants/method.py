"""How the comparison drives an optimiser, of whatever library."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import gnlin
from gnlin import Objective, tree
from gnlin.tree import Batch, Outputs, Params


def predict_with_network(objective: Objective, params: Params, state: Any, batch: Batch) -> Outputs:
    """Outputs of the network itself, which an optimiser without an anchor trains."""
    del state
    return objective.outputs_and_aux(params, batch)[0]


def predict_linearised(objective: Objective, params: Params, state: Any, batch: Batch) -> Outputs:
    """Outputs of the model that the last step trained, linearised where `state` holds an anchor.

    `gnlin.predict` goes over to the next model at the end of a cycle. A comparison judges the model
    that was trained.
    """
    try:
        anchor = gnlin.anchor(state)
    except ValueError:
        return predict_with_network(objective, params, state, batch)
    return gnlin.linearise(objective, tree.fill_holes(anchor, params), batch).predict(params)


class Method(NamedTuple):
    """An optimiser as functions of its own state.

    Attributes:
        init: (params, batch, key) ↦ state.
        step: (params, state, batch, key) ↦ (params, state).
        predict: (objective, params, state, batch) ↦ outputs of the model being trained.
        cycle: a run ends after a multiple of so many steps, where the budget allows for one.
        traced: whether `jax.jit` may trace `init` and `step`; their work is then counted. Otherwise
            they are called from Python.
        flops: FLOPs of a step that is not traced.
    """

    init: Callable[[Params, Batch, jax.Array], Any]
    step: Callable[[Params, Any, Batch, jax.Array], tuple[Params, Any]]
    predict: Callable[[Objective, Params, Any, Batch], Outputs] = predict_with_network
    cycle: int = 1
    traced: bool = True
    flops: float = 0.0


def from_optax(
    objective: Objective, tx: optax.GradientTransformation, makes_gradient: bool = False
) -> Method:
    """The training loop of every Optax transformation, those of gnlin among them.

    Args:
        objective: the problem.
        tx: the transformation.
        makes_gradient: whether it takes `None` for updates and makes the gradient itself, with its
            own linearisation. XLA does not merge two passes through a loop.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params, batch, key):
        del batch, key
        return tx.init(params)

    def step(params, state, batch, key):
        del key
        if makes_gradient:
            nothing: Any = None  # Optax's types know no updates of None
            updates, state = tx.update(nothing, state, params, batch=batch)
            return optax.apply_updates(params, updates), state
        value, grads = jax.value_and_grad(objective.value)(params, batch)
        extras = {"value": value, "grad": grads, "value_fn": objective.value, "batch": batch}
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state

    return Method(init, step, predict_linearised)
