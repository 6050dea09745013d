"""How λ and the radius follow the gain ratio: the tables of Nielsen and of Moré."""

import math
from typing import NamedTuple

import numpy as np

EPS = float(np.finfo(np.float64).eps)


def gain_ratio(value: float, new_value: float, change: float, step: np.ndarray) -> float:
    """ρ = (ℓ(θ) − ℓ(θ + δ)) / −(the model's change by δ); −∞ where there is none."""
    actual, predicted = value - new_value, -change
    # Both are below the rounding errors of the loss, which then says nothing against a step.
    finest = 8 * EPS * abs(value)
    if abs(actual) <= finest and abs(predicted) <= finest and np.any(step):
        return 1.0
    if not math.isfinite(actual) or not predicted > 0:
        return -math.inf
    return actual / predicted


class Adaptive(NamedTuple):
    """λ that follows the gain ratio."""

    initial: float
    accept: float = 1e-4
    minimum: float = 1e-20
    maximum: float = 1e20


class Nielsen(NamedTuple):
    """Nielsen, Damping parameter in Marquardt's method, IMM-REP-1999-05, equation (2.4).

    ============  ==========================  ====
    gain ratio    λ                           ν
    ============  ==========================  ====
    ρ > accept    λ max(1/3, 1 − (2ρ − 1)³)   2
    otherwise     λν                          2ν
    ============  ==========================  ====
    """

    damping: float  # λ of the next step
    growth: float = 2.0  # ν

    def after(self, ratio: float, policy: Adaptive) -> "Nielsen":
        if ratio > policy.accept:
            damping, growth = self.damping * max(1 / 3, 1 - (2 * ratio - 1) ** 3), 2.0
        else:
            damping, growth = self.damping * self.growth, 2 * self.growth
        return Nielsen(min(max(damping, policy.minimum), policy.maximum), growth)


class Outcome(NamedTuple):
    """A step that was tried."""

    ratio: float
    change: float  # ℓ(θ + δ) − ℓ(θ)
    slope: float  # s = ∇ℓᵀδ, negative
    length: float  # ‖D^½ v‖ of the step before its acceleration
    radius: float  # Δ that bounded it


def more(outcome: Outcome, *, first: bool) -> float:
    """The next Δ, by step (c) of Moré 1978, section 5.

    ==================================  ===============================================
    gain ratio                          Δ
    ==================================  ===============================================
    ρ ≤ 1/4, or none                    max(1/10, ½ s/(s − max(c, 0))) min(Δ, 10 ‖D^½v‖)
    ρ ≥ 3/4, or the step ended inside   2 ‖D^½v‖
    otherwise                           Δ
    ==================================  ===============================================

    with c the change of the loss. The first Δ is no longer than the first step.
    """
    ratio, change, slope, length, radius = outcome
    inside = length < 0.99 * radius
    if first:
        radius = min(radius, length)
    if not ratio > 0.25:
        factor = 0.5 * slope / (slope - max(change, 0.0))
        factor = max(factor, 0.1) if math.isfinite(factor) else 0.1
        return factor * min(radius, 10 * length)
    return 2 * length if ratio >= 0.75 or inside else radius
