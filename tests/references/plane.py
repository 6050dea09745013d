"""How far to go along −d and along the last step p: the minimum over α and β of the damped model.

    φ(w) = ℓ(z + JDw) − ℓ(z) + (u − ∇ℓ)ᵀDw + λ/2 ‖Dw‖²,   D = (−d, p),   w = (α, β),

with d the solver's direction, u the incoming updates and ∇ℓ = Jᵀ∇ℓ(z). Without momentum D = (−d).
The quadratic model has ∇ℓ(z)ᵀm + ½ mᵀHm, m = JDw, in place of ℓ(z + m) − ℓ(z).
"""

from typing import Any

import numpy as np

from references.damping import EPS
from references.dense import Dense, Point


class Plane:
    """φ, its slope and its Hessian as functions of w."""

    def __init__(
        self,
        problem: Dense,
        batch: Any,
        point: Point,
        directions: list[np.ndarray],
        updates: np.ndarray,
        damping: float,
        loss_model: str,
    ):
        self.problem, self.batch, self.point, self.loss_model = problem, batch, point, loss_model
        self.directions = np.stack(directions, axis=1)  # D, (P, 1 or 2)
        self.moved = point.jacobian @ self.directions  # JD
        self.tilt = self.directions.T @ (updates - point.gradient)  # Dᵀ(u − ∇ℓ)
        self.damping = damping * self.directions.T @ self.directions  # λDᵀD

    def change(self, w: np.ndarray) -> float:
        """The model's change of the loss, damping aside."""
        return self._loss(w)[0] + self.tilt @ w

    def derivatives(self, w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """``(φ, ∇φ, ∇²φ)``."""
        value, slope, hessian = self._loss(w)
        return (
            value + self.tilt @ w + w @ self.damping @ w / 2,
            self.moved.T @ slope + self.tilt + self.damping @ w,
            self.moved.T @ hessian @ self.moved + self.damping,
        )

    def _loss(self, w):
        """The modelled ℓ(z + m) − ℓ(z), its gradient in the outputs and its Hessian."""
        here, m = self.point.loss, self.moved @ w
        if self.loss_model == "quadratic":
            curved = here.hessian @ m
            return here.slope @ m + m @ curved / 2, here.slope + curved, here.hessian
        there = self.problem.loss(self.point.outputs + m, self.batch)
        return there.value - here.value, there.slope, there.hessian


def newton_step(slope: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """−(∇²φ)⁻¹∇φ; 0 along a direction that is zero."""
    # In units of its diagonal the matrix is well conditioned, however long the directions are.
    scale = np.sqrt(np.where(np.diag(hessian) > 0, np.diag(hessian), 1))
    return -np.linalg.pinv(hessian / np.outer(scale, scale), rcond=1e-14) @ (slope / scale) / scale


def best_weights(plane: Plane, evaluations: int = 10) -> np.ndarray:
    """w by Newton's method from zero: one step for the quadratic model, whose minimum is there.

    A step that leads up is quartered. A further step promises a gain of half of ∇φᵀ(∇²φ)⁻¹∇φ. The
    end is where this number is at most a thousandth of the gain so far, or after ten evaluations.
    """
    w, value = np.zeros(plane.directions.shape[1]), 0.0
    _, slope, hessian = plane.derivatives(w)
    step, length = newton_step(slope, hessian), 1.0
    if plane.loss_model == "quadratic":
        return step
    for _ in range(evaluations - 1):
        if -slope @ step <= 1e-3 * abs(value):
            break
        trial = w + length * step
        new_value, new_slope, new_hessian = plane.derivatives(trial)
        if new_value <= value + 8 * EPS * abs(plane.point.loss.value):
            w, value, slope, length = trial, new_value, new_slope, 1.0
            step = newton_step(slope, new_hessian)
        else:
            length /= 4
    return w


def shortfall(plane: Plane, w: np.ndarray) -> float:
    """How far φ(w) is above the minimum of φ, by Newton's method to the end; relative."""
    at_w, slope, hessian = plane.derivatives(w)
    least = at_w
    for _ in range(50):
        step = newton_step(slope, hessian)
        while plane.derivatives(w + step)[0] > least and np.linalg.norm(step) > EPS:
            step = step / 2
        w = w + step
        value, slope, hessian = plane.derivatives(w)
        if abs(value - least) <= 4 * EPS * abs(least):
            break
        least = value
    return (at_w - least) / abs(least) if least else 0.0
