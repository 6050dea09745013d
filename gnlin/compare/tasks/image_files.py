"""MNIST and CIFAR-10, from files that the user has downloaded, in the formats of their authors."""

import gzip
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import jax
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
from gnlin.compare.tasks.task import DataError, Quality, Task

_BATCH_SIZE = 256
_CLASSES = 10

_MNIST_SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_SIDE = 28
_MNIST_MOST = 60_000  # a bound for damaged files
_MNIST_MEAN, _MNIST_DEVIATION = 0.1307, 0.3081

_CIFAR_SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html (binary version)"
_CIFAR_RECORD = 1 + 3 * 32 * 32  # the label, then the red, the green and the blue plane
_CIFAR_MOST = 10_000
_CIFAR_MEAN, _CIFAR_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def mnist() -> Task:
    """Handwritten digits of MNIST (70000 images of 28 × 28, your copy), MLP 784-256-128-10,
    softmax.

    Data: the files ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
    ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, with or without ``.gz``, in
    ``mnist/`` of the folder that the environment variable GNLIN_DATA names (by default ``data/``).
    Pixels are divided by 255 and standardised by the mean and deviation of the training images,
    0.1307 and 0.3081. The 60000 images of the first two files train, the other 10000 are held out.
    Network: tanh hidden layers; weights are normal / √fan-in, biases zero.
    Budget: 6000 mini-batches of 256 examples, 234 to an epoch; target is a training loss of 0.01.
    """
    folder = _folder("mnist")
    train, held_out = (_read_mnist(folder, part) for part in ("train", "t10k"))
    _check_size("mnist", folder, train, _MNIST_SOURCE)
    return _classification(
        "mnist",
        model=perceptron,
        init=lambda key: init_perceptron(key, (784, 256, 128, _CLASSES)),
        train=train,
        held_out=held_out,
        solved=97.5,
        work=6000,
        target=0.01,
    )


def cifar10() -> Task:
    """Photographs of CIFAR-10 (60000 images of 32 × 32 in colour, your copy), three convolutions,
    softmax.

    Data: the files ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin`` of the
    binary version, in ``cifar-10-batches-bin/`` of the folder that the environment variable
    GNLIN_DATA names (by default ``data/``). Pixels are divided by 255 and standardised by the mean
    and deviation of each colour over the training images. The 50000 images of the first five files
    train, the 10000 of the last are held out. No augmentation.
    Network: 3 × 3 convolutions of 16, 32 and 64 channels with stride 2 and tanh, then 1024-64-10.
    It has 89 834 parameters; weights are normal / √fan-in, biases zero.
    Budget: 4000 mini-batches of 256 examples, 195 to an epoch; target is a training loss of 1.1.
    """
    folder = _folder("cifar-10-batches-bin")
    names = [f"data_batch_{number}.bin" for number in range(1, 6)]
    train, held_out = _read_cifar10(folder, names), _read_cifar10(folder, ["test_batch.bin"])
    _check_size("cifar10", folder, train, _CIFAR_SOURCE)
    return _classification(
        "cifar10",
        model=convolutional,
        init=lambda key: init_convolutional(key, (3, 16, 32, 64), (1024, 64, _CLASSES)),
        train=train,
        held_out=held_out,
        solved=60.0,
        work=4000,
        target=1.1,
    )


def _classification(
    name: str, model, init, train, held_out, *, solved: float, work: float, target: float
) -> Task:
    return Task(
        name=name,
        objective=Objective(model, mean_cross_entropy),
        init=jax.jit(init),
        train=train,
        held_out=held_out,
        quality=Quality("accuracy, %", Objective(model, accuracy), solved=solved),
        batch_size=_BATCH_SIZE,
        work=work,
        target=target,
    )


# The formats.


def _read_mnist(folder: Path, part: str) -> dict[str, np.ndarray]:
    """Images (N, 784), standardised, and labels (N,) of the part ``train`` or ``t10k``."""
    _, pixels = _read_idx(folder, f"{part}-images-idx3-ubyte", (_MNIST_SIDE, _MNIST_SIDE))
    path, labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", ())
    if len(pixels) != len(labels):
        raise _unusable(path, f"has {len(labels)} labels for {len(pixels)} images", _MNIST_SOURCE)
    _check_labels(path, labels, _MNIST_SOURCE)
    return {
        "x": _standardised(pixels.reshape(len(pixels), -1), _MNIST_MEAN, _MNIST_DEVIATION),
        "y": labels.astype(np.int32),
    }


def _read_idx(folder: Path, name: str, item: tuple[int, ...]) -> tuple[Path, np.ndarray]:
    """The path of the file, and its unsigned bytes, (N, *item).

    An IDX file begins with 0, 0, 8 (for bytes) and the number of axes. The length of each axis
    follows, big-endian.
    """
    axes = 1 + len(item)

    def read(path: Path, file: BinaryIO) -> np.ndarray:
        def unusable(fault: str) -> DataError:
            return _unusable(path, fault, _MNIST_SOURCE)

        header = file.read(4 + 4 * axes)
        if len(header) < 4 + 4 * axes or header[:4] != bytes([0, 0, 8, axes]):
            raise unusable(f"does not begin as an IDX file of bytes with {axes} axes")
        count, *rest = np.frombuffer(header, ">u4", offset=4).tolist()
        if tuple(rest) != item:
            raise unusable(f"has images of {rest[0]} × {rest[1]}, not {item[0]} × {item[1]}")
        if not 0 < count <= _MNIST_MOST:
            raise unusable(f"claims {count} examples, not 1 to {_MNIST_MOST}")
        expected = count * math.prod(item)
        content = file.read(expected + 1)  # a byte more tells a file that is too long
        if len(content) != expected:
            found = "more" if len(content) > expected else len(content)
            raise unusable(f"has {found} bytes of data where its header says {expected}")
        return np.frombuffer(content, np.uint8).reshape(count, *item)

    return _read([folder / name, folder / f"{name}.gz"], read, _MNIST_SOURCE)


def _read_cifar10(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Images (N, 32, 32, 3), standardised, and labels (N,) of all the files."""

    def read(path: Path, file: BinaryIO) -> np.ndarray:
        size = os.fstat(file.fileno()).st_size
        if size == 0 or size % _CIFAR_RECORD or size > _CIFAR_MOST * _CIFAR_RECORD:
            wanted = f"1 to {_CIFAR_MOST} records of {_CIFAR_RECORD}"
            raise _unusable(path, f"has {size} bytes, which is not {wanted}", _CIFAR_SOURCE)
        records = np.frombuffer(file.read(size), np.uint8).reshape(-1, _CIFAR_RECORD)
        _check_labels(path, records[:, 0], _CIFAR_SOURCE)
        return records

    files = [_read([folder / name], read, _CIFAR_SOURCE) for name in names]
    most = max(len(records) for _, records in files)
    for path, records in files:
        if len(records) < most:  # cut short between two records
            fault = f"has {len(records)} images where another part has {most}"
            raise _unusable(path, fault, _CIFAR_SOURCE)
    records = np.concatenate([records for _, records in files])
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return {
        "x": _standardised(images, _CIFAR_MEAN, _CIFAR_DEVIATION),
        "y": records[:, 0].astype(np.int32),
    }


def _standardised(pixels: np.ndarray, mean, deviation) -> np.ndarray:
    """In place where it can be: the images of a whole data set are large."""
    images = pixels.astype(np.float32, order="C")
    images /= np.float32(255)
    images -= np.asarray(mean, np.float32)
    images /= np.asarray(deviation, np.float32)
    return images


# Files that are missing or damaged.


def _folder(name: str) -> Path:
    return Path(os.environ.get("GNLIN_DATA") or "data").expanduser().absolute() / name


def _read(
    paths: list[Path], read: Callable[[Path, BinaryIO], np.ndarray], source: str
) -> tuple[Path, np.ndarray]:
    """The first of the files that is there, and its content.

    Args:
        paths: names of the same file. One that ends in ``.gz`` is unpacked.
        read: (path, open file) ↦ content.
        source: the address of the original, for messages.
    """
    for path in paths:
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                return path, read(path, cast(BinaryIO, file))
        except FileNotFoundError:
            continue
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _unusable(path, f"cannot be unpacked ({error})", source) from error
        except OSError as error:
            reason = error.strerror or error
            raise DataError(
                f"{path} cannot be read ({reason}): make it a file that you may read."
            ) from error
    packed = " (or .gz)" if len(paths) > 1 else ""
    folder = paths[0].parent.name
    raise DataError(
        f"{paths[0]}{packed} is missing: put it there from {source}, "
        f"or let GNLIN_DATA name the folder with {folder}/."
    )


def _check_labels(path: Path, labels: np.ndarray, source: str) -> None:
    if labels.max() >= _CLASSES:
        raise _unusable(path, f"has the label {labels.max()}, beyond {_CLASSES - 1}", source)


def _check_size(name: str, folder: Path, train: dict[str, np.ndarray], source: str) -> None:
    count = len(train["y"])
    if count < _BATCH_SIZE:
        few = f"fewer than the {_BATCH_SIZE} of a mini-batch of {name}"
        raise _unusable(folder, f"has {count} training images, {few}", source)


def _unusable(path: Path, fault: str, source: str) -> DataError:
    return DataError(f"{path} {fault}: replace it by the original from {source}.")
