"""Scikit-learn's handwritten digits, as three tasks."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gnlin import Objective
from gnlin.compare.tasks.networks import (
    accuracy,
    convolutional,
    init_convolutional,
    init_perceptron,
    mean_cross_entropy,
    perceptron,
)
from gnlin.compare.tasks.task import Quality, Task

_TRAIN = 1437


def digits() -> Task:
    """Handwritten digits (1797 images of 8 × 8), MLP 64-128-64-10, softmax.

    Data: scikit-learn's digits, pixels divided by 16 and standardised by their global mean and
    deviation. The first 1437 of ``numpy.random.default_rng(0).permutation`` train, the other 360
    are held out.
    Network: tanh hidden layers; weights are normal / √fan-in, biases zero.
    Budget: 3400 mini-batches of 128 examples, 11 to an epoch; target is a training loss of 0.001.
    """
    train, held_out = _classification((64,))
    return Task(
        name="digits",
        objective=Objective(perceptron, mean_cross_entropy),
        init=jax.jit(lambda key: init_perceptron(key, (64, 128, 64, 10))),
        train=train,
        held_out=held_out,
        quality=Quality("accuracy, %", Objective(perceptron, accuracy), solved=98.0),
        batch_size=128,
        work=3400,
        target=1e-3,
    )


def digits_cnn() -> Task:
    """Handwritten digits (1797 images of 8 × 8), two 3 × 3 convolutions and a dense layer, softmax.

    Data: those of `digits`, as images (8, 8, 1).
    Network: convolutions of 16 and 32 channels with stride 2 and tanh, then 128-10; 6090
    parameters, weights normal / √fan-in, biases zero.
    Budget: 3400 mini-batches of 128 examples, 11 to an epoch; target is a training loss of 0.001.
    """
    train, held_out = _classification((8, 8, 1))
    return Task(
        name="digits-cnn",
        objective=Objective(convolutional, mean_cross_entropy),
        init=jax.jit(lambda key: init_convolutional(key, (1, 16, 32), (128, 10))),
        train=train,
        held_out=held_out,
        quality=Quality("accuracy, %", Objective(convolutional, accuracy), solved=98.0),
        batch_size=128,
        work=3400,
        target=1e-3,
    )


def digits_autoencoder() -> Task:
    """Handwritten digits (1797 images of 8 × 8), autoencoder 64-128-64-16-64-128-64, least squares,
    full batch.

    Data: scikit-learn's digits, pixels divided by 16; the split of `digits`. The loss is half the
    squared error of an image, summed over its pixels, mean over images. Held-out images are judged
    by the same number. Solved is the level that the first 16 principal components of the training
    images reach there (0.37).
    Network: tanh hidden layers, linear output; weights are normal / √fan-in, biases zero.
    Budget: 1000 gradients of the full batch; target is a training loss of 0.4.
    """
    images, _ = _in_order()
    objective = Objective(perceptron, _reconstruction_error)
    return Task(
        name="digits-autoencoder",
        objective=objective,
        init=jax.jit(lambda key: init_perceptron(key, (64, 128, 64, 16, 64, 128, 64))),
        train={"x": images[:_TRAIN].astype(np.float32)},
        held_out={"x": images[_TRAIN:].astype(np.float32)},
        quality=Quality("½ squared error", objective, solved=0.37, higher_is_better=False),
        batch_size=None,
        work=1000,
        target=0.4,
        residuals=_reconstruction_residuals,
    )


def _in_order() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 64) with pixels from 0 to 1, and labels (1797,), training examples first."""
    # The import takes two seconds. The other commands need not wait for it.
    from sklearn.datasets import load_digits

    images, labels = map(np.asarray, load_digits(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(images))
    return images[order] / 16, labels[order]


def _classification(shape: tuple[int, ...]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Training and held-out data with standardised images of that shape."""
    images, labels = _in_order()
    images = ((images - images.mean()) / images.std()).reshape(-1, *shape)
    data = {"x": images.astype(np.float32), "y": labels.astype(np.int32)}
    return {k: v[:_TRAIN] for k, v in data.items()}, {k: v[_TRAIN:] for k, v in data.items()}


def _reconstruction_error(outputs: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    return 0.5 * jnp.square(outputs - batch["x"]).sum(-1).mean()


def _reconstruction_residuals(params, batch: dict[str, jax.Array]) -> jax.Array:
    return (perceptron(params, batch) - batch["x"]) / math.sqrt(len(batch["x"]))
