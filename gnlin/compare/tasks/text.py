"""Text that every Python installation carries, as three tasks for a small transformer."""

import ast
import functools
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from gnlin import Objective
from gnlin.compare.tasks.decoder import (
    ENDS,
    Size,
    bits_per_character,
    init_transformer,
    mean_character_loss,
    transformer,
)
from gnlin.compare.tasks.task import DataError, Quality, Task

CONTEXT, WINDOWS, HELD_OUT_EVERY = 32, 4608, 9
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))

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
    layer of width 128, without dropout; 32 128 parameters. The blocks are one loop over stacked
    parameters. Weights are normal / √fan-in, embeddings normal / 10.
    Budget: 1500 mini-batches of 64 windows, 64 to an epoch; target is a training loss of 1.8 nats.
    """
    return _text_task("chars", Size(width=32, blocks=2), batch_size=64, work=1500)


def chars_large_batch() -> Task:
    """Next character of the standard library's documentation, the network of chars at batches of
    512.

    Data and network: those of `chars`.
    Budget: 500 mini-batches of 512 windows, 8 to an epoch; target is a training loss of 1.8 nats.
    """
    size = Size(width=32, blocks=2)
    return _text_task("chars-large-batch", size, batch_size=512, work=500)


def chars_deep() -> Task:
    """Next character of the standard library's documentation, causal transformer of four blocks,
    width 64.

    Data: those of `chars`.
    Network: that of `chars` with four blocks, width 64, four heads and GELU layers of width 256;
    212 480 parameters.
    Budget: 1000 mini-batches of 64 windows, 64 to an epoch; target is a training loss of 1.8 nats.
    """
    return _text_task("chars-deep", Size(width=64, blocks=4), batch_size=64, work=1000)


def _text_task(name: str, size: Size, *, batch_size: int, work: float) -> Task:
    text = windows(documentation(MODULES), WINDOWS)
    held_out = np.arange(WINDOWS) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    init = functools.partial(
        init_transformer, size=size, characters=len(CHARACTERS), context=CONTEXT - 1
    )
    return Task(
        name=name,
        objective=Objective(transformer, mean_character_loss),
        init=jax.jit(init),
        train={name: part[~held_out] for name, part in text.items()},
        held_out={name: part[held_out] for name, part in text.items()},
        quality=Quality(
            "bits per character",
            Objective(transformer, bits_per_character),
            solved=2.6,
            higher_is_better=False,
        ),
        batch_size=batch_size,
        work=work,
        target=1.8,
        ends=ENDS,
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
