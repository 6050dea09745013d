"""Tasks made here: sparse parity, Poisson's equation, and the text of the standard library."""

import ast
import dataclasses
import functools
import math
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import third_party, tolerance

import gnlin
from gnlin.compare.runs.study import facts
from gnlin.compare.tasks.parity import sparse_parity
from gnlin.compare.tasks.poisson import init, laplacian, network, poisson_pinn, residuals
from gnlin.compare.tasks.task import DataError
from gnlin.compare.tasks.text import (
    CHARACTERS,
    MODULES,
    chars,
    chars_deep,
    chars_large_batch,
    documentation,
    windows,
)

LOADERS = {
    "sparse-parity": sparse_parity,
    "poisson-pinn": poisson_pinn,
    "chars": chars,
    "chars-large-batch": chars_large_batch,
    "chars-deep": chars_deep,
}


@functools.cache
def loaded(name):
    return LOADERS[name]()


@pytest.fixture(scope="module", params=LOADERS)
def task(request):
    return loaded(request.param)


def first(batch, size):
    return jax.tree.map(lambda leaf: leaf[:size], batch)


# What holds of each.


def test_loading_again_gives_the_same_data(task):
    again = LOADERS[task.name]()
    jax.tree.map(
        np.testing.assert_array_equal, (task.train, task.held_out), (again.train, again.held_out)
    )
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves((task.train, task.held_out))}
    assert kinds <= ({"float64"} if task.double else {"float32", "int32"})
    assert all(
        isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((task.train, task.held_out))
    )


def test_adam_lowers_the_loss(task):
    with task.precision():
        small = first(task.train, 32)
        tx = optax.adam(0.01)

        @jax.jit
        def step(params, opt_state):
            value, grads = task.objective.value_and_grad(params, small)
            updates, opt_state = third_party(tx.update)(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, value

        params = task.init(jax.random.key(0))
        opt_state = third_party(tx.init)(params)
        values = []
        for _ in range(15):
            params, opt_state, value = step(params, opt_state)
            values.append(value)
        assert values[-1] < 0.9 * values[0]
        assert {leaf.dtype.name for leaf in jax.tree.leaves((params, values))} == {
            "float64" if task.double else "float32"
        }


def test_quality_is_one_number_and_starts_unsolved(task):
    with task.precision():
        params = task.init(jax.random.key(0))
        value = task.quality.objective.value(
            params, jax.tree.map(jnp.asarray, first(task.held_out, 32))
        )
        assert not facts(task).is_solved(float(value))


# Sparse parity.


def test_parity_is_that_of_the_first_four_bits():
    task = loaded("sparse-parity")
    for part, size in ((task.train, 32_768), (task.held_out, 4096)):
        assert part["x"].shape == (size, 40)
        np.testing.assert_array_equal(np.abs(part["x"]), np.ones((size, 40)))
        np.testing.assert_array_equal(
            part["y"], (np.prod(part["x"][:, :4], axis=1) < 0).astype(int)
        )
        assert abs(part["y"].mean() - 0.5) < 4 * 0.5 / math.sqrt(size)


def test_no_held_out_example_of_parity_trains():
    task = loaded("sparse-parity")
    rows = np.packbits(np.concatenate([task.train["x"], task.held_out["x"]]) > 0, axis=1)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_features_are_far_fewer_than_parities():
    params = loaded("sparse-parity").init(jax.random.key(0))
    assert gnlin.tree.size(params) == 5506
    assert gnlin.tree.size(params) < 0.065 * math.comb(40, 4)


# Poisson's equation.


def test_laplacian_is_the_trace_of_the_hessian(x64):
    params = init(jax.random.key(3))
    points = jnp.asarray(np.random.default_rng(1).uniform(size=(5, 2)))
    hessians = jax.vmap(jax.hessian(lambda point: network(params, point[None])[0]))(points)
    expected = jnp.trace(hessians, axis1=1, axis2=2)
    np.testing.assert_allclose(
        laplacian(lambda at: network(params, at), points), expected, **tolerance(jnp.float64)
    )


def test_solution_solves_the_equation(x64):
    task = loaded("poisson-pinn")

    def solution(points):
        return jnp.sin(jnp.pi * points[:, 0]) * jnp.sin(jnp.pi * points[:, 1])

    interior = jnp.asarray(task.train["interior"])
    np.testing.assert_allclose(
        -laplacian(solution, interior), task.train["source"], **tolerance(jnp.float64, 64)
    )
    np.testing.assert_allclose(
        solution(jnp.asarray(task.held_out["x"])), task.held_out["u"], **tolerance(jnp.float64)
    )


def test_points_lie_where_they_should():
    task = loaded("poisson-pinn")
    interior, wall = task.train["interior"], task.train["wall"]
    assert ((interior > 0) & (interior < 1)).all()
    for coordinate in range(2):
        for side in (0.0, 1.0):
            assert (wall[:, coordinate] == side).sum() == 16
    assert ((wall >= 0) & (wall <= 1)).all()
    assert task.train_size == 256


def test_residuals_are_differences_of_the_network_and_make_up_the_loss(x64):
    """The Laplacian by central differences."""
    task = loaded("poisson-pinn")
    params = init(jax.random.key(2))
    interior, h = task.train["interior"], 1e-4
    shifts = [h * direction for direction in (*np.eye(2), *-np.eye(2))]
    around = sum(np.asarray(network(params, interior + shift[None])) for shift in shifts)
    second = (around - 4 * np.asarray(network(params, interior))) / h**2
    r = residuals(params, task.train)
    # Differences cancel to ε/h² and truncate at h².
    np.testing.assert_allclose(
        r["interior"] * 16, -second - task.train["source"], rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(r["wall"] * 8, network(params, task.train["wall"]), rtol=1e-12)
    half_mean_squares = ((second + task.train["source"]) ** 2).mean() / 2 + (
        np.asarray(r["wall"]) ** 2
    ).sum() / 2
    np.testing.assert_allclose(
        task.objective.value(params, task.train), half_mean_squares, rtol=1e-7
    )


def test_relative_error_is_one_for_the_zero_function(x64):
    task = loaded("poisson-pinn")
    zero = jax.tree.map(jnp.zeros_like, init(jax.random.key(0)))
    assert task.quality.objective.value(zero, task.held_out) == pytest.approx(1.0)


def test_levenberg_marquardt_gets_most_of_the_way_in_thirty_steps(x64):
    task = loaded("poisson-pinn")
    solver = gnlin.CG(max_iterations=100, rtol=1e-6)
    tx = gnlin.levenberg_marquardt(task.objective, damping=1e-3, solver=solver)
    step = jax.jit(lambda params, opt_state: tx.update(None, opt_state, params, batch=task.train))
    params = task.init(jax.random.key(0))
    opt_state = tx.init(params)
    for _ in range(30):
        updates, opt_state = step(params, opt_state)
        params = optax.apply_updates(params, updates)
    assert task.quality.objective.value(params, task.held_out) < 0.1


# Text.


def test_a_later_character_changes_no_earlier_prediction():
    task = loaded("chars")
    params = task.init(jax.random.key(0))
    batch = first(task.held_out, 4)
    logits = jax.jit(task.objective.model)(params, batch)
    assert logits.shape == (4, 31, len(CHARACTERS))
    changed = batch["x"].copy()
    changed[:, 20] = (changed[:, 20] + 1) % len(CHARACTERS)
    others = jax.jit(task.objective.model)(params, {"x": changed})
    np.testing.assert_array_equal(others[:, :20], logits[:, :20])
    for after in (20, 30):
        assert (np.abs(others[:, after] - logits[:, after]).max(axis=-1) > 0).all()


def unrolled(params, x):
    """The logits of characters x (N, T), block after block and head after head, in NumPy."""

    def normalised(vectors, gain):
        centred = vectors - vectors.mean(-1, keepdims=True)
        return gain * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    hidden = params["embedding"][x] + params["positions"][: x.shape[1]]
    width, length = hidden.shape[-1], x.shape[1]
    for number in range(len(params["blocks"]["project"])):
        block = {name: leaf[number] for name, leaf in params["blocks"].items()}
        mixed = normalised(hidden, block["norm_attention"]) @ block["query_key_value"]
        query, key, value = np.split(mixed, 3, axis=-1)
        heads = []
        for head in range(width // 16):
            own = slice(16 * head, 16 * head + 16)
            scores = np.exp(query[..., own] @ key[..., own].swapaxes(1, 2) / 4)
            scores *= np.tril(np.ones((length, length)))
            heads.append(scores / scores.sum(-1, keepdims=True) @ value[..., own])
        hidden = hidden + np.concatenate(heads, axis=-1) @ block["project"]
        inner = normalised(hidden, block["norm_dense"]) @ block["in"] + block["bias"]
        bent = np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3))
        hidden = hidden + 0.5 * inner * (1 + bent) @ block["out"]
    return normalised(hidden, params["norm"]) @ params["output"]


@pytest.mark.parametrize(("name", "size"), [("chars", 32_128), ("chars-deep", 212_480)])
def test_the_loop_over_blocks_is_the_network_defined(name, size):
    task = loaded(name)
    params = task.init(jax.random.key(0))
    assert gnlin.tree.size(params) == size
    generator = np.random.default_rng(0)
    params = jax.tree.map(  # gains and biases that matter
        lambda leaf: leaf + np.float32(0.1) * generator.normal(size=leaf.shape).astype(np.float32),
        params,
    )
    batch = first(task.held_out, 3)
    logits = jax.jit(task.objective.model)(params, batch)
    np.testing.assert_allclose(logits, unrolled(params, batch["x"]), rtol=1e-3, atol=1e-4)


def test_blocks_start_apart_and_with_weights_of_their_fan_in():
    blocks = loaded("chars-deep").init(jax.random.key(0))["blocks"]
    for name, fan_in in (("query_key_value", 64), ("project", 64), ("in", 64), ("out", 256)):
        for number in range(4):
            weights = np.asarray(blocks[name][number])
            assert weights.std() == pytest.approx(1 / math.sqrt(fan_in), rel=0.05)
            assert np.abs(weights - blocks[name][number - 1]).max() > 1 / math.sqrt(fan_in)


def test_windows_are_the_text_and_every_ninth_is_held_out():
    task = loaded("chars")
    text = "".join(c if c in CHARACTERS else "?" for c in documentation(MODULES))
    expected = [text[i * 32 : (i + 1) * 32] for i in range(4608)]

    def read(part):
        whole = np.concatenate([part["x"], part["y"][:, -1:]], axis=1)
        np.testing.assert_array_equal(part["y"], whole[:, 1:])
        return ["".join(CHARACTERS[code] for code in row) for row in whole]

    assert read(task.held_out) == expected[8::9]
    assert read(task.train) == [window for i, window in enumerate(expected) if i % 9 != 8]


def test_bits_are_nats_over_log_two_and_an_even_guess_costs_log_two_of_the_alphabet():
    task = loaded("chars")
    batch = first(task.held_out, 4)
    flat = dataclasses.replace(
        task.objective, model=lambda params, batch: jnp.zeros((*batch["x"].shape, 96))
    )
    assert flat.value({}, batch) == pytest.approx(math.log(96), rel=1e-6)
    judged = dataclasses.replace(task.quality.objective, model=flat.model)
    assert judged.value({}, batch) == pytest.approx(math.log2(96), rel=1e-6)


def test_documentation_is_that_of_the_sources():
    text = documentation(["bisect"])
    tree = ast.parse((Path(sysconfig.get_path("stdlib")) / "bisect.py").read_text(encoding="utf-8"))
    assert text.startswith("Bisection algorithms.\n\nInsert item x in list a")
    assert text.count("\n\n") >= sum(isinstance(node, ast.FunctionDef) for node in tree.body)


def test_characters_outside_the_alphabet_become_question_marks():
    coded = windows("aé\n" + "b" * 29, 1)["x"][0]
    assert [CHARACTERS[code] for code in coded[:4]] == ["a", "?", "\n", "b"]


def test_absent_sources_are_named(tmp_path):
    with pytest.raises(DataError, match=r"argparse\.py cannot be read"):
        documentation(MODULES, tmp_path)
    (tmp_path / "short.py").write_text('"""Too short."""')
    with pytest.raises(DataError, match=r"needs 64 characters of text and found 10"):
        windows(documentation(["short"], tmp_path), 2)
