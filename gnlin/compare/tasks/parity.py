"""A function that no fixed set of features reaches: the test of feature learning."""

import jax
import numpy as np

from gnlin import Objective
from gnlin.compare.tasks.networks import accuracy, init_perceptron, mean_cross_entropy, perceptron
from gnlin.compare.tasks.task import Quality, Task

BITS, RELEVANT, HIDDEN, TRAIN, HELD_OUT = 40, 4, 128, 32_768, 4096


def sparse_parity() -> Task:
    """Parity of 4 out of 40 random bits, out of reach without moving features, MLP 40-128-2,
    softmax.

    Data: 40 fair bits ±1, drawn by ``numpy.random.default_rng(0)``; the label is 1 where the
    product of the first four is negative. 32 768 examples train, the 4096 drawn after them are held
    out. There are C(40, 4) = 91 390 such parities, orthogonal to each other. A linearised network
    has no more features than parameters, 5506. Whatever these features are, they explain on average
    at most 6 % of the variance of a parity. So a network linearised once stays near 50 %. A network
    that gets further has moved its features.
    Network: a tanh hidden layer; weights are normal / √fan-in, biases zero.
    Budget: 10 000 mini-batches of 128 examples, 256 to an epoch; target is a training loss of
        0.001.
    """
    generator = np.random.default_rng(0)
    return Task(
        name="sparse-parity",
        objective=Objective(perceptron, mean_cross_entropy),
        init=jax.jit(lambda key: init_perceptron(key, (BITS, HIDDEN, 2))),
        train=examples(generator, TRAIN),
        held_out=examples(generator, HELD_OUT),
        quality=Quality("accuracy, %", Objective(perceptron, accuracy), solved=99),
        batch_size=128,
        work=10_000,
        target=1e-3,
    )


def examples(generator: np.random.Generator, size: int) -> dict[str, np.ndarray]:
    """Bits ``x`` (N, 40), ±1, and labels ``y`` (N,).

    A label is 1 where the product of the first four bits is −1.
    """
    bits = generator.integers(0, 2, size=(size, BITS))
    return {
        "x": (1 - 2 * bits).astype(np.float32),
        "y": (bits[:, :RELEVANT].sum(axis=1) % 2).astype(np.int32),
    }
