"""Loss and quality of the model being trained, and of the network at the same parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gnlin import Objective
from gnlin.compare.entrants.method import Method
from gnlin.compare.tasks.task import Task

MEASURES = ("loss", "quality", "network_loss", "network_quality")

# More examples than `_WHOLE` are evaluated in pieces that stay in the cache.
_WHOLE, _PIECE = 2048, 256


def measures(task: Task, method: Method) -> Callable[..., tuple[jax.Array, ...]]:
    """A function of ((params, state), training data, held-out data) that returns the `MEASURES`."""

    def measured(trained, train, held_out):
        params, state = trained

        def judged(objective: Objective, data):
            outputs = method.predict(objective, params, state, data)
            return jnp.stack([objective.loss_of(outputs, data), objective.value(params, data)])

        def of_loss(data):
            return judged(task.objective, data)

        def of_quality(data):
            return judged(task.quality.objective, data)

        loss, network_loss = _mean(task, of_loss, train)
        quality, network_quality = _mean(task, of_quality, held_out)
        return loss, quality, network_loss, network_quality

    return measured


def _mean(task: Task, function: Callable[[Any], jax.Array], data: Any) -> jax.Array:
    """``function(data)``, a mean over examples where there are mini-batches, then in pieces."""
    size = len(jax.tree.leaves(data)[0])
    if task.batch_size is None or size <= _WHOLE:
        return function(data)
    whole = size - size % _PIECE
    pieces = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, _PIECE, *leaf.shape[1:]), data)
    total = _PIECE * jax.lax.map(function, pieces).sum(axis=0)
    if whole < size:
        rest = jax.tree.map(lambda leaf: leaf[whole:], data)
        total += (size - whole) * function(rest)
    return total / size
