"""What is trained: data, network, loss and step budget of each task."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from gnlin import Objective
from gnlin.tree import Params


@dataclasses.dataclass(frozen=True)
class Task:
    """One training problem.

    Attributes:
        name: what the command line calls it.
        objective: model and mean loss.
        init: key ↦ parameters.
        train: training data, arrays with the examples on axis 0.
        held_out: data of the same form that no step sees.
        accuracy: (outputs, batch) ↦ fraction of examples that are classified correctly.
        batch_size: examples in a mini-batch.
        steps: steps of a mini-batch run.
        full_batch_steps: steps of a full-batch run.
        target: full training loss that steps and work are counted to.
    """

    name: str
    objective: Objective
    init: Callable[[jax.Array], Params]
    train: dict[str, jax.Array]
    held_out: dict[str, jax.Array]
    accuracy: Callable[[Any, Any], jax.Array]
    batch_size: int
    steps: int
    full_batch_steps: int
    target: float

    @property
    def train_size(self) -> int:
        """Number of training examples."""
        return len(jax.tree.leaves(self.train)[0])

    def batches(self, seed: int, steps: int) -> np.ndarray:
        """Indices of the examples in each mini-batch, (steps, batch_size).

        A fresh permutation each epoch; what is left over at its end is dropped. It depends on the seed alone, so all
        contestants see the same batches in the same order.
        """
        generator = np.random.default_rng(seed)
        per_epoch = self.train_size // self.batch_size
        epochs = -(-steps // per_epoch)
        order = [generator.permutation(self.train_size)[: per_epoch * self.batch_size] for _ in range(epochs)]
        return np.concatenate(order).reshape(-1, self.batch_size)[:steps].astype(np.int32)


def digits() -> Task:
    """Scikit-learn's handwritten digits (1797 images of 8 × 8) and a 64-128-64-10 tanh network.

    Pixels are divided by 16 and standardised by their global mean and deviation. The first 1437 of
    ``numpy.random.default_rng(0).permutation`` train, the other 360 are held out. Mini-batches hold 128 examples, 11 to
    an epoch. 2048 steps are eight whole cycles of the longest finite period among the contestants, K = 256.
    """
    images, labels = load_digits(return_X_y=True)
    pixels = np.asarray(images) / 16
    pixels = (pixels - pixels.mean()) / pixels.std()
    order = np.random.default_rng(0).permutation(len(pixels))

    def part(chosen: np.ndarray) -> dict[str, jax.Array]:
        return {"x": jnp.asarray(pixels[chosen], jnp.float32), "y": jnp.asarray(np.asarray(labels)[chosen], jnp.int32)}

    return Task(
        name="digits",
        objective=Objective(perceptron, mean_cross_entropy),
        init=jax.jit(lambda key: init_perceptron(key, (64, 128, 64, 10))),
        train=part(order[:1437]),
        held_out=part(order[1437:]),
        accuracy=accuracy,
        batch_size=128,
        steps=2048,
        full_batch_steps=160,
        target=1e-3,
    )


TASKS: dict[str, Callable[[], Task]] = {"digits": digits}


# Models and losses that tasks share.


def init_perceptron(key: jax.Array, widths: Sequence[int]) -> list[dict[str, jax.Array]]:
    """Weights drawn as normal / √fan-in, (fan-in, fan-out); zero biases; one key for each layer."""
    keys = jax.random.split(key, len(widths) - 1)

    def layer(key: jax.Array, fan_in: int, fan_out: int) -> dict[str, jax.Array]:
        weights = jax.random.normal(key, (fan_in, fan_out), jnp.float32) / np.sqrt(fan_in)
        return {"w": weights, "b": jnp.zeros(fan_out, jnp.float32)}

    return [layer(*each) for each in zip(keys, widths[:-1], widths[1:], strict=True)]


def perceptron(params: list[dict[str, jax.Array]], batch: dict[str, jax.Array]) -> jax.Array:
    """Outputs (N, C) of a network with tanh hidden layers and a linear last one."""
    hidden = batch["x"]
    for layer in params[:-1]:
        hidden = jnp.tanh(jnp.dot(hidden, layer["w"]) + layer["b"][None])
    return jnp.dot(hidden, params[-1]["w"]) + params[-1]["b"][None]


def mean_cross_entropy(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Softmax cross-entropy, mean over examples."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def accuracy(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Fraction of examples whose largest logit is at the label."""
    return (logits.argmax(-1) == batch["y"]).mean()
