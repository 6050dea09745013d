"""Tasks on scikit-learn's data and on image files: data, networks, losses, and complaints about
files.
"""

import functools
import gzip
import itertools
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import third_party, tolerance
from sklearn.datasets import load_diabetes, load_digits

from gnlin.compare.tasks.handwriting import digits, digits_autoencoder, digits_cnn
from gnlin.compare.tasks.image_files import cifar10, mnist
from gnlin.compare.tasks.networks import convolutional
from gnlin.compare.tasks.regression import diabetes
from gnlin.compare.tasks.task import DataError

LOADERS = {
    "digits": digits,
    "digits-cnn": digits_cnn,
    "digits-autoencoder": digits_autoencoder,
    "diabetes": diabetes,
}


@functools.cache
def loaded(name):
    return LOADERS[name]()


@functools.cache
def drawn(name):
    """Parameters of the key 0."""
    return loaded(name).init(jax.random.key(0))


@pytest.fixture(scope="module", params=LOADERS)
def task(request):
    return loaded(request.param)


def first(batch, size):
    return jax.tree.map(lambda leaf: leaf[:size], batch)


# Data.


def test_digits_are_split_as_defined():
    data = load_digits()
    pixels = data.data / 16
    order = np.random.default_rng(0).permutation(1797)
    standardised = (pixels[order] - pixels.mean()) / pixels.std()
    for task, shape in ((loaded("digits"), (64,)), (loaded("digits-cnn"), (8, 8, 1))):
        np.testing.assert_allclose(
            task.train["x"], standardised[:1437].reshape(-1, *shape), rtol=1e-6
        )
        np.testing.assert_allclose(
            task.held_out["x"], standardised[1437:].reshape(-1, *shape), rtol=1e-6
        )
        np.testing.assert_array_equal(task.train["y"], data.target[order[:1437]])
        np.testing.assert_array_equal(task.held_out["y"], data.target[order[1437:]])
    task = loaded("digits-autoencoder")
    np.testing.assert_array_equal(task.train["x"], pixels[order[:1437]])
    np.testing.assert_array_equal(task.held_out["x"], pixels[order[1437:]])


def test_diabetes_is_split_as_defined():
    data = load_diabetes()
    order = np.random.default_rng(0).permutation(442)
    inputs = (data.data - data.data.mean(axis=0)) / data.data.std(axis=0)
    target = (data.target - np.mean(data.target)) / np.std(data.target)
    task = loaded("diabetes")
    for part, chosen in ((task.train, order[:353]), (task.held_out, order[353:])):
        np.testing.assert_allclose(part["x"], inputs[chosen], rtol=1e-6)
        np.testing.assert_allclose(part["y"], target[chosen][:, None], rtol=1e-6)
    assert (len(task.train["x"]), len(task.held_out["x"])) == (353, 89)


def test_loading_again_gives_the_same_data(task):
    again = LOADERS[task.name]()
    jax.tree.map(
        np.testing.assert_array_equal, (task.train, task.held_out), (again.train, again.held_out)
    )
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves((task.train, task.held_out))}
    assert kinds <= {"float32", "int32"}
    assert all(
        isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((task.train, task.held_out))
    )


# Networks and losses.


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("digits", (64, 128, 64, 10)),
        ("digits-autoencoder", (64, 128, 64, 16, 64, 128, 64)),
        ("diabetes", (10, 64, 64, 1)),
    ],
)
def test_perceptrons_are_those_defined(name, widths):
    @jax.jit
    def weights(key):
        keys, shapes = jax.random.split(key, len(widths) - 1), itertools.pairwise(widths)
        return [
            jax.random.normal(key, shape) / np.sqrt(shape[0])
            for key, shape in zip(keys, shapes, strict=True)
        ]

    params = drawn(name)
    for layer, expected in zip(params, weights(jax.random.key(0)), strict=True):
        np.testing.assert_allclose(layer["w"], expected, rtol=1e-6)
        np.testing.assert_array_equal(layer["b"], np.zeros(expected.shape[1]))
        assert layer["w"].dtype == layer["b"].dtype == jnp.float32


def test_convolutional_network_is_the_one_defined():
    params = drawn("digits-cnn")
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes["convolutions"] == [
        {"w": (3, 3, 1, 16), "b": (16,)},
        {"w": (3, 3, 16, 32), "b": (32,)},
    ]
    assert shapes["dense"] == [{"w": (128, 10), "b": (10,)}]
    # 4608 weights of deviation 1/12.
    weights = np.asarray(params["convolutions"][1]["w"])
    assert weights.std() == pytest.approx(1 / math.sqrt(9 * 16), rel=0.05)
    assert not np.array_equal(weights[..., 0, :16], params["convolutions"][0]["w"][..., 0, :])


def test_convolutions_are_those_of_xla():
    @jax.jit
    def both(params, images):
        hidden = images
        for layer in params["convolutions"]:
            layout = ("NHWC", "HWIO", "NHWC")
            hidden = jax.lax.conv_general_dilated(
                hidden, layer["w"], (2, 2), "SAME", dimension_numbers=layout
            )
            hidden = jnp.tanh(hidden + layer["b"].reshape(1, 1, 1, -1))
        dense = params["dense"][0]
        return convolutional(params, {"x": images}), hidden.reshape(len(images), -1) @ dense[
            "w"
        ] + dense["b"][None]

    task = loaded("digits-cnn")
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf) + np.float32(0.1), drawn("digits-cnn")
    )  # biases that matter
    ours, expected = both(params, task.train["x"][:6])
    np.testing.assert_allclose(
        ours, expected, **tolerance(jnp.float32, 100)
    )  # sums of up to 144 products


@pytest.mark.parametrize("name", ["digits-autoencoder", "diabetes"])
def test_residuals_are_those_of_the_objective(name):
    task, params = loaded(name), drawn(name)

    def half_sum_of_squares(params, batch):
        return 0.5 * jnp.sum(task.residuals(params, batch) ** 2)

    @jax.jit
    def both(params, batch):
        return [
            jax.value_and_grad(f)(params, batch)
            for f in (half_sum_of_squares, task.objective.value)
        ]

    for size in (50, task.train_size):
        ours, expected = both(params, first(task.train, size))
        # Sums over many examples and pixels, in two orders.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **tolerance(jnp.float32, 100)),
            ours,
            expected,
        )


def test_losses_in_numpy():
    def half_error(z, batch):
        return 0.5 * np.sum((z - batch["x"]) ** 2) / len(z)

    def check(name, loss, quality):
        task = loaded(name)
        for objective, batch, expected in (
            (task.objective, task.train, loss),
            (task.quality.objective, task.held_out, quality),
        ):
            outputs, value = jax.jit(lambda *a, o=objective: (o.model(*a), o.value(*a)))(
                drawn(name), batch
            )
            assert value == pytest.approx(
                expected(np.asarray(outputs, np.float64), batch), rel=1e-5, abs=1e-5
            )

    check(
        "digits",
        lambda z, batch: np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), batch["y"]]),
        lambda z, batch: 100 * np.mean(z.argmax(axis=1) == batch["y"]),
    )
    check("digits-autoencoder", half_error, half_error)
    check(
        "diabetes",
        lambda z, batch: 0.5 * np.mean((z - batch["y"]) ** 2),
        lambda z, batch: 1 - np.mean((z - batch["y"]) ** 2) / np.var(batch["y"], dtype=np.float64),
    )


def test_adam_begins_to_solve_each_task(task):
    check_that_adam_learns(task, drawn(task.name))


def check_that_adam_learns(task, params):
    tx = third_party(optax.adam(3e-3))
    batch, held_out = first(task.train, 32), first(task.held_out, 32)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(task.objective.value)(params, batch)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), length=10)
        return losses, task.quality.objective.value(params, held_out)

    losses, quality = train(params)
    assert np.isfinite(losses).all()
    assert np.isfinite(quality)
    assert losses[-1] < 0.9 * losses[0]


# Image files.


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


@pytest.fixture(scope="module")
def digits_like():
    """Files of MNIST's format with 300 and 20 noisy images whose label can be seen."""
    generator = np.random.default_rng(0)
    files = {}
    for part, size in (("train", 300), ("t10k", 20)):
        labels = generator.integers(10, size=size, dtype=np.uint8)
        images = generator.integers(100, size=(size, 28, 28), dtype=np.uint8)
        images[np.arange(size), labels] += 100
        files |= {
            f"{part}-images-idx3-ubyte": idx(images),
            f"{part}-labels-idx1-ubyte": idx(labels),
        }
    return files


@pytest.fixture(scope="module")
def photographs():
    """Files of CIFAR-10's format with 60 records each."""
    generator = np.random.default_rng(1)
    files = {}
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        records = generator.integers(100, size=(60, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records[np.arange(60), 100 + 300 * records[:, 0].astype(int)] += 100
        files[name] = records.tobytes()
    return files


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("GNLIN_DATA", str(tmp_path))

    def write(folder, files):
        (tmp_path / folder).mkdir()
        for name, content in files.items():
            (tmp_path / folder / name).write_bytes(content)

    return write


def test_mnist_is_read(write, digits_like):
    write("mnist", digits_like)
    task = mnist()
    assert (task.train["x"].shape, task.held_out["x"].shape) == ((300, 784), (20, 784))
    assert (task.train["x"].dtype, task.train["y"].dtype) == (np.float32, np.int32)
    content = np.frombuffer(digits_like["t10k-images-idx3-ubyte"][16:], np.uint8).reshape(20, 784)
    np.testing.assert_allclose(
        task.held_out["x"], (content / 255 - 0.1307) / 0.3081, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(
        task.held_out["y"], list(digits_like["t10k-labels-idx1-ubyte"][8:])
    )
    params = task.init(jax.random.key(0))
    assert [layer["w"].shape for layer in params] == [(784, 256), (256, 128), (128, 10)]
    check_that_adam_learns(task, params)


def test_packed_mnist_is_the_same(write, digits_like, tmp_path, monkeypatch):
    write("mnist", digits_like)
    plain = mnist()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GNLIN_DATA")
    (tmp_path / "data").mkdir()
    write(
        "data/mnist",
        {f"{name}.gz": gzip.compress(content, 1) for name, content in digits_like.items()},
    )
    packed = mnist()
    jax.tree.map(
        np.testing.assert_array_equal,
        (plain.train, plain.held_out),
        (packed.train, packed.held_out),
    )


def test_cifar10_is_read(write, photographs):
    write("cifar-10-batches-bin", photographs)
    task = cifar10()
    assert (task.train["x"].shape, task.held_out["x"].shape) == ((300, 32, 32, 3), (60, 32, 32, 3))
    assert (task.train["x"].dtype, task.train["y"].dtype) == (np.float32, np.int32)
    record = photographs["data_batch_2.bin"][3073:6146]
    assert task.train["y"][61] == record[0]
    for channel, (mean, deviation) in enumerate(
        [(0.4914, 0.2470), (0.4822, 0.2435), (0.4465, 0.2616)]
    ):
        value = record[1 + 1024 * channel + 32 * 5 + 9] / 255
        assert task.train["x"][61, 5, 9, channel] == pytest.approx(
            (value - mean) / deviation, rel=1e-5
        )
    params = task.init(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 89_834
    check_that_adam_learns(task, params)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def with_label(content, label):
    return content[:-1] + bytes([label])


@pytest.mark.parametrize(
    ("name", "damaged", "complaint"),
    [
        (IMAGES, lambda c: b"", "does not begin as an IDX file of bytes with 3 axes"),
        (IMAGES, lambda c: c[:10], "does not begin as an IDX file"),
        (IMAGES, lambda c: b"\x00\x00\x0d\x03" + c[4:], "does not begin as an IDX file"),
        (IMAGES, lambda c: gzip.compress(c, 1), "does not begin as an IDX file"),
        (
            LABELS,
            lambda c: c[:3] + b"\x03" + c[4:],
            "does not begin as an IDX file of bytes with 1 axes",
        ),
        (
            IMAGES,
            lambda c: c[:12] + struct.pack(">I", 32) + c[16:],
            "has images of 28 × 32, not 28 × 28",
        ),
        (
            IMAGES,
            lambda c: c[:4] + struct.pack(">I", 2**32 - 1) + c[8:],
            "claims 4294967295 examples",
        ),
        (IMAGES, lambda c: c[:4] + struct.pack(">I", 0) + c[8:], "claims 0 examples"),
        (IMAGES, lambda c: c[:-1], "has 235199 bytes of data where its header says 235200"),
        (IMAGES, lambda c: c + b"\x00", "has more bytes of data where its header says 235200"),
        (LABELS, lambda c: idx(np.zeros(299, np.uint8)), "has 299 labels for 300 images"),
        (LABELS, lambda c: with_label(c, 10), "has the label 10, beyond 9"),
    ],
)
def test_damaged_mnist_is_refused(write, digits_like, name, damaged, complaint):
    write("mnist", digits_like | {name: damaged(digits_like[name])})
    check_refusal(mnist, name, complaint)


@pytest.mark.parametrize(
    ("damaged", "complaint"),
    [
        (lambda packed: packed[:-2000], "cannot be unpacked"),
        (lambda packed: b"not packed", "cannot be unpacked"),
        (lambda packed: packed[:200] + b"\xff" * 200 + packed[400:], "cannot be unpacked"),
        (lambda packed: packed[:-8] + bytes(8), "cannot be unpacked"),
    ],
)
def test_damaged_packed_mnist_is_refused(write, digits_like, damaged, complaint):
    write(
        "mnist",
        {f"{name}.gz": gzip.compress(content, 1) for name, content in digits_like.items()}
        | {f"{IMAGES}.gz": damaged(gzip.compress(digits_like[IMAGES], 1))},
    )
    check_refusal(mnist, f"{IMAGES}.gz", complaint)


@pytest.mark.parametrize(
    ("damaged", "complaint"),
    [
        (lambda c: b"", "has 0 bytes, which is not 1 to 10000 records of 3073"),
        (lambda c: c[:-1], "has 184379 bytes"),
        (lambda c: c[:-3073], "has 59 images where another part has 60"),
        (lambda c: bytes([255]) + c[1:], "has the label 255, beyond 9"),
    ],
)
def test_damaged_cifar10_is_refused(write, photographs, damaged, complaint):
    name = "data_batch_3.bin"
    write("cifar-10-batches-bin", photographs | {name: damaged(photographs[name])})
    check_refusal(cifar10, name, complaint)


def test_an_oversized_file_is_refused_unread(write, photographs, tmp_path):
    write("cifar-10-batches-bin", photographs)
    with (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").open("r+b") as file:
        file.truncate(3073 * 10**9)  # sparse: nothing is stored
    check_refusal(cifar10, "test_batch.bin", "has 3073000000000 bytes")


def test_too_few_images_are_refused(write, photographs):
    write(
        "cifar-10-batches-bin",
        {name: content[: 50 * 3073] for name, content in photographs.items()},
    )
    check_refusal(
        cifar10,
        "cifar-10-batches-bin",
        "has 250 training images, fewer than the 256 of a mini-batch",
    )


@pytest.mark.parametrize(
    ("loader", "path"),
    [(mnist, f"mnist/{IMAGES} (or .gz)"), (cifar10, "cifar-10-batches-bin/data_batch_1.bin")],
)
def test_missing_files_are_named(loader, path, tmp_path, monkeypatch):
    monkeypatch.setenv("GNLIN_DATA", str(tmp_path))
    check_refusal(loader, f"{tmp_path}/{path}", "is missing: put it there from https://")


def test_one_missing_file_is_named(write, photographs):
    write(
        "cifar-10-batches-bin",
        {name: c for name, c in photographs.items() if name != "data_batch_4.bin"},
    )
    check_refusal(cifar10, "data_batch_4.bin", "is missing")


def test_what_is_no_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("GNLIN_DATA", str(tmp_path))
    (tmp_path / "mnist" / IMAGES).mkdir(parents=True)
    check_refusal(mnist, IMAGES, "cannot be read")


def check_refusal(loader, *parts):
    with pytest.raises(DataError) as caught:
        loader()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
