"""Text that every Python installation carries, and a small transformer to predict it."""

import ast
import math
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnlin import Objective
from gnlin.compare.tasks.task import DataError, Quality, Task

CONTEXT, WINDOWS, HELD_OUT_EVERY = 32, 4608, 9
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
WIDTH, HEADS, BLOCKS = 32, 2, 2

# Each of these is one file from Python 3.11 to 3.13.
MODULES = (
    "argparse", "ast", "bdb", "bisect", "calendar", "configparser", "contextlib", "copy", "csv",
    "dataclasses", "enum", "fileinput", "fractions", "functools", "inspect", "ipaddress", "locale",
    "mailbox", "numbers", "optparse", "os", "pdb", "pickle", "platform", "random", "sched",
    "selectors", "shelve", "shutil",
)  # fmt: skip


def chars() -> Task:
    """Next character of the standard library's documentation, causal transformer of two blocks,
    width 32.

    Data: the documentation strings of `MODULES`, from the sources of the running Python. Other
    versions of Python have slightly different texts, so compare results within one. The alphabet is
    the newline and the 95 printable ASCII characters; other characters become ``?``. The text is
    cut into 4608 windows of 32 characters, each predicted from those before it in the window. Every
    ninth window is held out and judged by bits per character; the other 4096 train.
    Network: learned positions, two pre-norm blocks of causal attention with two heads and a GELU
    layer of width 128, without dropout. Weights are normal / √fan-in, embeddings normal / 10.
    Budget: 1500 mini-batches of 64 windows, 64 to an epoch; target is a training loss of 1.8 nats.
    """
    text = windows(documentation(MODULES), WINDOWS)
    held_out = np.arange(WINDOWS) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return Task(
        name="chars",
        objective=Objective(transformer, mean_cross_entropy),
        init=jax.jit(init),
        train={name: part[~held_out] for name, part in text.items()},
        held_out={name: part[held_out] for name, part in text.items()},
        quality=Quality(
            "bits per character",
            Objective(transformer, bits_per_character),
            solved=2.6,
            higher_is_better=False,
        ),
        batch_size=64,
        work=1500,
        target=1.8,
    )


# Data.


def documentation(modules: Sequence[str], folder: Path | None = None) -> str:
    """All documentation strings of the modules, one after the other, with blank lines between them.

    The sources lie in `folder`; `None` is the standard library of the running Python.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    found = []
    for path in (folder / f"{module}.py" for module in modules):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path} cannot be read; the task 'chars' needs a Python with its sources"
            ) from error
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found += [
            ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)
        ]
    return "\n\n".join(filter(None, found))


def windows(text: str, count: int) -> dict[str, np.ndarray]:
    """The first `count` windows of the text.

    Returns:
        Characters ``x`` and the character after each, ``y``, both (count, 31).
    """
    if len(text) < count * CONTEXT:
        raise DataError(
            f"the task 'chars' needs {count * CONTEXT} characters of text and found {len(text)}"
        )
    number = {character: i for i, character in enumerate(CHARACTERS)}
    codes = [number.get(character, number["?"]) for character in text[: count * CONTEXT]]
    cut = np.array(codes, np.int32).reshape(count, CONTEXT)
    return {"x": cut[:, :-1], "y": cut[:, 1:]}


# Network.


def init(key: jax.Array) -> dict[str, Any]:
    """Parameters of `transformer`."""
    embedding, positions, output, *blocks = jax.random.split(key, 3 + BLOCKS)
    return {
        "embedding": 0.1 * jax.random.normal(embedding, (len(CHARACTERS), WIDTH), jnp.float32),
        "positions": 0.1 * jax.random.normal(positions, (CONTEXT - 1, WIDTH), jnp.float32),
        "blocks": [_init_block(block) for block in blocks],
        "norm": jnp.ones(WIDTH, jnp.float32),
        "output": _weights(output, (WIDTH, len(CHARACTERS))),
    }


def transformer(params: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
    """Logits (N, T, C) of the character after each of ``batch["x"]`` (N, T)."""
    x = batch["x"]
    # A product with one-hot vectors has a product as its gradient. That of indexing is a slow
    # scatter.
    chosen = jax.nn.one_hot(x, len(CHARACTERS), dtype=params["embedding"].dtype)
    hidden = jnp.dot(chosen, params["embedding"]) + params["positions"][None, : x.shape[1]]
    for block in params["blocks"]:
        hidden = hidden + _attention(block, _normalised(hidden, block["norm_attention"]))
        inner = jnp.dot(_normalised(hidden, block["norm_dense"]), block["in"])
        inner = jax.nn.gelu(inner + block["bias"][None, None])
        hidden = hidden + jnp.dot(inner, block["out"])
    return jnp.dot(_normalised(hidden, params["norm"]), params["output"])


def mean_cross_entropy(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Softmax cross-entropy of the characters ``batch["y"]`` (N, T), their mean, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def bits_per_character(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """The cross-entropy in bits."""
    return mean_cross_entropy(logits, batch) / math.log(2)


def _init_block(key: jax.Array) -> dict[str, jax.Array]:
    shapes = {
        "query_key_value": (WIDTH, 3 * WIDTH),
        "project": (WIDTH, WIDTH),
        "in": (WIDTH, 4 * WIDTH),
        "out": (4 * WIDTH, WIDTH),
    }
    keys = jax.random.split(key, len(shapes))
    weights = {}
    for each, (name, shape) in zip(keys, shapes.items(), strict=True):
        weights[name] = _weights(each, shape)
    ones = jnp.ones(WIDTH, jnp.float32)
    return {
        **weights,
        "bias": jnp.zeros(4 * WIDTH, jnp.float32),
        "norm_attention": ones,
        "norm_dense": ones,
    }


def _weights(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32) / math.sqrt(shape[0])


def _normalised(hidden: jax.Array, scale: jax.Array) -> jax.Array:
    """Each vector with mean 0 and variance 1, times `scale`."""
    centred = hidden - hidden.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * scale[None, None]


def _attention(block: dict[str, jax.Array], hidden: jax.Array) -> jax.Array:
    count, length, _ = hidden.shape
    mixed = jnp.dot(hidden, block["query_key_value"])
    mixed = mixed.reshape(count, length, 3, HEADS, WIDTH // HEADS)
    query, key, value = (mixed[:, :, i] for i in range(3))
    scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / math.sqrt(WIDTH // HEADS)
    past = np.tri(length, dtype=bool)[None, None]
    attention = jax.nn.softmax(jnp.where(past, scores, -1e9), axis=-1)
    together = jnp.einsum("nhqk,nkhd->nqhd", attention, value).reshape(count, length, WIDTH)
    return jnp.dot(together, block["project"])
