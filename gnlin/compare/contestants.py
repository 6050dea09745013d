"""Who competes: an optimiser and four settings of its one tuned number.

Everyone has four trials. Settings of a kind lie the same factor apart (2 for learning rates and the time in which λ
falls, 10 for λ itself), and the window of four is placed so that the best of them is inside it, not at its edge.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import chex
import jax.numpy as jnp
import optax

import gnlin
from gnlin import Objective

Setting = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One optimiser of the comparison.

    Attributes:
        name: what the command line, the records and the table call it.
        title: what the picture calls it.
        batch: whether a step sees a mini-batch or all training data.
        grid: settings to choose from, one trial each.
        make: (objective, setting) ↦ transform. The numbers of the setting are traced: one compilation serves the grid.
        budget: fraction of the task's steps that it runs: its steps are dearer, or it needs fewer.
    """

    name: str
    title: str
    batch: Literal["mini", "full"]
    grid: tuple[Setting, ...]
    make: Callable[[Objective, Mapping[str, chex.Numeric]], optax.GradientTransformation]
    budget: float = 1.0


def grid(name: str, *values: float) -> tuple[Setting, ...]:
    """Settings of one number."""
    return tuple({name: value} for value in values)


def sgd(momentum: float):
    """Gradient descent; of 0.8, 0.9 and 0.95 the momentum that is best for that kind of batch."""

    def make(objective, setting):
        return optax.sgd(setting["lr"], momentum=momentum)

    return make


def adam(objective, setting):
    return optax.adam(setting["lr"])


def linearised_adam(period: int | None):
    """Adam on the model linearised at an anchor that moves every `period` steps."""

    def make(objective, setting):
        return optax.chain(gnlin.linearise_gradients(objective, period), optax.adam(setting["lr"]))

    return make


def gauss_newton(objective, setting):
    """Full steps whose λ falls from 1 to 0.01: while the outputs still move far, a small λ makes full steps diverge."""

    def damping(count):
        return jnp.maximum(jnp.exp(-count / setting["decay"]), 0.01)

    return gnlin.gauss_newton(1.0, objective, damping, solver=gnlin.CG(max_steps=10, rtol=1e-2))


def levenberg_marquardt(objective, setting):
    solver = gnlin.CG(max_steps=20, rtol=1e-2, warm_start=0.9)
    return gnlin.levenberg_marquardt(objective, initial_damping=setting["damping"], solver=solver)


CONTESTANTS: tuple[Contestant, ...] = (
    Contestant("sgd", "SGD, momentum", "mini", grid("lr", 0.1, 0.2, 0.4, 0.8), sgd(0.9)),
    Contestant("adam", "Adam (K = 1)", "mini", grid("lr", 0.01, 0.02, 0.04, 0.08), adam),
    Contestant("linearise-16", "Linearised, K = 16", "mini", grid("lr", 0.005, 0.01, 0.02, 0.04), linearised_adam(16)),
    Contestant(
        "linearise-256", "Linearised, K = 256", "mini", grid("lr", 0.001, 0.002, 0.004, 0.008), linearised_adam(256)
    ),
    Contestant("linearise-never", "Linearised once", "mini", grid("lr", 0.04, 0.08, 0.16, 0.32), linearised_adam(None)),
    Contestant("gauss-newton", "Gauss-Newton-CG", "mini", grid("decay", 10, 20, 40, 80), gauss_newton, budget=1 / 10),
    Contestant("sgd-full", "SGD, momentum, full batch", "full", grid("lr", 0.25, 0.5, 1, 2), sgd(0.95)),
    Contestant(
        "levenberg-marquardt",
        "Levenberg-Marquardt, full batch",
        "full",
        grid("damping", 0.01, 0.1, 1, 10),
        levenberg_marquardt,
        budget=1 / 10,
    ),
)
