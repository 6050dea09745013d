"""A causal transformer over characters, whose blocks are one loop over stacked parameters.

Every shape is read from the parameters, so one function serves all sizes.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

ENDS = ("embedding", "positions", "output")
"""Names of the parameters that embed the characters, or make logits of the last vectors."""

_HEAD_WIDTH = 16


class Size(NamedTuple):
    """The size of a transformer.

    Attributes:
        width: of a vector, a multiple of 16, which is the width of a head.
        blocks: number of blocks.
    """

    width: int
    blocks: int


def init_transformer(
    key: jax.Array, size: Size, *, characters: int, context: int
) -> dict[str, Any]:
    """Parameters of `transformer`. Those of the blocks have a first axis, the number of the block.

    Weights are normal / √fan-in, embeddings normal / 10, gains 1 and biases 0.

    Args:
        key: a key of `jax.random`.
        size: width and number of blocks.
        characters: size of the alphabet.
        context: longest text.
    """
    embedding, positions, output, *blocks = jax.random.split(key, 3 + size.blocks)
    each = [_init_block(block, size.width) for block in blocks]
    return {
        "embedding": 0.1 * jax.random.normal(embedding, (characters, size.width), jnp.float32),
        "positions": 0.1 * jax.random.normal(positions, (context, size.width), jnp.float32),
        "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *each),
        "norm": jnp.ones(size.width, jnp.float32),
        "output": _weights(output, (size.width, characters)),
    }


def transformer(params: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
    """Logits (N, T, C) of the character after each of ``batch["x"]`` (N, T)."""
    x, embedding = batch["x"], params["embedding"]
    # A product with one-hot vectors has a product as its gradient. That of indexing is a slow
    # scatter.
    chosen = jax.nn.one_hot(x, len(embedding), dtype=embedding.dtype)
    hidden = jnp.dot(chosen, embedding) + params["positions"][None, : x.shape[1]]
    hidden, _ = jax.lax.scan(
        lambda now, block: (_block(block, now), None), hidden, params["blocks"]
    )
    return jnp.dot(_normalised(hidden, params["norm"]), params["output"])


def mean_character_loss(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Softmax cross-entropy of the characters ``batch["y"]`` (N, T), their mean, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def bits_per_character(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """The cross-entropy in bits."""
    return mean_character_loss(logits, batch) / math.log(2)


def _init_block(key: jax.Array, width: int) -> dict[str, jax.Array]:
    shapes = {
        "query_key_value": (width, 3 * width),
        "project": (width, width),
        "in": (width, 4 * width),
        "out": (4 * width, width),
    }
    keys = jax.random.split(key, len(shapes))
    weights = {}
    for each, (name, shape) in zip(keys, shapes.items(), strict=True):
        weights[name] = _weights(each, shape)
    ones = jnp.ones(width, jnp.float32)
    return {
        **weights,
        "bias": jnp.zeros(4 * width, jnp.float32),
        "norm_attention": ones,
        "norm_dense": ones,
    }


def _weights(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32) / math.sqrt(shape[0])


def _block(block: dict[str, jax.Array], hidden: jax.Array) -> jax.Array:
    """Attention and a dense layer, each added to what it reads."""
    hidden = hidden + _attention(block, _normalised(hidden, block["norm_attention"]))
    inner = jnp.dot(_normalised(hidden, block["norm_dense"]), block["in"])
    inner = jax.nn.gelu(inner + block["bias"][None, None])
    return hidden + jnp.dot(inner, block["out"])


def _normalised(hidden: jax.Array, scale: jax.Array) -> jax.Array:
    """Each vector with mean 0 and variance 1, times `scale`."""
    centred = hidden - hidden.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * scale[None, None]


def _attention(block: dict[str, jax.Array], hidden: jax.Array) -> jax.Array:
    count, length, width = hidden.shape
    mixed = jnp.dot(hidden, block["query_key_value"])
    mixed = mixed.reshape(count, length, 3, width // _HEAD_WIDTH, _HEAD_WIDTH)
    query, key, value = (mixed[:, :, i] for i in range(3))
    scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / math.sqrt(_HEAD_WIDTH)
    past = np.tri(length, dtype=bool)[None, None]
    attention = jax.nn.softmax(jnp.where(past, scores, -1e9), axis=-1)
    together = jnp.einsum("nhqk,nkhd->nqhd", attention, value).reshape(count, length, width)
    return jnp.dot(together, block["project"])
