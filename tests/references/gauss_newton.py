"""`gnlin.gauss_newton` from its documentation, as one loop.

d ← M⁻¹u                                             the factors and G at the curvature batch
δ ← η (−αd + βp),  (α, β) = argmin φ                 in the plane of d and of the last step p
ρ ← (ℓ(θ) − ℓ(θ + δ)) / −(the model's change by δ)   ℓ on the batch
p ← δ if ρ > accept, else 0
θ ← θ + p
λ ← Nielsen's rule, or the next given value
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from references.damping import Adaptive, Nielsen, gain_ratio
from references.dense import Dense
from references.kronecker import Kronecker, join, split
from references.plane import Plane, best_weights, shortfall

DEFAULT = Adaptive(1e-2, minimum=1e-3)
ACCEPT = 1e-4  # where λ is given


class Step(NamedTuple):
    """The data of one step."""

    batch: Any
    curvature_batch: Any = None  # None: the batch


class Record(NamedTuple):
    params: np.ndarray  # after the step
    metrics: dict[str, Any]
    shortfall: float  # of the weights in the plane


NO_STEP = {
    "kronecker/finite": False,
    "subspace/length": 0.0,
    "subspace/momentum": 0.0,
    "gain_ratio": -math.inf,
    "accepted": False,
}


def gauss_newton(
    problem: Dense,
    kronecker: Kronecker,
    steps: Iterable[Step],
    *,
    learning_rate: float | Callable[[int], float] = 1.0,
    damping: Adaptive | float | Callable[[int], float] = DEFAULT,
    incoming: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda gradient, theta: gradient,
    momentum: bool = True,
    loss_model: str = "exact",
    max_norm: float | None = None,
) -> list[Record]:
    """`incoming` takes the gradient and θ to the updates u."""
    theta, last, records = problem.start, np.zeros_like(problem.start), []
    adaptive = damping if isinstance(damping, Adaptive) else None
    nielsen = Nielsen(adaptive.initial) if adaptive else None
    for count, (batch, curvature_batch) in enumerate(steps):
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        strength = nielsen.damping if nielsen else damping(count) if callable(damping) else damping
        point = problem.at(theta, batch)
        value = point.loss.value
        if not math.isfinite(value):
            # Such a batch says nothing of λ or of the factors, and the last step was none.
            last = np.zeros_like(theta)
            records.append(Record(theta, NO_STEP | {"damping": strength, "loss": value}, 0.0))
            continue

        updates = incoming(point.gradient, theta)
        data, curved = batch, point
        if curvature_batch is not None:
            data, curved = curvature_batch, problem.at(theta, curvature_batch)
        leaves = {name: np.asarray(leaf) for name, leaf in problem.unravel(theta).items()}
        rhs = split(updates, leaves)
        params = {**problem.fixed, **leaves}
        direction = join(kronecker.direction(params, data, curved, strength, rhs))

        directions = [-direction, last] if momentum else [-direction]
        plane = Plane(problem, data, curved, directions, updates, strength, loss_model)
        best = best_weights(plane)
        weights = rate * best
        length = np.linalg.norm(plane.directions @ weights)
        if max_norm is not None and length > max_norm:
            weights = weights * max_norm / length
        step = plane.directions @ weights

        ratio = gain_ratio(value, problem.value(theta + step, batch), plane.change(weights), step)
        accepted = bool(ratio > (adaptive.accept if adaptive else ACCEPT))
        metrics = {
            "damping": strength,
            "kronecker/finite": True,
            "subspace/length": weights[0],
            "subspace/momentum": weights[1] if momentum else 0.0,
            "gain_ratio": ratio,
            "accepted": accepted,
            "loss": value,
        }
        # A rate of zero says nothing about λ.
        if nielsen and rate != 0:
            nielsen = nielsen.after(ratio, adaptive)
        last = step if accepted else np.zeros_like(step)
        theta = theta + last
        records.append(Record(theta, metrics, shortfall(plane, best)))
    return records
