"""The end of a cycle: the best point on the way from the anchor to the parameters.

`iterative_linearisation` calls `best_along` at the last update of a cycle. The result is the update
of the chain.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.problem.objective import Objective
from gnlin.tree import Batch, Params


def check_line_search(line_search: Any) -> tuple[float, ...] | None:
    if line_search is None:
        return None
    # A string is a sequence, too.
    if isinstance(line_search, str) or not isinstance(line_search, Iterable):
        raise TypeError(
            "`line_search` must be a sequence of step fractions such as (1.0, 0.5); got "
            f"{line_search!r}"
        )
    alphas = tuple(float(alpha) for alpha in line_search)
    if not alphas or not all(0 < alpha < float("inf") for alpha in alphas):
        raise ValueError(
            "`line_search` must be a non-empty sequence of positive step fractions; got "
            f"{line_search!r}"
        )
    return alphas


def best_along(
    objective: Objective,
    anchor: Params,
    params: Params,
    updates: Params,
    alphas: Sequence[float],
    batch: Batch,
) -> tuple[Params, jax.Array]:
    """``(updates, α)`` to the best φ + α(θ' − φ), θ' = params + updates, on the true loss.

    The losses are those at the parameters to which the rounded updates lead. α = 0 is φ itself,
    without a product with a direction that may be infinite.
    """
    direction = tree.subtract(tree.add(params, updates), anchor)
    # The first candidate is φ: another one must be better than where the cycle began.
    best, best_alpha = tree.subtract(anchor, params), jnp.asarray(0.0, float)
    lowest = objective.value(tree.add(params, best), batch)
    for alpha in alphas:
        # An update is a difference from θ, so candidates from φ are turned into those.
        candidate = tree.subtract(tree.add_scaled(anchor, alpha, direction), params)
        loss = objective.value(tree.add(params, candidate), batch)
        better = loss < lowest  # false for NaN; among equals the first stays
        found = candidate, jnp.asarray(alpha, float), loss
        best, best_alpha, lowest = tree.select(better, found, (best, best_alpha, lowest))
    return best, best_alpha
