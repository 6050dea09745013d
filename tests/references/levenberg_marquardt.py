"""`gnlin.levenberg_marquardt` from its documentation, as one loop.

(G + λD) v = −∇ℓ(θ),   D = I, or the largest diagonal of G so far
(G + λD) a = −JᵀH ∂²f[v, v]
δ ← v + ½a where 2‖a‖/‖v‖ is small enough, else v
ρ ← (ℓ(θ) − ℓ(θ + δ)) / −(∇ℓᵀδ + ½ δᵀGδ)
θ ← θ + δ if ρ > accept, else θ
λ by Nielsen's rule, or the least λ with ‖D^½ v‖ ≤ Δ, where Δ follows Moré's rule
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from references.damping import EPS, Adaptive, Nielsen, Outcome, gain_ratio, more
from references.dense import Dense, Point


class Radius(NamedTuple):
    """λ from a radius; the first is in units of ‖D^½θ‖."""

    first: float = 1.0
    accept: float = 1e-4


class Record(NamedTuple):
    params: np.ndarray  # after the step
    metrics: dict[str, Any]


def levenberg_marquardt(
    problem: Dense,
    batches: Iterable[Any],
    policy: Adaptive | Radius,
    *,
    scaling: str = "identity",
    geodesic_acceleration: float | None = None,
) -> list[Record]:
    theta, records, rejections = problem.start, [], 0
    largest = np.zeros_like(theta)
    nielsen = Nielsen(policy.initial) if isinstance(policy, Adaptive) else None
    radius = None  # before the first step
    for batch in batches:
        point = problem.at(theta, batch)
        gradient, curvature, value = point.gradient, point.curvature, point.loss.value
        largest = np.maximum(largest, np.diag(curvature))
        # A parameter without influence so far is damped as if its diagonal were 1.
        marquardt = np.where(largest > 0, largest, 1.0)
        scale = marquardt if scaling == "marquardt" else np.ones_like(theta)
        metrics: dict[str, Any] = {"loss": value}

        if nielsen:
            strength = nielsen.damping
        else:
            size = np.linalg.norm(np.sqrt(scale) * theta)
            metrics["radius"] = policy.first * (size or 1.0) if radius is None else radius
            strength = damping_within(curvature, scale, gradient, metrics["radius"])
        velocity = -solve(point, strength * scale, point.loss.slope)
        step = velocity
        if geodesic_acceleration is not None:
            bend = problem.bend(theta, velocity, batch)
            acceleration = -solve(point, strength * scale, point.loss.hessian @ bend)
            metrics["acceleration"] = 2 * np.linalg.norm(acceleration) / np.linalg.norm(velocity)
            if metrics["acceleration"] <= geodesic_acceleration:
                step = velocity + acceleration / 2

        change = problem.value(theta + step, batch) - value
        slope = gradient @ step
        ratio = gain_ratio(value, value + change, slope + step @ curvature @ step / 2, step)
        accepted = bool(ratio > policy.accept)
        rejections = 0 if accepted else rejections + 1
        metrics |= {
            "damping": strength,
            "gain_ratio": ratio,
            "accepted": accepted,
            "rejections": rejections,
        }
        if nielsen:
            nielsen = nielsen.after(ratio, policy)
        else:
            length = np.linalg.norm(np.sqrt(scale) * velocity)
            outcome = Outcome(ratio, change, slope, length, metrics["radius"])
            radius = more(outcome, first=radius is None)
        theta = theta + step if accepted else theta
        records.append(Record(theta, metrics))
    return records


def solve(point: Point, damping: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
    """x of (JᵀHJ + diag(damping)) x = Jᵀc, as the minimum of ‖H^½Jx − H^-½c‖² + ‖damping^½ x‖².

    Least squares do not square the condition of J. H has to be positive definite.
    """
    eigenvalues, vectors = np.linalg.eigh(point.loss.hessian)
    root, inverse = (vectors * eigenvalues**power @ vectors.T for power in (0.5, -0.5))
    matrix = np.concatenate([root @ point.jacobian, np.diag(np.sqrt(damping))])
    target = np.concatenate([inverse @ cotangent, np.zeros(len(damping))])
    return np.linalg.lstsq(matrix, target, rcond=None)[0]


def damping_within(
    curvature: np.ndarray, scale: np.ndarray, gradient: np.ndarray, radius: float
) -> float:
    """The least λ with ‖D^½ v‖ ≤ Δ, and no less than ε times the largest eigenvalue of Ĝ.

    With w = D^½ v and Ĝ = D^-½ G D^-½, (Ĝ + λI) w = −D^-½ ∇ℓ. Newton's method for 1/Δ = 1/‖w(λ)‖
    starts left of the solution. When ‖w‖ is Δ to five digits it takes one step more. Moré 1978,
    equation (5.4).
    """
    root = np.sqrt(scale)
    eigenvalues, vectors = np.linalg.eigh(curvature / np.outer(root, root))
    eigenvalues = np.maximum(eigenvalues, 0)
    coefficients = vectors.T @ (gradient / root)

    def length_and_next(damping):
        length = np.linalg.norm(coefficients / (eigenvalues + damping))
        derivative = -np.sum(coefficients**2 / (eigenvalues + damping) ** 3) / length
        return length, damping + (1 - length / radius) * length / derivative

    least = EPS * eigenvalues[-1]
    length, following = length_and_next(least)
    while length > radius * (1 + 1e-5):
        length, following = length_and_next(following)
    damping = max(following, least)
    assert damping == least or abs(length_and_next(damping)[0] / radius - 1) < 1e-9
    return damping
