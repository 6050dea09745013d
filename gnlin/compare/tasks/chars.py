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
from gnlin.compare.task import DataError, Quality, Task

CONTEXT, TRAIN, HELD_OUT = 64, 1536, 192
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
WIDTH, HEADS, BLOCKS = 48, 4, 2

# Single-file modules of Python 3.11 to 3.13 alike; those at the end are held out.
MODULES = tuple(
    """argparse ast bdb bisect calendar codecs configparser contextlib copy csv dataclasses difflib doctest enum
    fileinput fractions ftplib functools gettext heapq imaplib inspect ipaddress locale mailbox numbers optparse os
    pdb pickle pickletools platform pprint profile pyclbr random sched selectors shelve shutil smtplib socket
    socketserver statistics string subprocess tarfile tempfile textwrap threading timeit tokenize trace typing uuid
    warnings weakref""".split()
)


def chars() -> Task:
    """Next character of the standard library's documentation, causal transformer of two blocks, width 48.

    Data: the documentation strings of `MODULES`, taken from the sources of the running Python; other versions (and,
    less so, other patch releases) have slightly different texts, so compare results within one. The alphabet is the
    newline and the 95 printable ASCII characters; anything else reads ``?``. The text is cut into windows of 64
    characters, each predicted from those before it in the window. The first 1536 windows train, the next 192 are held
    out and judged by bits per character.
    Network: learned positions, two pre-norm blocks of causal attention with four heads and a GELU layer of width 192,
    without dropout; weights are normal / √fan-in, embeddings normal / 10.
    Budget: 1500 gradients of 32 windows; target is a training loss of 1.5 nats.
    """
    train, held_out = split(windows(documentation(), TRAIN + HELD_OUT))
    return Task(
        name="chars",
        objective=Objective(transformer, mean_cross_entropy),
        init=jax.jit(init),
        train=train,
        held_out=held_out,
        quality=Quality(
            "bits per character", Objective(transformer, bits_per_character), solved=2.9, higher_is_better=False
        ),
        batch_size=32,
        work=1500,
        target=1.5,
    )


# Data.


def documentation(folder: Path | None = None, modules: Sequence[str] = MODULES) -> str:
    """All documentation strings of `modules`, in the order of the syntax tree, with blank lines between them."""
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    found = []
    for path in (folder / f"{module}.py" for module in modules):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise DataError(f"no text for the task 'chars': cannot read {path}, a source of this Python") from error
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found.append(ast.get_docstring(node) or "")
    return "\n\n".join(filter(None, found))


def windows(text: str, count: int) -> np.ndarray:
    """The first `count` windows of the text as numbers of characters, (count, 64)."""
    if len(text) < count * CONTEXT:
        raise DataError(f"too little text for the task 'chars': {len(text)} characters instead of {count * CONTEXT}")
    number = dict.fromkeys(map(ord, text), CHARACTERS.index("?"))
    number |= {ord(character): i for i, character in enumerate(CHARACTERS)}
    codes = [number[ord(character)] for character in text[: count * CONTEXT]]
    return np.array(codes, np.int32).reshape(count, CONTEXT)


def split(text: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Training and held-out windows, each with inputs ``x`` and following characters ``y``, both (N, 63)."""
    parts = text[:-HELD_OUT], text[-HELD_OUT:]
    train, held_out = ({"x": part[:, :-1], "y": part[:, 1:]} for part in parts)
    return train, held_out


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
    # A product with one-hot vectors: its gradient is a product, too, where that of indexing is a slow scatter.
    chosen = jax.nn.one_hot(x, len(CHARACTERS), dtype=params["embedding"].dtype)
    hidden = jnp.dot(chosen, params["embedding"]) + params["positions"][None, : x.shape[1]]
    for block in params["blocks"]:
        hidden = hidden + _attention(block, _normalised(hidden, block["norm_attention"]))
        inner = jnp.dot(_normalised(hidden, block["norm_dense"]), block["in"]) + block["bias"][None, None]
        hidden = hidden + jnp.dot(jax.nn.gelu(inner), block["out"])
    return jnp.dot(_normalised(hidden, params["norm"]), params["output"])


def mean_cross_entropy(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Softmax cross-entropy of the characters ``batch["y"]`` (N, T), mean over all of them, in nats."""
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
    weights = {
        name: _weights(each, shape)
        for each, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True)
    }
    ones = jnp.ones(WIDTH, jnp.float32)
    return {**weights, "bias": jnp.zeros(4 * WIDTH, jnp.float32), "norm_attention": ones, "norm_dense": ones}


def _weights(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32) / math.sqrt(shape[0])


def _normalised(hidden: jax.Array, scale: jax.Array) -> jax.Array:
    """Each vector with mean 0 and variance 1, times `scale`."""
    centred = hidden - hidden.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * scale[None, None]


def _attention(block: dict[str, jax.Array], hidden: jax.Array) -> jax.Array:
    count, length, _ = hidden.shape
    mixed = jnp.dot(hidden, block["query_key_value"]).reshape(count, length, 3, HEADS, WIDTH // HEADS)
    query, key, value = (mixed[:, :, i] for i in range(3))
    scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / math.sqrt(WIDTH // HEADS)
    past = np.tri(length, dtype=bool)[None, None]
    attention = jax.nn.softmax(jnp.where(past, scores, -1e9), axis=-1)
    together = jnp.einsum("nhqk,nkhd->nqhd", attention, value).reshape(count, length, WIDTH)
    return jnp.dot(together, block["project"])
