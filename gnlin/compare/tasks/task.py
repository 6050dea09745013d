"""The definition of a task: a problem, its data, and the level at which it counts as solved."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gnlin import Objective
from gnlin.tree import Batch, Params


@dataclasses.dataclass(frozen=True)
class Quality:
    """The measure of a model on held-out data.

    Attributes:
        name: heading of tables and figures, with its unit: ``accuracy, %``.
        objective: its ``model`` gives the outputs that are judged, often those of the task's own
            objective. Its ``loss`` judges them by one number. Where the task has mini-batches this
            number is a mean over examples.
        solved: value from which the task counts as solved.
        higher_is_better: whether more of it is better.
    """

    name: str
    objective: Objective
    solved: float
    higher_is_better: bool = True


@dataclasses.dataclass(frozen=True)
class Task:
    """One training problem.

    Attributes:
        name: its name on the command line.
        objective: model and loss. The loss is a mean over examples, so that batches of any size
            compare.
        init: key ↦ parameters.
        train: training data, a pytree of arrays with the examples on axis 0.
        held_out: data that no step sees, in the form that ``quality.objective`` takes.
        quality: the measure on the held-out data.
        batch_size: examples in a mini-batch; `None` where every step sees all training data.
        work: budget of a run, in gradients of one such batch.
        target: training loss, over all training data, up to which steps and work are counted.
        residuals: ``residuals(params, batch)`` with objective = ½ Σ r², where the task is least
            squares.
        double: whether it is computed in float64.
        ends: names of the parameters that embed the inputs or make the outputs of a transformer.
            Methods for hidden matrices leave them to another method.
        stops: whether a run ends once its training loss is at or below the target.
    """

    name: str
    objective: Objective
    init: Callable[[jax.Array], Params]
    train: Batch
    held_out: Batch
    quality: Quality
    batch_size: int | None
    work: float
    target: float
    residuals: Callable[[Params, Batch], Any] | None = None
    double: bool = False
    ends: tuple[str, ...] = ()
    stops: bool = False

    def __post_init__(self):
        if self.batch_size is not None and not 1 <= self.batch_size <= self.train_size:
            raise ValueError(
                f"`batch_size` must be 1 to {self.train_size}, or None for all data; "
                f"got {self.batch_size}"
            )

    @property
    def train_size(self) -> int:
        """Number of training examples."""
        return len(jax.tree.leaves(self.train)[0])

    def examples(self, wanted: str | int) -> int | None:
        """Examples in a batch; `None` stands for all training data.

        Args:
            wanted: ``mini``, ``full`` or a number.
        """
        if self.batch_size is None or wanted == "full":
            return None
        return self.batch_size if isinstance(wanted, str) else min(wanted, self.train_size)

    def batches(self, seed: int, steps: int, size: int) -> np.ndarray:
        """Indices of the examples in each mini-batch, (steps, size).

        Each epoch is a fresh permutation. The examples that are left over at its end are dropped.
        The indices depend on the seed alone, so all contestants see the same batches in the same
        order. A longer run begins as a shorter one.
        """
        generator = np.random.default_rng(seed)
        per_epoch = self.train_size // size
        epochs = -(-steps // per_epoch)
        order = [generator.permutation(self.train_size)[: per_epoch * size] for _ in range(epochs)]
        return np.concatenate(order).reshape(-1, size)[:steps].astype(np.int32)

    def params_shapes(self) -> Params:
        """Shapes and dtypes of the parameters."""
        # A compiled function that came through pickle can be called, and not handed to `eval_shape`
        # (JAX 0.12).
        return jax.eval_shape(lambda key: self.init(key), jax.random.key(0))

    def batch_shapes(self, examples: int) -> Batch:
        """Shapes and dtypes of a batch of so many examples."""

        def shape(leaf):
            if self.batch_size is None:  # all data, whose leaves may be of different lengths
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            return jax.ShapeDtypeStruct((examples, *leaf.shape[1:]), leaf.dtype)

        return jax.tree.map(shape, self.train)

    def precision(self) -> contextlib.AbstractContextManager:
        """The context in which the task is made, compiled and run: float64 enabled or not."""
        if hasattr(jax, "enable_x64"):
            return jax.enable_x64(self.double)
        from jax import experimental  # the place of the same before JAX 0.8

        return experimental.enable_x64(self.double)  # pyright: ignore[reportAttributeAccessIssue]


class DataError(Exception):
    """Data that is missing or damaged; the message names the file and the remedy."""
