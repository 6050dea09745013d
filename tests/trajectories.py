"""Runs of the package beside those of the references, and their comparison."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from problems import tolerance
from references.dense import Dense

import gnlin

# A step solves systems of condition 10³ to 10⁴, and ten steps hand their roundings on.
CLOSE = tolerance(jnp.float64, scale=1e6)


def follow(tx, objective, params, steps, *, hidden=(), given=False):
    """Flat parameters and all metrics after each step of `tx`, which is compiled once.

    Args:
        steps: ``(batch, further arguments)`` of each.
        hidden: leaves that `tx` does not see; left out of the parameters returned.
        given: whether `tx` is handed the gradient, or computes it.
    """
    if hidden:
        labels = {name: "hidden" if name in hidden else "seen" for name in params}
        tx = optax.partition({"seen": tx, "hidden": optax.set_to_zero()}, labels)

    @jax.jit
    def step(params, state, batch, extra):
        updates = jax.grad(objective.value)(params, batch) if given or hidden else None
        extra = {"all_params": params, **extra} if hidden else extra
        updates, state = tx.update(updates, state, params, batch=batch, **extra)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    state, visited = tx.init(params), []
    for batch, extra in steps:
        params, state = step(params, state, batch, extra)
        visited.append((ravel_pytree(parted(params, hidden)[0])[0], gnlin.metrics(state)))
    return jax.device_get(visited)


def parted(params, hidden):
    """``(leaves that are seen, leaves that are hidden)``."""
    seen = {name: leaf for name, leaf in params.items() if name not in hidden}
    return seen, {name: params[name] for name in hidden}


@functools.cache
def compiled(network, loss, hidden=()):
    """A network under a loss, for the reference; compiled once for all cases."""
    return Dense(gnlin.Objective(network.model, loss), *parted(network.params, hidden))


def check(found, expected, close=CLOSE):
    """The same metrics and the same parameters after each step."""
    for count, ((params, metrics), record) in enumerate(zip(found, expected, strict=True)):
        where = f"of step {count}"
        assert set(metrics) == set(record.metrics), where
        for name, value in metrics.items():
            expect = record.metrics[name]
            np.testing.assert_allclose(value, expect, err_msg=f"{name} {where}", **close)
        np.testing.assert_allclose(params, record.params, err_msg=f"params {where}", **close)


def table(*values):
    """A schedule, for the package and for the reference."""
    return lambda count: values[count] if isinstance(count, int) else jnp.asarray(values)[count]
