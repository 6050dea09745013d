"""Dense references by another route: NumPy on materialised matrices, and plain loops.

The package multiplies by J, H and Jᵀ in turn. Here the Gauss-Newton matrix is instead the Hessian,
by nested reverse mode, of the loss on the linearised model, as a function of the raveled
parameters.
"""

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
    jacobian = jax.jacrev(outputs)(flat)
    at_anchor = outputs(flat)

    def loss(vector):
        moved = jax.tree.map(lambda z, j: z + j @ (vector - flat), at_anchor, jacobian)
        return objective.loss(moved, batch)

    return loss


def ggn_matrix(objective, params, batch) -> np.ndarray:
    """G (P, P): Hessian of the loss on the linearised model at the anchor."""
    flat, _, _ = raveled(objective, params, batch)
    return np.asarray(jax.jacrev(jax.jacrev(linearised_loss(objective, params, batch)))(flat))


def gradient(objective, params, batch) -> np.ndarray:
    flat, unravel, _ = raveled(objective, params, batch)
    return np.asarray(jax.grad(lambda vector: objective.value(unravel(vector), batch))(flat))


def iterative_linearisation(objective, inner, params, batches, period, *, quadratic=False):
    """The two nested loops, written as two loops: the iterates after each step, as flat vectors."""
    flat, _, _ = raveled(objective, params, batches[0])
    state, iterates, anchor = inner.init(flat), [], flat
    for count, batch in enumerate(batches):
        if count == 0 or (period and count % period == 0):
            anchor = flat
        _, unravel, _ = raveled(objective, params, batch)
        loss = linearised_loss(objective, unravel(anchor), batch)
        if quadratic:
            slope, curvature = jax.grad(loss)(anchor), jax.jacrev(jax.jacrev(loss))(anchor)
            grads = slope + curvature @ (flat - anchor)
        else:
            grads = jax.grad(loss)(flat)
        updates, state = inner.update(grads, state, flat)
        flat = optax.apply_updates(flat, updates)
        iterates.append(np.asarray(flat))
    return np.stack(iterates)


def normal(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))
