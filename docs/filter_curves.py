"""Measure the two filters of the mathematics page with gnlin, check them, and draw them.

    python docs/filter_curves.py [FILE.svg]

The check compares them with their formulas.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gnlin

RATE = 1.0  # η; the largest σ is 1, so ησ² ≤ 1
PERIODS = (4, 64)
SINGULAR_VALUES = np.logspace(-2.5, 0, 11)


class Filters(NamedTuple):
    """The factor for each singular direction that turns the gradient into a step."""

    steps: np.ndarray  # of K gradient steps on the linearised model
    damped: np.ndarray  # of one damped Gauss-Newton step, λ = 1/(ηK)


def formulas(period: int, sigma: np.ndarray) -> Filters:
    # expm1 and log1p: 1 − (1 − ησ²)^K without cancellation for small σ.
    with np.errstate(divide="ignore"):
        fitted = -np.expm1(period * np.log1p(-RATE * sigma**2))
    return Filters(fitted / sigma**2, 1 / (sigma**2 + 1 / (RATE * period)))


def orthogonal(seed: int, size: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def measured(period: int) -> Filters:
    """Read both filters off the steps of gnlin from one anchor of a nonlinear model, in float64."""
    left, right, bend = (orthogonal(seed, len(SINGULAR_VALUES)) for seed in range(3))
    jacobian = jnp.asarray(left * SINGULAR_VALUES @ right.T)
    target = jnp.asarray(left.sum(axis=1))
    # The quadratic term has no derivative at the anchor θ = 0, where J is `jacobian`; elsewhere the
    # model bends.
    objective = gnlin.Objective.least_squares(
        lambda p: jacobian @ p + (jnp.asarray(bend) @ p) ** 2 - target
    )
    anchor = jnp.zeros(len(SINGULAR_VALUES))
    gradient = objective.value_and_grad(anchor)[1]

    def factors(tx, steps):
        params, state = anchor, tx.init(anchor)
        update = jax.jit(tx.update)
        for _ in range(steps):
            updates, state = update(None, state, params)
            params = optax.apply_updates(params, updates)
        return np.asarray(right.T @ (params - anchor)) / -np.asarray(right.T @ gradient)

    cycle = optax.chain(gnlin.linearise_gradients(objective, period), optax.sgd(RATE))
    damped = optax.chain(
        gnlin.scale_by_gauss_newton(objective, 1 / (RATE * period), solver=gnlin.Dense()),
        optax.scale_by_learning_rate(1.0),
    )
    return Filters(factors(cycle, period), factors(damped, 1))


def check() -> None:
    """Raise unless the steps of gnlin are filtered as the page says."""
    for period in PERIODS:
        steps, damped = measured(period)
        expected = formulas(period, SINGULAR_VALUES)
        np.testing.assert_allclose(steps, expected.steps, rtol=1e-9)
        np.testing.assert_allclose(damped, expected.damped, rtol=1e-9)

        ratio = expected.steps / expected.damped
        assert np.all((ratio >= 1) & (ratio <= 2)), ratio
        # The fitted fractions agree to first order: they differ by (1 - (K - 1)/2K) s² where
        # s = σ²/λ is small.
        s = RATE * period * SINGULAR_VALUES**2
        small = s < 1e-3
        difference = (expected.steps - expected.damped) * SINGULAR_VALUES**2
        np.testing.assert_allclose(
            difference[small], ((1 - (period - 1) / (2 * period)) * s**2)[small], rtol=1e-2
        )
        largest = ratio_over_all(period)
        print(f"K = {period}: as the formulas say to 1e-9; largest ratio of the two {largest:.2f}")


def ratio_over_all(period: int) -> float:
    expected = formulas(period, np.logspace(-3, 0, 2000))
    return float(np.max(expected.steps / expected.damped))


def draw(path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams |= {
        "svg.hashsalt": "gnlin",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    sigma = np.logspace(-2.5, 0, 400)
    figure, (factor, fraction) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    for period, colour in zip(PERIODS, ("tab:orange", "tab:blue"), strict=True):
        curves, dots = formulas(period, sigma), measured(period)
        for axes, scale, dot_scale in ((factor, 1, 1), (fraction, sigma**2, SINGULAR_VALUES**2)):
            axes.plot(
                sigma, curves.steps * scale, color=colour, label=f"K = {period} gradient steps"
            )
            axes.plot(
                sigma, curves.damped * scale, "--", color=colour, label=f"damping λ = 1/({period}η)"
            )
            axes.plot(SINGULAR_VALUES, dots.steps * dot_scale, "o", color=colour, markersize=3.5)
            axes.plot(
                SINGULAR_VALUES,
                dots.damped * dot_scale,
                "s",
                color=colour,
                markersize=3.5,
                fillstyle="none",
            )
    factor.plot(sigma, 1 / sigma**2, ":", color="grey", label="undamped, 1/σ²")
    factor.set(
        xscale="log",
        yscale="log",
        ylim=(0.3, 300),
        xlabel="singular value σ of J",
        ylabel="filter factor",
    )
    fraction.set(
        xscale="log", xlabel="singular value σ of J", ylabel="fraction of the residual fitted"
    )
    factor.legend(frameon=False, fontsize=8)
    figure.patch.set_facecolor("white")
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    check()
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
