"""The empirical kernel against a dense Jacobian by forward mode; proofs that batches may be cut.

Kernels are assembled as a whole and in parts.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.flatten_util import ravel_pytree
from problems import third_party_model, tolerance

import gnlin
from gnlin.structure.parts import assemble, cut_of

N, M = 6, 4
PAIRS = "full", "diagonal", "trace"


class Case(NamedTuple):
    model: object
    params: dict
    batch: dict
    apart: bool  # whether it can be shown that examples are independent


def perceptron(params, batch):
    return jnp.tanh(batch["x"] @ params["in"] + params["bias"][None, :]) @ params["out"]


def scalar(params, batch):
    return jnp.mean(perceptron(params, batch))


def one_output(params, batch):
    return perceptron(params, batch)[:, 0]


def pytree(params, batch):
    z = perceptron(params, batch)
    return {"a": jnp.sum(z, axis=1), "b": (z[:, :2].reshape(-1, 1, 2), jnp.exp(z[:, 2:]))}


def convolution(params, batch):
    images = batch["images"]
    numbers = jax.lax.conv_dimension_numbers(
        images.shape, params["kernel"].shape, ("NHWC", "HWIO", "NHWC")
    )
    h = jax.lax.conv_general_dilated(
        images, params["kernel"], (1, 1), "SAME", dimension_numbers=numbers
    )
    h = jax.nn.relu(h + params["shift"][None, None, None, :])
    h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return h.reshape(len(h), -1)[:, :5] @ params["out"]


def attention(params, batch):
    """Embedded tokens, a causal mask, and a normalisation within each token."""
    h = params["table"][batch["ids"]]
    h = h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 0.1) * params["scale"][None, None, :]
    scores = jnp.einsum("nti,ij,nsj->nts", h, params["mix"], h)
    causal = jnp.tril(jnp.ones(scores.shape[1:], bool))
    weights = jax.nn.softmax(jnp.where(causal[None], scores, -jnp.inf), axis=-1)
    return jax.nn.gelu(weights @ h)[:, -1] @ params["out"]


def recurrence(params, batch):
    def read(hidden, row):
        hidden = jnp.tanh(hidden @ params["square"] + row @ params["in"])
        return hidden, jnp.sum(hidden, axis=1)

    hidden, sums = jax.lax.scan(
        read, jnp.zeros((len(batch["x"]), 5)), jnp.moveaxis(batch["tokens"], 1, 0)
    )
    return hidden @ params["out"] + jnp.moveaxis(sums, 0, 1)[:, :1]


def wide_sequence(params, batch):
    """A layer of more features than positions: inputs and cotangents are multiplied by position."""
    hidden = jnp.tanh(batch["tokens"][:, :2] @ params["wide_in"])
    return jnp.sum(jnp.tanh(hidden @ params["wide"]), axis=1)[:, :4]


def stacked(params, batch):
    """Layers of equal size in a loop."""
    h, _ = jax.lax.scan(
        lambda h, w: (jnp.tanh(h @ w), None), batch["x"] @ params["in"], params["deep"]
    )
    return h @ params["out"]


def assorted(params, batch):
    """Other operations that keep examples apart.

    Sorting, the largest few, sums along features, a part of them, hard choices.
    """
    h = jnp.tanh(batch["x"] @ params["in"])
    largest, places = jax.lax.top_k(h, 3)
    part = jax.lax.dynamic_slice_in_dim(jnp.cumsum(h, axis=1), 1, 3, axis=1)
    chosen = params["out"][jnp.argmax(h, axis=1)][:, :3]
    best = jnp.where(jnp.all(h > -2, axis=1), jnp.max(h, axis=1), jnp.prod(h, axis=1))
    largest = (largest - largest.mean(1, keepdims=True)) / (
        0.1 + largest.std(axis=1, keepdims=True)
    )
    return (
        largest * part
        + jnp.sort(h, axis=1)[:, 2:] * chosen
        + best[:, None] * places.astype(best.dtype)
    )


def frozen_statistics(params, batch):
    h = (batch["x"] - batch["mean"][None, :]) * jax.nn.sigmoid(params["in"])[:, 0][None, :]
    return h @ params["in"]


def batch_statistics(params, batch):
    h = batch["x"] @ params["in"]
    return (
        (h - jnp.mean(h, axis=0, keepdims=True))
        / jnp.sqrt(jnp.var(h, axis=0, keepdims=True) + 0.1)
        @ params["out"]
    )


def standardised_inputs(params, batch):
    """A part of the batch has other outputs: derivatives by the parameters do not tell that."""
    return (batch["x"] - jnp.mean(batch["x"], axis=0, keepdims=True)) @ params["in"]


def dropout(params, batch):
    h = jnp.tanh(batch["x"] @ params["in"])
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h, 0) @ params["out"]


def by_place(params, batch):
    return perceptron(params, batch) * jnp.arange(1.0, 1 + len(batch["x"]))[:, None].astype(
        batch["x"].dtype
    )


def fixed_size(params, batch):
    return (
        perceptron(params, batch).reshape(len(batch["x"]) // 2, 2, -1).reshape(len(batch["x"]), -1)
    )


def divided(params, batch):
    """A mean over the batch, but for the sum."""
    return perceptron(params, batch) / len(batch["x"]) ** 0.5


SQUARE = jnp.arange(16.0).reshape(4, 4)
# What else a model could do with the number of examples.
BY_NUMBER = {
    "a constant": lambda z, n: z / jnp.full((4,), n, z.dtype)[None, :],
    "a small constant": lambda z, n: z / jnp.full((4,), min(n, 5), z.dtype)[None, :],
    "an array from outside": lambda z, n: z / np.full(4, n, z.dtype)[None, :],
    "an integer": lambda z, n: z / jnp.asarray((n, 1))[0].astype(z.dtype),
    "a power": lambda z, n: z**n,
    "a bound": lambda z, n: jnp.clip(z, -n / 20, n / 20),
    "a mask": lambda z, n: z * (jnp.arange(4) < n).astype(z.dtype)[None, :],
    "a slice": lambda z, n: z[:, :n] @ jnp.ones((min(n, 4), 2), z.dtype),
    "a shorter sum": lambda z, n: jnp.sum(z[:, :n], axis=1),
    "a turn": lambda z, n: jnp.roll(z, n // 2, axis=-1) * jnp.arange(4.0)[None, :].astype(z.dtype),
    "a number of turns": lambda z, n: jax.lax.fori_loop(0, n, lambda _, z: 0.9 * z, z),
    "a transposed matrix": lambda z, n: z @ (SQUARE if n > 5 else SQUARE.T).astype(z.dtype),
    "another operand": lambda z, n: z * jnp.sin(z) - jnp.cos(z) * (z if n > 5 else jnp.sin(z)),
    "another order": lambda z, n: jnp.concatenate((z, 2 * z)[:: 1 if n > 5 else -1], axis=1),
    "a jitted constant": lambda z, n: jax.jit(lambda z: z * np.full(4, 1 / n, z.dtype)[None, :])(z),
}


def by_number(of):
    return lambda params, batch: of(perceptron(params, batch), len(batch["x"]))


def branching(params, batch):
    z = perceptron(params, batch)
    return z[::-1] if len(batch["x"]) < 1000 else z


def noise_for_all(params, batch):
    """What is drawn for each example and summed is known, and not the same for a part."""
    return perceptron(params, batch) * jnp.sum(
        jax.random.normal(jax.random.key(0), (len(batch["x"]),)).astype(float)
    )


@jax.custom_jvp
def centred(h):
    return h


centred.defjvp(
    lambda primals, tangents: (
        primals[0],
        tangents[0] - jnp.mean(tangents[0], axis=0, keepdims=True),
    )
)


def rule_of_its_own(params, batch):
    """Examples meet in the derivative alone."""
    return centred(perceptron(params, batch))


def contracted(params, batch):
    """How three factors are contracted depends on the number of examples."""
    return jnp.einsum("ni,ij,jk->nk", batch["x"], params["in"], params["out"])


def over_the_batch(params, batch):
    h = perceptron(params, batch)
    return jax.nn.softmax(h @ h.T, axis=-1) @ h


def cases() -> dict[str, Case]:
    weights = {
        "in": oracles.normal(3, 5, seed=1),
        "bias": oracles.normal(5, seed=2),
        "out": oracles.normal(5, 4, seed=3),
        "kernel": oracles.normal(3, 3, 1, 2, seed=4),
        "shift": oracles.normal(2, seed=5),
        "table": oracles.normal(7, 5, seed=6),
        "scale": 1 + 0.1 * oracles.normal(5, seed=7),
        "mix": oracles.normal(5, 5, seed=8),
        "square": 0.5 * oracles.normal(5, 5, seed=9),
        "deep": 0.5 * oracles.normal(3, 5, 5, seed=10),
        "wide_in": oracles.normal(3, 12, seed=15),
        "wide": 0.5 * oracles.normal(12, 12, seed=16),
    }
    batch = {
        "x": oracles.normal(N, 3, seed=11),
        "tokens": oracles.normal(N, 3, 3, seed=12),
        "images": oracles.normal(N, 4, 4, 1, seed=13),
        "ids": jnp.asarray(np.random.default_rng(14).integers(0, 7, (N, 3))),
        "mean": jnp.ones(3),
    }

    def case(model, names, apart=True):
        params = {**{name: weights[name] for name in names.split()}, "none": None}
        return Case(model, params, batch, apart)

    return {
        "perceptron": case(perceptron, "in bias out"),
        "one output": case(one_output, "in bias out scale"),
        "pytree": case(pytree, "in bias out"),
        "convolution": case(convolution, "kernel shift out"),
        "attention": case(attention, "table scale mix out"),
        "recurrence": case(recurrence, "square in out"),
        "wide sequence": case(wide_sequence, "wide_in wide"),
        "stacked": case(stacked, "in deep out"),
        "assorted": case(assorted, "in out"),
        "frozen statistics": case(frozen_statistics, "in"),
        "scalar": case(scalar, "in bias out", False),
        "batch statistics": case(batch_statistics, "in out", False),
        "standardised inputs": case(standardised_inputs, "in", False),
        "dropout": case(dropout, "in out", False),
        "by place": case(by_place, "in bias out", False),
        "fixed size": case(fixed_size, "in bias out", False),
        "over the batch": case(over_the_batch, "in bias out", False),
        "divided": case(divided, "in bias out", False),
        "branching": case(branching, "in bias out", False),
        "noise for all": case(noise_for_all, "in bias out", False),
        "rule of its own": case(rule_of_its_own, "in bias out", False),
        "contracted": case(contracted, "in out"),
        **{name: case(by_number(of), "in bias out", False) for name, of in BY_NUMBER.items()},
    }


def loss(outputs, batch):
    del batch
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(outputs))


def other_batch(case):
    """M other examples of the same kind."""
    changed = {
        name: jnp.roll(leaf, 1, axis=0)[:M]
        for name, leaf in case.batch.items()
        if name not in ("ids", "mean")
    }
    return {
        **case.batch,
        **changed,
        "x": jnp.sin(case.batch["x"][:M]),
        "ids": case.batch["ids"][-M:],
    }


@functools.partial(jax.jit, static_argnums=0)
def jacobian(model, params, batch):
    """(N, C, P), by forward mode."""
    flat, unravel = ravel_pytree(params)

    def outputs(vector):
        leaves = jax.tree.leaves(model(unravel(vector), batch))
        return jnp.concatenate(
            [leaf.reshape(leaf.shape[0] if leaf.ndim else 1, -1) for leaf in leaves], axis=1
        )

    return jax.jacfwd(outputs)(flat)


def dense_kernels(case, other=None):
    """All three kernels, in NumPy."""
    a = np.asarray(jacobian(case.model, case.params, case.batch))
    b = a if other is None else np.asarray(jacobian(case.model, case.params, other))
    full = np.einsum("ncp,mdp->ncmd", a, b)
    return {
        "full": full,
        "diagonal": np.einsum("ncmc->cnm", full),
        "trace": np.einsum("ncmc->nm", full),
    }


def objective_of(case):
    return gnlin.Objective(case.model, loss)


def all_kernels(case, *others, which=PAIRS, **bounds):
    """Compiled as one program: what takes long here is compilation."""
    objective = objective_of(case)

    @jax.jit
    def kernels(params, *batches):
        return [
            gnlin.kernel.empirical_ntk(
                objective, params, *batches, pairs=pairs, max_bytes=bounds.get(pairs, 2**32)
            )
            for pairs in which
        ]

    return kernels(case.params, case.batch, *others)


@pytest.mark.parametrize("name", cases())
def test_kernels_are_those_of_the_jacobian(name, x64):
    """How pairs are taken from the kernel of a whole batch does not depend on the number of
    examples: models that use this number are asked for all pairs alone, the others for each kind.
    """
    case, which = cases()[name], ("full",) if name in BY_NUMBER else PAIRS
    for others in ((), (other_batch(case),)):
        expected = dense_kernels(case, *others)
        kernels = all_kernels(case, *others, which=which)
        for kernel, pairs in zip(kernels, which, strict=True):
            np.testing.assert_allclose(
                kernel, expected[pairs], rtol=0, atol=1e-13 * np.abs(expected["full"]).max()
            )


# About the least that is accepted, in bytes; the kernel itself takes 3072, of one output 192.
BOUNDS = {
    "perceptron": 2**15,
    "one output": 2**13,
    "pytree": 2**16,
    "convolution": 2**16,
    "attention": 2**16,
    "stacked": 2**17,
}


@pytest.mark.parametrize("name", BOUNDS)
def test_parts_of_batches_make_the_same_kernel(name, x64):
    case, bounds = cases()[name], dict.fromkeys(PAIRS, BOUNDS[name])
    # Between two batches, and once with itself: then one side's rows are those of the other.
    others = () if name == "pytree" else (other_batch(case),)
    with pytest.raises(ValueError, match=r"the work on two examples may take"):
        jax.eval_shape(lambda: all_kernels(case, *others, full=BOUNDS[name] // 4))
    expected = dense_kernels(case, *others)
    for kernel, pairs in zip(all_kernels(case, *others, **bounds), PAIRS, strict=True):
        np.testing.assert_allclose(
            kernel, expected[pairs], rtol=0, atol=1e-13 * np.abs(expected["full"]).max()
        )


@pytest.mark.parametrize("name", cases())
def test_only_models_of_independent_examples_are_cut(name):
    case = cases()[name]
    params, batch = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32), (case.params, {**case.batch, "ids": jnp.ones(1)})
    )
    batch["ids"] = case.batch["ids"].astype(jnp.int32)
    assert cut_of(case.model, params, batch).apart is case.apart


@jax.custom_vjp
def pulled_back(h):
    return h


pulled_back.defvjp(
    lambda h: (h, None),
    lambda _, cotangent: (cotangent - jnp.mean(cotangent, axis=0, keepdims=True),),
)


def test_a_pull_back_that_the_user_wrote_is_not_trusted(x64):
    """Examples meet in it, and the model does not show that."""
    case = cases()["perceptron"]

    def model(params, batch):
        return pulled_back(perceptron(params, batch))

    assert cut_of(case.model, case.params, case.batch).apart
    assert not cut_of(model, case.params, case.batch).apart


@pytest.mark.parametrize("total", range(1, 7))
def test_blocks_are_assembled_to_the_whole(total):
    whole = jnp.arange(2 * total).reshape(total, 2)
    for length in range(1, total + 1):
        for axis in (0, 1):

            def block(start, length=length, axis=axis):
                part = jax.lax.dynamic_slice_in_dim(whole, start, length)
                return {"rows": part if axis == 0 else part.T}

            found = assemble(block, total, length, axis)["rows"]
            np.testing.assert_array_equal(found, whole if axis == 0 else whole.T)


def test_a_leaf_that_only_looks_like_examples_is_not_cut(x64):
    """Weights of as many outputs as there are examples."""
    batch = {"x": oracles.normal(4, 3, seed=1), "weights": jnp.arange(1.0, 5)}
    case = Case(
        lambda p, b: (b["x"] @ p["w"]) * b["weights"][None, :],
        {"w": oracles.normal(3, 4, seed=2)},
        batch,
        False,
    )
    assert not cut_of(case.model, case.params, batch).apart
    kernel = gnlin.kernel.empirical_ntk(objective_of(case), case.params, batch)
    np.testing.assert_allclose(kernel, dense_kernels(case)["full"], rtol=1e-12)


def test_ways_to_contract_that_depend_on_the_batch(x64):
    """Layers of two examples may be no layers of sixty. None of their rows may be lost."""
    weights = oracles.normal(10, 10, seed=1), oracles.normal(10, 10, seed=2)
    objective = gnlin.Objective(lambda p, b: jnp.einsum("ni,ij,jk->nk", b, p[0], p[1]), loss)
    x = oracles.normal(60, 10, seed=3)
    inputs, outputs = x @ weights[0], weights[1]
    expected = 10 * (inputs @ inputs.T) + (x @ x.T) * jnp.sum(outputs**2)
    for bound in (2**32, 2**20):
        kernel = gnlin.kernel.empirical_ntk(objective, weights, x, pairs="trace", max_bytes=bound)
        np.testing.assert_allclose(kernel, expected, rtol=1e-10)


def test_batch_normalisation_within_a_bound():
    """The bound is on what is needed, not on what could be used."""
    params = {"in": jnp.ones((64, 256)) / 8, "out": jnp.ones((256, 10)) / 16}
    data = {"x": jnp.asarray(np.random.default_rng(0).standard_normal((32, 64)), jnp.float32)}
    objective = gnlin.Objective(batch_statistics, loss)
    for bound in (2**24, 2**28, 2**31):
        jax.eval_shape(
            lambda bound=bound: gnlin.kernel.empirical_ntk(
                objective, params, data, pairs="trace", max_bytes=bound
            )
        )


def test_one_example(x64):
    case = cases()["perceptron"]
    one = jax.tree.map(lambda leaf: leaf[:1], {name: case.batch[name] for name in ("x",)})
    kernel = gnlin.kernel.empirical_ntk(
        objective_of(case), case.params, one, {"x": case.batch["x"]}
    )
    np.testing.assert_allclose(kernel, dense_kernels(case)["full"][:1], rtol=1e-12)


@pytest.mark.parametrize("centred", [False, True], ids=["apart", "mixed"])
def test_a_model_that_uses_no_parameter_has_a_kernel_of_zeros(centred):
    def model(params, batch):
        mean = jnp.mean(batch["x"], axis=0, keepdims=True) if centred else 0.0
        return batch["x"] - mean

    case = cases()["perceptron"]
    params, batch = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32), (case.params, {"x": case.batch["x"]})
    )
    for pairs, shape in {"full": (N, 3, N, 3), "diagonal": (3, N, N), "trace": (N, N)}.items():
        kernel = gnlin.kernel.empirical_ntk(
            gnlin.Objective(model, loss), params, batch, pairs=pairs
        )
        np.testing.assert_array_equal(kernel, np.zeros(shape, np.float32))


def test_data_that_is_bound(x64):
    case = cases()["perceptron"]
    kernel = gnlin.kernel.empirical_ntk(objective_of(case).bind(case.batch), case.params)
    np.testing.assert_allclose(kernel, dense_kernels(case)["full"], rtol=1e-12)
    free = gnlin.Objective.least_squares(lambda p: perceptron(p, case.batch))
    np.testing.assert_allclose(
        gnlin.kernel.empirical_ntk(free, case.params), dense_kernels(case)["full"], rtol=1e-12
    )


def test_parameters_of_low_precision():
    case = cases()["perceptron"]
    params, batch = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), (case.params, {"x": case.batch["x"]})
    )
    kernel = gnlin.kernel.empirical_ntk(objective_of(case), params, batch, pairs="trace")
    exact = dense_kernels(
        case._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    )["trace"]
    assert kernel.dtype == jnp.float32
    np.testing.assert_allclose(
        kernel, exact, rtol=0, atol=tolerance(jnp.bfloat16)["atol"] * np.abs(exact).max()
    )


def wide(examples):
    """A perceptron 32-256-256-10 and a batch of shapes alone."""
    sizes = ((32, 256), (256, 256), (256, 10))
    params = [
        (jax.ShapeDtypeStruct(size, jnp.float32), jax.ShapeDtypeStruct(size[1:], jnp.float32))
        for size in sizes
    ]
    return params, jax.ShapeDtypeStruct((examples, 32), jnp.float32)


def deep(params, x):
    for index, (weight, bias) in enumerate(params):
        x = (jnp.tanh(x) if index else x) @ weight + bias[None, :]
    return x


def images(examples):
    shapes = {"kernel": (3, 3, 1, 16), "shift": (16,), "out": (5, 10)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return params, {"images": jax.ShapeDtypeStruct((examples, 16, 16, 1), jnp.float32)}


def words(examples):
    shapes = {"table": (50, 64), "scale": (64,), "mix": (64, 64), "out": (64, 10)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return params, {"ids": jax.ShapeDtypeStruct((examples, 16), jnp.int32)}


def normalised(examples):
    """Cannot be cut."""
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in {"in": (32, 64), "out": (64, 10)}.items()
    }
    return params, {"x": jax.ShapeDtypeStruct((examples, 32), jnp.float32)}


@pytest.mark.parametrize(
    ("model", "shapes", "bounds", "pairs"),
    [
        (deep, wide, (6, 24), "full"),
        (deep, wide, (6,), "trace"),
        (convolution, images, (16, 64), "full"),
        (convolution, images, (16,), "diagonal"),
        (attention, words, (64,), "full"),
        (attention, words, (64,), "trace"),
        (batch_statistics, normalised, (48,), "full"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_memory_stays_within_the_bound(model, shapes, bounds, pairs):
    """By XLA's own account; a full kernel by itself takes 4 MiB."""
    objective, shapes = gnlin.Objective(third_party_model(model), loss), shapes(100)
    for bound in bounds:
        options = {"pairs": pairs, "max_bytes": bound * 2**20}
        lowered = jax.jit(
            lambda params, batch, options=options: gnlin.kernel.empirical_ntk(
                objective, params, batch, **options
            )
        ).lower(*shapes)
        memory = lowered.compile().memory_analysis()
        assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= bound * 2**20


def test_a_million_parameters_two_thousand_examples_and_ten_outputs_fit_in_four_gigabytes():
    sizes = ((784, 700), (700, 700), (700, 10))
    params = [
        (jax.ShapeDtypeStruct(size, jnp.float32), jax.ShapeDtypeStruct(size[1:], jnp.float32))
        for size in sizes
    ]
    shapes = params, jax.ShapeDtypeStruct((2000, 784), jnp.float32)
    objective = gnlin.Objective(third_party_model(deep), loss)
    compiled = (
        jax.jit(lambda params, x: gnlin.kernel.empirical_ntk(objective, params, x))
        .lower(*shapes)
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= 2**32


def test_layers_save_work():
    """Of a wide layer the Jacobian is never formed: its products would be most of the work."""
    params, x = wide(64)

    def plain(params, x):
        rows = jax.vmap(lambda one: jax.jacrev(lambda params: deep(params, one[None])[0])(params))(
            x
        )
        rows = jnp.concatenate(
            [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(rows)], axis=-1
        )
        return jnp.einsum("ncp,mdp->ncmd", rows, rows)

    objective = gnlin.Objective(deep, loss)
    functions = plain, lambda params, x: gnlin.kernel.empirical_ntk(objective, params, x)
    flops = [
        jax.jit(each).lower(params, x).compile().cost_analysis()["flops"] for each in functions
    ]
    assert flops[0] > 20 * flops[1]


def test_a_single_example_costs_no_more_than_two():
    """The usual question to kernel regression: one point to predict, many to learn from."""
    params, x = wide(64)
    objective = gnlin.Objective(deep, loss)

    def flops(examples):
        one = jax.ShapeDtypeStruct((examples, 32), jnp.float32)
        compiled = (
            jax.jit(lambda *args: gnlin.kernel.empirical_ntk(objective, *args))
            .lower(params, one, x)
            .compile()
        )
        return compiled.cost_analysis()["flops"]

    assert flops(1) <= flops(2)


@pytest.mark.parametrize("name", ["perceptron", "pytree", "batch statistics"])
def test_products_with_the_kernel(name, x64):
    case, other = cases()[name], other_batch(cases()[name])
    full = dense_kernels(case, other)["full"]
    product = gnlin.kernel.ntk_vector_product(objective_of(case), case.params, case.batch, other)
    vector = jax.tree.map(jnp.cos, case.model(case.params, other))
    rows = np.concatenate([leaf.reshape(M, -1) for leaf in jax.tree.leaves(vector)], axis=1)
    expected = np.einsum("ncmd,md->nc", full, rows)
    found = np.concatenate(
        [leaf.reshape(N, -1) for leaf in jax.tree.leaves(product(vector))], axis=1
    )
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


# How kernels compare.


def test_alignment_and_distance_in_numpy(x64):
    case = cases()["perceptron"]
    moved = case._replace(
        params=jax.tree.map(lambda leaf: leaf + 0.3 * jnp.sin(9 * leaf), case.params)
    )
    for pairs, kernel in dense_kernels(case).items():
        other, examples = (
            dense_kernels(moved)[pairs],
            {"full": (0, 2), "diagonal": (1, 2), "trace": (0, 1)}[pairs],
        )
        centre = np.eye(N) - 1 / N
        centred = [np.moveaxis(each, examples, (-2, -1)) for each in (kernel, other)]
        centred = [centre @ each @ centre for each in centred]
        for pair, is_centred in (((kernel, other), False), (centred, True)):
            cosine = np.sum(pair[0] * pair[1]) / np.sqrt(
                np.sum(pair[0] ** 2) * np.sum(pair[1] ** 2)
            )
            found = gnlin.kernel.kernel_alignment(kernel, other, centred=is_centred)
            np.testing.assert_allclose(found, cosine, rtol=1e-12)
            assert 0 < cosine < 0.999
        distance = np.sqrt(np.sum((kernel - other) ** 2) / np.sum(other**2))
        np.testing.assert_allclose(
            gnlin.kernel.kernel_distance(kernel, other), distance, rtol=1e-12
        )


def test_alignment_knows_neither_scale_nor_order(x64):
    case = cases()["perceptron"]
    objective, batch = objective_of(case), case.batch
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.sin(9 * leaf), case.params)
    a, b = (gnlin.kernel.empirical_ntk(objective, params, batch) for params in (case.params, moved))
    alignment = gnlin.kernel.kernel_alignment(a, b)
    np.testing.assert_allclose(
        gnlin.kernel.kernel_alignment(1e150 * a, 1e-150 * b), alignment, rtol=1e-12
    )
    # Hidden units in another order, and parameters in another tree.
    order = jnp.asarray([3, 1, 4, 0, 2])

    def renamed(params, batch):
        return perceptron({"in": params[2], "bias": params[0], "out": params[1]}, batch)

    tuples = [(p["bias"][order], p["out"][order], p["in"][:, order]) for p in (case.params, moved)]
    again = [
        gnlin.kernel.empirical_ntk(gnlin.Objective(renamed, loss), params, batch)
        for params in tuples
    ]
    np.testing.assert_allclose(gnlin.kernel.kernel_alignment(*again), alignment, rtol=1e-12)
    reversed_, shuffled = (kernel[::-1, :, ::-1] for kernel in (a, b))
    np.testing.assert_allclose(
        gnlin.kernel.kernel_alignment(reversed_, shuffled), alignment, rtol=1e-12
    )
    assert gnlin.kernel.kernel_alignment(a, a) == pytest.approx(1, abs=1e-14)


def test_what_vanishes_is_no_nan():
    zero, some = jnp.zeros((3, 3)), jnp.eye(3)
    assert gnlin.kernel.kernel_alignment(zero, some) == 0
    assert gnlin.kernel.kernel_alignment(jnp.ones((3, 3)), some) == 0  # vanishes when centred
    assert gnlin.kernel.kernel_distance(zero, zero) == 0
    assert gnlin.kernel.kernel_distance(some, zero) == jnp.inf
    assert gnlin.kernel.effective_rank(zero) == 0
    for lost in (
        jnp.nan * some,
        jnp.inf * jnp.ones((3, 3)),
    ):  # and what is not finite is not taken for nothing
        assert jnp.isnan(gnlin.kernel.kernel_distance(lost, some))
        assert jnp.isnan(gnlin.kernel.effective_rank(lost))
    assert jnp.isnan(gnlin.kernel.kernel_alignment(jnp.nan * some, some))


def test_spectrum_and_effective_rank(x64):
    case = cases()["pytree"]
    for pairs, kernel in dense_kernels(case).items():
        square = (
            kernel.reshape(kernel.shape[0] * kernel.shape[1], -1) if pairs == "full" else kernel
        )
        values = np.linalg.svd(square, compute_uv=False)
        # Absolute: rounding is relative to the largest.
        np.testing.assert_allclose(
            gnlin.kernel.kernel_spectrum(kernel), values, rtol=0, atol=1e-12 * values.max()
        )
        shares = values / values.sum(axis=-1, keepdims=True)
        expected = np.exp(
            -np.sum(
                np.where(shares > 1e-15, shares * np.log(np.maximum(shares, 1e-300)), 0), axis=-1
            )
        )
        np.testing.assert_allclose(gnlin.kernel.effective_rank(kernel), expected, rtol=1e-10)


# Bad input.


def test_errors_name_the_argument():
    objective = gnlin.Objective(lambda p, b: b["x"] @ p, loss)
    params, batch = jnp.ones((3, 2)), {"x": jnp.ones((4, 3))}
    kernel = functools.partial(gnlin.kernel.empirical_ntk, objective, params, batch)
    with pytest.raises(ValueError, match=r"`pairs` must be one of .*; got 'mean'"):
        kernel(pairs="mean")
    with pytest.raises(ValueError, match=r"`max_bytes` must be positive; got 0"):
        kernel(max_bytes=0)
    with pytest.raises(TypeError, match=r"`max_bytes` must be a number; got '4G'"):
        kernel(max_bytes="4G")
    with pytest.raises(
        ValueError,
        match=r'`max_bytes` is 255, but the kernel by itself takes 256: .*pairs="trace"',
    ):
        kernel(max_bytes=255)
    with pytest.raises(
        ValueError,
        match=r"`max_bytes` leaves 44 bytes .* two examples may take \d+: raise it by \d+",
    ):
        kernel(max_bytes=300)
    with pytest.raises(ValueError, match=r"`other` must have the structure of `batch`"):
        kernel((jnp.ones((4, 3)),))
    with pytest.raises(ValueError, match=r"`other` needs an objective without data of its own"):
        gnlin.kernel.empirical_ntk(objective.bind(batch), params, other=batch)
    with pytest.raises(ValueError, match=r"`batch` needs an objective without data of its own"):
        gnlin.kernel.empirical_ntk(objective.bind(batch), params, batch)
    with pytest.raises(ValueError, match=r"`batch` is missing"):
        gnlin.kernel.empirical_ntk(objective, params)
    with pytest.raises(ValueError, match=r"`batch` is empty: \{'x': \(0, 3\)\}"):
        gnlin.kernel.empirical_ntk(objective, params, {"x": jnp.ones((0, 3))})
    with pytest.raises(TypeError, match=r"params\['n'\] has dtype int32"):
        gnlin.kernel.empirical_ntk(objective, {"n": jnp.int32(1)}, batch)
    with pytest.raises(TypeError, match=r"`objective` must be a gnlin.Objective"):
        gnlin.kernel.ntk_vector_product(perceptron, params, batch)
    uneven = gnlin.Objective(lambda p, b: (b["x"] @ p, jnp.sum(p)), loss)
    with pytest.raises(
        ValueError,
        match=r"`model` must return outputs with one and the same number .*\(4, 2\), \(\)",
    ):
        gnlin.kernel.empirical_ntk(uneven, params, batch)
    longer = gnlin.Objective(lambda p, b: b["x"] @ p @ p.T[:, : len(b["x"])], loss)
    with pytest.raises(ValueError, match=r"`other` has 2 outputs of an example, but `batch` has 3"):
        gnlin.kernel.empirical_ntk(longer, params, batch, {"x": jnp.ones((2, 3))})


def test_errors_of_comparisons():
    with pytest.raises(ValueError, match=r"kernels must have the shape .* \[\(2, 2\), \(3, 3\)\]"):
        gnlin.kernel.kernel_alignment(jnp.eye(2), jnp.eye(3))
    with pytest.raises(ValueError, match=r"kernels must have the shape .* \[\(2,\), \(2,\)\]"):
        gnlin.kernel.kernel_distance(jnp.ones(2), jnp.ones(2))
    with pytest.raises(
        ValueError, match=r"`kernel` must be between a batch and itself; got the shape \(2, 3\)"
    ):
        gnlin.kernel.effective_rank(jnp.ones((2, 3)))
