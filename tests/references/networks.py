"""Small networks, each twice: the model in JAX, and its layers in NumPy, forwards and backwards."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from references.kronecker import Layer, Layers, Vector


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    params: dict[str, np.ndarray]
    model: Any  # (params, batch) ↦ outputs
    layers: Layers


def normal(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


@functools.cache
def perceptron(outputs: int) -> Network:
    """3 features and 4 hidden units with a scale each: 20 + 5 · outputs parameters."""
    params = {
        "in": normal(3, 4, seed=1),
        "in_bias": 0.1 * normal(4, seed=2),
        "scale": 1 + 0.1 * normal(4, seed=3),
        "out": normal(4, outputs, seed=4) / 2,
        "out_bias": 0.1 * normal(outputs, seed=5),
    }

    def model(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["in"] + params["in_bias"][None])
        return (hidden * params["scale"][None]) @ params["out"] + params["out_bias"][None]

    def layers(params, batch, cotangent):
        x = batch["x"]
        hidden = np.tanh(x @ params["in"] + params["in_bias"])
        of_outputs = cotangent.reshape(len(x), -1)
        of_scaled = of_outputs @ params["out"].T
        of_sums = of_scaled * params["scale"] * (1 - hidden**2)
        return [
            Layer("in", "in_bias", x, of_sums),
            Vector("scale", hidden * of_scaled),
            Layer("out", "out_bias", hidden * params["scale"], of_outputs),
        ]

    return Network(params, model, layers)


@functools.cache
def sequence(outputs: int) -> Network:
    """A layer at every position, a matrix that is used twice, and a readout stored transposed."""
    params = {
        "in": normal(3, 4, seed=1),
        "in_bias": 0.1 * normal(4, seed=2),
        "mix": normal(4, 4, seed=3) / 2,
        "out": normal(outputs, 4, seed=4) / 2,
    }

    def model(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["in"] + params["in_bias"][None, None])
        hidden = jnp.tanh(jnp.mean(hidden @ params["mix"], axis=1) @ params["mix"])
        return hidden @ params["out"].T

    def layers(params, batch, cotangent):
        x = batch["x"]  # (N, T, 3)
        first = np.tanh(x @ params["in"] + params["in_bias"])
        second = np.tanh(np.mean(first @ params["mix"], axis=1) @ params["mix"])
        of_outputs = cotangent.reshape(len(x), -1)
        of_sums = of_outputs @ params["out"] * (1 - second**2)
        of_means = of_sums @ params["mix"].T / x.shape[1]
        of_products = np.broadcast_to(of_means[:, None, :], first.shape)
        of_first = of_products @ params["mix"].T * (1 - first**2)
        means = np.mean(first @ params["mix"], axis=1)
        return [
            Layer("mix", None, first.reshape(-1, 4), of_products.reshape(-1, 4)),
            Layer("mix", None, means, of_sums),
            Layer("in", "in_bias", x.reshape(-1, 3), of_first.reshape(-1, 4)),
            Layer("out", None, second, of_outputs, transposed=True),
        ]

    return Network(params, model, layers)


# Losses of the outputs, and batches for them.


def squared(outputs, batch):
    """Half the mean squared error, each example weighed: H has an eigenvalue for each weight."""
    return 0.5 * jnp.mean(batch["weight"][:, None] * (outputs - batch["y"]) ** 2)


def regression_batch(examples: int, seed: int, positions: int | None = None):
    shape = (examples, 3) if positions is None else (examples, positions, 3)
    x = normal(*shape, seed=seed)
    features = x if positions is None else x.mean(axis=1)
    y = np.sin(features @ normal(3, 2, seed=100)) + 0.1 * normal(examples, 2, seed=seed + 1000)
    return {"x": x, "y": y, "weight": np.where(np.arange(examples) % 3 == 0, 3.0, 1.0)}


def robust(outputs, batch):
    """Straight far from the targets: there Newton's method goes too far."""
    return jnp.mean(jnp.sqrt(1 + (outputs - batch["y"]) ** 2))


def softmax(outputs, batch):
    chosen = jnp.take_along_axis(outputs, batch["label"][:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(outputs, axis=1) - chosen)


def class_batch(examples: int, seed: int):
    x = normal(examples, 3, seed=seed)
    scores = x @ normal(3, 3, seed=100) + normal(examples, 3, seed=seed + 1000)
    return {"x": x, "label": np.argmax(scores, axis=1)}


def logistic(outputs, batch):
    """Two classes and one logit: H is diagonal, with an eigenvalue for each different output."""
    return jnp.mean(jax.nn.softplus(outputs) - batch["label"][:, None] * outputs)


def two_class_batch(examples: int, seed: int, distinct: int):
    """Few different inputs, with labels of both classes at each."""
    rng = np.random.default_rng(seed)
    x = normal(distinct, 3, seed=seed)[rng.integers(distinct, size=examples)]
    likely = 0.3 + 0.4 * (x[:, 0] > 0)
    return {"x": x, "label": (rng.uniform(size=examples) < likely).astype(float)}
