"""Iterative linearisation and prox-linear steps from their documentation, as plain loops.

Q(θ) = ℓ(f(φ) + J(φ)(θ − φ)),   or the second-order expansion of ℓ at f(φ) in its place
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from references.dense import Dense


class Linearised(NamedTuple):
    """Q at some parameters."""

    value: float
    gradient: np.ndarray
    moved: np.ndarray  # J(φ)(θ − φ)


class Record(NamedTuple):
    params: np.ndarray  # after the step
    metrics: dict[str, Any]


def q_around(problem: Dense, anchor: np.ndarray, batch: Any, loss_model: str):
    """θ ↦ Q(θ) and its gradient, for an anchor φ."""
    point = problem.at(anchor, batch)

    def q(theta: np.ndarray) -> Linearised:
        moved = point.jacobian @ (theta - anchor)
        if loss_model == "exact":
            loss = problem.loss(point.outputs + moved, batch)
            return Linearised(loss.value, point.jacobian.T @ loss.slope, moved)
        curved = point.loss.hessian @ moved
        value = point.loss.value + point.loss.slope @ moved + moved @ curved / 2
        return Linearised(value, point.jacobian.T @ (point.loss.slope + curved), moved)

    return q


# Optimisers of the linearised problem.


class Inner:
    """``step(q, θ)`` is added to θ; `q` is Q as a function."""

    def reset(self) -> None: ...

    def step(self, q: Callable[[np.ndarray], Linearised], theta: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class HeavyBall(Inner):
    """m ← μm + ∇Q, and a step of −ηm."""

    def __init__(self, rate: float, momentum: float):
        self.rate, self.momentum = rate, momentum

    def reset(self):
        self.velocity = 0.0

    def step(self, q, theta):
        self.velocity = self.momentum * self.velocity + q(theta).gradient
        return -self.rate * self.velocity


# Iterative linearisation.


class Gap(NamedTuple):
    """A period that ends when the relative gap was above the limit `patience` times in a row.

    The gap is ‖f(θ) − f_lin(θ)‖ / ‖J(φ)(θ − φ)‖, and is checked after `every` updates.
    """

    limit: float
    patience: int = 2
    every: int = 1
    longest: int | None = None


Period = int | None | Callable[[int], float] | Gap


def updates_of_a_cycle(period: Period, count: int) -> float:
    """How many updates an anchor serves that is moved at this count."""
    if isinstance(period, Gap):
        period = period.longest
    if period is None:
        return np.inf
    return max(round(float(period(count))), 1) if callable(period) else period


def iterative_linearisation(
    problem: Dense,
    inner: Inner,
    batches: Iterable[Any],
    period: Period,
    *,
    loss_model: str = "exact",
    reset_inner: bool = False,
    line_search: tuple[float, ...] | None = None,
) -> list[Record]:
    theta, records = problem.start, []
    anchor, refreshes, age, left = theta, 0, 0, 0  # left: updates that φ still serves
    gap, exceeded, alpha = 0.0, 0, 0.0
    inner.reset()
    for count, batch in enumerate(batches):
        age, left = age + 1, left - 1
        if left < 0:  # a cycle starts
            anchor, refreshes, age = theta, refreshes + 1, 0
            left = updates_of_a_cycle(period, count) - 1
            gap, exceeded = 0.0, 0
            if reset_inner:
                inner.reset()

        q = q_around(problem, anchor, batch, loss_model)
        here = q(theta)
        if isinstance(period, Gap) and age and age % period.every == 0:
            off = problem.outputs(theta, batch) - problem.outputs(anchor, batch) - here.moved
            gap = np.linalg.norm(off) / np.linalg.norm(here.moved)
            exceeded = exceeded + 1 if gap > period.limit else 0
            left = 0 if exceeded >= period.patience else left

        step = inner.step(q, theta)
        if line_search and left == 0:
            # The best of φ + α(θ + step − φ) on the true loss.
            fractions = (0.0, *line_search)
            ends = [anchor + fraction * (theta + step - anchor) for fraction in fractions]
            best = int(np.argmin([problem.value(end, batch) for end in ends]))
            step, alpha = ends[best] - theta, fractions[best]
        theta = theta + step

        metrics = {"linearise/loss": here.value}
        metrics |= {"linearise/refreshes": refreshes, "linearise/age": age}
        if isinstance(period, Gap):
            metrics["linearise/gap"] = gap
        if line_search:
            metrics["line_search/alpha"] = alpha
        records.append(Record(theta, metrics))
    return records


def layers_linearised(
    problem: Dense,
    inner: Inner,
    batches: Iterable[Any],
    periods: dict[str, Period],
    labels: list[str],
    *,
    loss_model: str = "exact",
) -> list[Record]:
    """Each label has an anchor of its own; leaves of period 1 are not linearised.

    With a the numbers that are linearised and b the others,

        Q(a, b) = ℓ(f(φ, b) + ∂f/∂a(φ, b) (a − φ)).

    `labels` has the label of each number of θ.
    """
    theta, records = problem.start, []
    anchor, of = theta, np.asarray(labels)
    exact = np.isin(of, [label for label, period in periods.items() if period == 1])
    refreshes, age, left = (dict.fromkeys(periods, 0) for _ in range(3))
    value_and_grad = jax.jit(jax.value_and_grad(_partly_linearised(problem, exact, loss_model)))
    inner.reset()
    for count, batch in enumerate(batches):
        for label, period in periods.items():
            age[label], left[label] = age[label] + 1, left[label] - 1
            if left[label] < 0:
                anchor = np.where(of == label, theta, anchor)
                refreshes[label], age[label] = refreshes[label] + 1, 0
                left[label] = updates_of_a_cycle(period, count) - 1

        def q(theta, anchor=anchor, batch=batch):
            value, gradient = value_and_grad(theta, anchor, batch)
            return Linearised(float(value), np.asarray(gradient), np.nan)

        metrics = {"linearise/loss": q(theta).value}
        metrics |= {f"linearise/refreshes/{label}": refreshes[label] for label in periods}
        metrics |= {f"linearise/age/{label}": age[label] for label in periods}
        theta = theta + inner.step(q, theta)
        records.append(Record(theta, metrics))
    return records


def _partly_linearised(problem: Dense, exact: np.ndarray, loss_model: str):
    """(θ, φ, batch) ↦ Q, a traced function."""

    def q(theta, anchor, batch):
        at = jnp.where(exact, theta, anchor)  # (φ, b)
        outputs = problem.flat_model(at, batch)
        # In θ − (φ, b) only a is not zero.
        moved = jax.jacfwd(problem.flat_model)(at, batch) @ (theta - at)
        if loss_model == "exact":
            return problem.flat_loss(outputs + moved, batch)
        slope = jax.grad(problem.flat_loss)(outputs, batch)
        hessian = jax.hessian(problem.flat_loss)(outputs, batch)
        return problem.flat_loss(outputs, batch) + slope @ moved + moved @ hessian @ moved / 2

    return q


# Prox-linear steps.


def prox_linear(
    problem: Dense, inner: Inner, batches: Iterable[Any], steps: int, *, loss_model: str = "exact"
) -> list[Record]:
    """All the steps on Q inside one update, from θ = φ; the inner optimiser starts afresh."""
    theta, records = problem.start, []
    for batch in batches:
        q, values = q_around(problem, theta, batch, loss_model), []
        inner.reset()
        for _ in range(steps):
            values.append(q(theta).value)
            theta = theta + inner.step(q, theta)
        records.append(Record(theta, {"prox/loss": values[0], "prox/linearised_loss": values[-1]}))
    return records
