"""Models and losses that tasks share."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax


def init_perceptron(key: jax.Array, widths: Sequence[int]) -> list[dict[str, jax.Array]]:
    """Weights drawn as normal / √fan-in, (fan-in, fan-out); zero biases; one key for each layer."""
    keys = jax.random.split(key, len(widths) - 1)
    return [_init_layer(*each) for each in zip(keys, itertools.pairwise(widths), strict=True)]


def perceptron(params: list[dict[str, jax.Array]], batch: dict[str, jax.Array]) -> jax.Array:
    """Outputs (N, C) of a network with tanh hidden layers and a linear last one."""
    hidden = batch["x"]
    for layer in params[:-1]:
        hidden = jnp.tanh(jnp.dot(hidden, layer["w"]) + layer["b"][None])
    return jnp.dot(hidden, params[-1]["w"]) + params[-1]["b"][None]


def init_convolutional(
    key: jax.Array, channels: Sequence[int], widths: Sequence[int]
) -> dict[str, Any]:
    """Parameters of `convolutional`, drawn as those of `init_perceptron`.

    Args:
        key: one key, split into one for the dense layers and one for each convolution.
        channels: channels of the image and of each convolution's outputs.
        widths: numbers of units from the flattened last convolution to the outputs.
    """
    dense, *keys = jax.random.split(key, len(channels))
    shapes = [(3, 3, *each) for each in itertools.pairwise(channels)]
    layers = [_init_layer(*each) for each in zip(keys, shapes, strict=True)]
    return {"convolutions": layers, "dense": init_perceptron(dense, widths)}


def convolutional(params: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
    """Outputs (N, C) of 3 × 3 convolutions with stride 2 and tanh, then a `perceptron`; images are
    (N, H, W, channels).

    The stride stands in for pooling: each convolution halves the sides of the image, which are
    even.
    """
    hidden = batch["x"]
    for layer in params["convolutions"]:
        weights = layer["w"].reshape(-1, layer["w"].shape[-1])
        hidden = jnp.tanh(jnp.dot(_patches(hidden), weights) + layer["b"][None, None, None])
    return perceptron(params["dense"], {"x": hidden.reshape(len(hidden), -1)})


def mean_cross_entropy(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Softmax cross-entropy with the labels ``batch["y"]``, mean over examples."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def accuracy(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Share of the examples whose largest logit is at the label, in per cent."""
    return 100 * (logits.argmax(-1) == batch["y"]).mean()


def _patches(images: jax.Array) -> jax.Array:
    """Every second 3 × 3 patch of images (N, H, W, C), as (N, H/2, W/2, 9 C).

    A row and a column of zeros are appended. As a product of matrices, a convolution inside a loop
    runs ten times as fast on CPUs as XLA's own.
    """
    _, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)))
    shifts = [(i, j) for i in range(3) for j in range(3)]
    return jnp.concatenate(
        [padded[:, i : i + height : 2, j : j + width : 2] for i, j in shifts], axis=-1
    )


def _init_layer(key: jax.Array, shape: tuple[int, ...]) -> dict[str, jax.Array]:
    fan_in = math.prod(shape[:-1])
    return {
        "w": jax.random.normal(key, shape, jnp.float32) / math.sqrt(fan_in),
        "b": jnp.zeros(shape[-1], jnp.float32),
    }
