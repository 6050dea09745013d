"""Dense references by another route: NumPy on materialised matrices, and plain loops.

The package multiplies by J, H and Jᵀ in turn. Here the Gauss-Newton matrix is instead the Hessian,
by nested reverse mode, of the loss on the linearised model, as a function of the raveled
parameters. Each reference is compiled as one program: one operation at a time takes far longer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree


def raveled(objective, params, batch):
    """``(flat parameters, unravel, flat -> outputs)``."""
    flat, unravel = ravel_pytree(params)
    return flat, unravel, lambda vector: objective.outputs_and_aux(unravel(vector), batch)[0]


def linearised_loss(objective, anchor, batch):
    """Flat parameters ↦ ℓ(f(φ) + J(φ)(θ − φ)), J materialised by reverse mode."""
    flat, _, outputs = raveled(objective, anchor, batch)

    @jax.jit
    def loss(vector):
        jacobian = jax.jacrev(outputs)(flat)
        moved = jax.tree.map(lambda z, j: z + j @ (vector - flat), outputs(flat), jacobian)
        return objective.loss(moved, batch)

    return loss


def ggn_matrix(objective, params, batch) -> np.ndarray:
    """G (P, P): Hessian of the loss on the linearised model at the anchor."""
    return np.asarray(_ggn_matrix(objective, params, batch))


@functools.partial(jax.jit, static_argnums=0)
def _ggn_matrix(objective, params, batch):
    flat, _, _ = raveled(objective, params, batch)
    return jax.jacrev(jax.jacrev(linearised_loss(objective, params, batch)))(flat)


def gradient(objective, params, batch) -> np.ndarray:
    return np.asarray(_gradient(objective, params, batch))


@functools.partial(jax.jit, static_argnums=0)
def _gradient(objective, params, batch):
    flat, unravel, _ = raveled(objective, params, batch)
    return jax.grad(lambda vector: objective.value(unravel(vector), batch))(flat)


def iterative_linearisation(objective, inner, params, batches, period, *, quadratic=False):
    """The two nested loops, written as two loops: the iterates after each step, as flat vectors."""
    flat, _, _ = raveled(objective, params, batches[0])
    state, iterates, anchor = inner.init(flat), [], flat
    for count, batch in enumerate(batches):
        if count == 0 or (period and count % period == 0):
            anchor = flat
        flat, state = _step(objective, inner, quadratic, params, flat, state, anchor, batch)
        iterates.append(np.asarray(flat))
    return np.stack(iterates)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(objective, inner, quadratic, like, flat, state, anchor, batch):
    _, unravel = ravel_pytree(like)
    loss = linearised_loss(objective, unravel(anchor), batch)
    if quadratic:
        slope, curvature = jax.grad(loss)(anchor), jax.jacrev(jax.jacrev(loss))(anchor)
        grads = slope + curvature @ (flat - anchor)
    else:
        grads = jax.grad(loss)(flat)
    updates, state = inner.update(grads, state, flat)
    return optax.apply_updates(flat, updates), state


def normal(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))
