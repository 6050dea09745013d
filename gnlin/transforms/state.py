"""Reading the state: anchors and metrics, from any nesting of Optax wrappers.

It comes after the update: `anchor` and `predict` read the state of `iterative_linearisation`, and
`metrics` those of all transforms of this package.
"""

import collections
from collections.abc import Iterator
from typing import Any

import jax

from gnlin.checks import check_restored
from gnlin.problem.linearisation import linearise
from gnlin.problem.objective import Objective, check_objective
from gnlin.transforms.drift import KernelDriftState
from gnlin.transforms.gauss_newton import GaussNewtonState, ScaleByGaussNewtonState
from gnlin.transforms.iterative_linearisation import (
    IterativeLinearisationState,
    LinearisedGradientsState,
    linearised_state,
    next_anchor,
)
from gnlin.transforms.levenberg_marquardt import LevenbergMarquardtState
from gnlin.transforms.prox_linear import ProxLinearState
from gnlin.tree import Batch, Outputs, Params
from gnlin.width.condition import SpectralConditionState

# Each has a field `metrics`.
_STATES = (
    GaussNewtonState,
    IterativeLinearisationState,
    KernelDriftState,
    LevenbergMarquardtState,
    LinearisedGradientsState,
    ProxLinearState,
    ScaleByGaussNewtonState,
    SpectralConditionState,
)


def anchor(opt_state: Any) -> Params:
    """The anchor φ that iterative linearisation holds in `opt_state`.

    Args:
        opt_state: any Optax state that contains one of this package, however nested.

    Returns:
        The parameters at which the model was last linearised; with the holes of `optax.masked`
        where the transform saw only part of the tree.

    Raises:
        ValueError: there is no anchor in `opt_state`, or more than one, or a state is there as a
            dictionary, from a checkpoint restored without its form.

    Example:
        >>> import gnlin, jax.numpy as jnp, optax
        >>> objective = gnlin.Objective.least_squares(lambda p: p ** 2)
        >>> tx = optax.chain(gnlin.linearise_gradients(objective, period=4), optax.adam(1e-3))
        >>> gnlin.anchor(tx.init(jnp.ones(2)))
        Array([1., 1.], dtype=float32)
    """
    check_restored(opt_state, _STATES)
    found = linearised_state(opt_state)
    if found is None:
        raise ValueError(
            "`opt_state` holds no anchor: it has no state of linearise_gradients or "
            "iterative_linearisation"
        )
    return found.anchor


def predict(objective: Objective, opt_state: Any, params: Params, batch: Batch = None) -> Outputs:
    r"""Outputs of the model *being trained*.

    That is :math:`f(\phi) + J(\phi)(\theta - \phi)` where `opt_state` holds an anchor φ that the
    next update will still use. At the end of a cycle, or without an anchor, it is the true model
    f(θ). It works under `jit`, and costs at most twice a forward pass and a little more.

    Args:
        objective: the problem.
        opt_state: any Optax state.
        params: θ.
        batch: data to predict on, for instance held out.

    Raises:
        ValueError: `opt_state` holds more than one anchor, or a state as a dictionary, from a
            checkpoint restored without its form; `batch` is missing.

    Example:
        >>> import gnlin, jax.numpy as jnp, optax
        >>> objective = gnlin.Objective.least_squares(lambda p: p ** 2)
        >>> tx = gnlin.linearise_gradients(objective, period=None)
        >>> _, state = tx.update(None, tx.init(jnp.ones(1)), jnp.ones(1))   # anchored at 1
        >>> gnlin.predict(objective, state, 2 * jnp.ones(1))                # 1 + 2 (2 − 1)
        Array([3.], dtype=float32)
    """
    check_objective(objective)
    check_restored(opt_state, _STATES)
    found = linearised_state(opt_state)
    if found is None:
        return objective.outputs_and_aux(params, batch)[0]
    # The anchor of the next update, which is θ itself at the end of a cycle.
    return linearise(objective, next_anchor(found, params), batch).predict(params)


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """All diagnostics in `opt_state`, flat and ready to log.

    Args:
        opt_state: any Optax state, however nested; works under `jit`.

    Returns:
        Dictionary of scalars, such as ``cg/iterations``, ``cg/residual``, ``damping``,
        ``gain_ratio``, ``accepted``, ``linearise/refreshes``; empty without a transform of this
        package. Where several transforms report the same name, the second is ``name/1``, and so on,
        in the order of the state.

    Raises:
        ValueError: a state is there as a dictionary, from a checkpoint restored without its form.

    Example:
        >>> import gnlin, jax.numpy as jnp, optax
        >>> objective = gnlin.Objective.least_squares(lambda p: p ** 2)
        >>> solve = gnlin.scale_by_gauss_newton(objective, damping=0.5)
        >>> tx = optax.chain(solve, optax.scale_by_learning_rate(1.0))
        >>> params = jnp.ones(2)
        >>> _, state = tx.update(None, tx.init(params), params)
        >>> {name: round(float(value), 6) for name, value in gnlin.metrics(state).items()}
        {'damping': 0.5, 'cg/iterations': 1.0, 'cg/residual': 0.0, 'cg/converged': 1.0}
    """
    check_restored(opt_state, _STATES)
    collected: dict[str, jax.Array] = {}
    seen = collections.Counter()
    for state in _states(opt_state):
        for name, value in state.metrics.items():
            collected[f"{name}/{seen[name]}" if seen[name] else name] = value
            seen[name] += 1
    return collected


def _states(node: Any) -> Iterator[Any]:
    """States of this package inside `node`, outer ones first."""
    # The search stops at a state of this package, and goes on in its fields: states may be nested.
    for found in jax.tree.leaves(node, is_leaf=lambda item: isinstance(item, _STATES)):
        if isinstance(found, _STATES):
            yield found
            for field in found:
                yield from _states(field)
