"""Which problems are trained? `TASKS` names them all.

Each name stands for a function that loads the data and returns a `Task`. The docstring of the
function defines the task.
"""

import inspect
from collections.abc import Callable

from gnlin.compare.tasks.handwriting import digits, digits_autoencoder, digits_cnn
from gnlin.compare.tasks.image_files import cifar10, mnist
from gnlin.compare.tasks.parity import sparse_parity
from gnlin.compare.tasks.poisson import poisson_pinn
from gnlin.compare.tasks.regression import diabetes
from gnlin.compare.tasks.task import Task
from gnlin.compare.tasks.text import chars, chars_deep, chars_large_batch

TASKS: dict[str, Callable[[], Task]] = {
    "digits": digits,
    "digits-cnn": digits_cnn,
    "digits-autoencoder": digits_autoencoder,
    "diabetes": diabetes,
    "sparse-parity": sparse_parity,
    "poisson-pinn": poisson_pinn,
    "chars": chars,
    "chars-large-batch": chars_large_batch,
    "chars-deep": chars_deep,
    "mnist": mnist,
    "cifar10": cifar10,
}


def describe(name: str) -> str:
    """The first paragraph of a task's definition, on one line."""
    first = (inspect.getdoc(TASKS[name]) or "").partition("\n\n")[0]
    return " ".join(first.split())
