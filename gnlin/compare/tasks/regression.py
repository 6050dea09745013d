"""Scikit-learn's diabetes data: a small regression."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gnlin import Objective
from gnlin.compare.tasks.networks import init_perceptron, perceptron
from gnlin.compare.tasks.task import Quality, Task


def diabetes() -> Task:
    """Disease progression of 442 diabetes patients, MLP 10-64-64-1, least squares, full batch.

    Data: scikit-learn's diabetes, each of the ten inputs and the target standardised over all
    patients. The first 353 of ``numpy.random.default_rng(0).permutation`` train, the other 89 are
    held out. The loss is half the mean squared error. Held-out patients are judged by R², the share
    of their variance that is explained. Solved is about the level of ridge regression there (0.35,
    penalty chosen by cross-validation). A network passes that level early and then overfits:
    reaching the target costs held-out quality.
    Network: tanh hidden layers, linear output; weights are normal / √fan-in, biases zero.
    Budget: 1000 gradients of the full batch; target is a training loss of 0.1.
    """
    # The import takes two seconds. The other commands need not wait for it.
    from sklearn.datasets import load_diabetes

    inputs, progression = map(np.asarray, load_diabetes(return_X_y=True))
    inputs = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    progression = (progression - progression.mean()) / progression.std()
    order = np.random.default_rng(0).permutation(len(inputs))

    def part(chosen: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "x": inputs[chosen].astype(np.float32),
            "y": progression[chosen, None].astype(np.float32),
        }

    return Task(
        name="diabetes",
        objective=Objective(perceptron, _half_mean_squared_error),
        init=jax.jit(lambda key: init_perceptron(key, (10, 64, 64, 1))),
        train=part(order[:353]),
        held_out=part(order[353:]),
        quality=Quality("R²", Objective(perceptron, _r_squared), solved=0.34),
        batch_size=None,
        work=1000,
        target=0.1,
        residuals=_residuals,
    )


def _half_mean_squared_error(outputs: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    return 0.5 * jnp.square(outputs - batch["y"]).mean()


def _residuals(params, batch: dict[str, jax.Array]) -> jax.Array:
    return (perceptron(params, batch) - batch["y"]) / math.sqrt(len(batch["y"]))


def _r_squared(outputs: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """1 − Σ (z − y)² / Σ (y − ȳ)²."""
    y = batch["y"]
    return 1 - jnp.square(outputs - y).sum() / jnp.square(y - y.mean()).sum()
