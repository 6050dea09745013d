"""How the comparison drives an optimiser, whatever library it comes from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from gnlin import Objective, metrics, predict
from gnlin.tree import Batch, Outputs, Params


def predict_with_network(objective: Objective, params: Params, state: Any, batch: Batch) -> Outputs:
    """Outputs of the model itself: what an optimiser trains that keeps no anchor."""
    del state
    return objective.outputs_and_aux(params, batch)[0]


class Method(NamedTuple):
    """An optimiser as functions of its own state.

    Attributes:
        init: (params, batch, key) ↦ state.
        step: (params, state, batch, key) ↦ (params, state).
        turns: state ↦ how often the step's inner loop (of CG, of a line search) turned, where that depends on the data;
            `None` where there is no such loop. XLA counts the body of a loop once, so turns beyond the first are added.
            Loops of a known length are found by themselves.
        turn_flops: () ↦ FLOPs of a turn.
        hidden_flops: FLOPs of a step that XLA does not see: LAPACK's, and where `step` is not traced all of them.
        predict: (objective, params, state, batch) ↦ outputs of the model being trained.
        traced: whether `init` and `step` may be traced by `jax.jit`; otherwise they are called from Python.
    """

    init: Callable[[Params, Batch, jax.Array], Any]
    step: Callable[[Params, Any, Batch, jax.Array], tuple[Params, Any]]
    turns: Callable[[Any], jax.typing.ArrayLike | None] = lambda state: None
    turn_flops: Callable[[], float] = lambda: 0.0
    hidden_flops: float = 0.0
    predict: Callable[[Objective, Params, Any, Batch], Outputs] = predict_with_network
    traced: bool = True


def from_optax(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    turn_flops: Callable[[], float] = lambda: 0.0,
    hidden_flops: float = 0.0,
) -> Method:
    """The one training loop that serves every Optax transformation, gnlin's among them."""
    tx = optax.with_extra_args_support(tx)

    def init(params, batch, key):
        del batch, key
        return tx.init(params)

    def step(params, state, batch, key):
        del key
        value, grads = jax.value_and_grad(objective.value)(params, batch)
        extras = {"value": value, "grad": grads, "value_fn": objective.value, "batch": batch}
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state

    return Method(
        init,
        step,
        turns=lambda state: metrics(state).get("cg/steps"),
        turn_flops=turn_flops,
        hidden_flops=hidden_flops,
        predict=lambda other, params, state, batch: predict(other, state, params, batch),
    )
