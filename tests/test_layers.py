"""Inputs and cotangents of dense layers, read from a linearisation, for many ways to write them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from problems import third_party_model

from gnlin.structure.layers import matrix_shape, read_dense_layers
from gnlin.structure.layers.inspector import inspect
from gnlin.structure.layers.notes import Bias


def normal(*shape):
    return oracles.normal(*shape, seed=sum(shape)).astype(jnp.float32)


X, SEQUENCE, IMAGES = normal(5, 3), normal(5, 6, 8), normal(2, 8, 8, 3)
WEIGHTS = {"a": normal(3, 4), "b": normal(4), "c": normal(4, 2), "d": normal(2)}
TRANSPOSED = {"a": normal(4, 3), "b": normal(4), "c": normal(2, 4), "d": normal(2)}


def row(vector):
    return vector[None]


def perceptron(p):
    return jnp.tanh(X @ p["a"] + row(p["b"])) @ p["c"] + row(p["d"])


def transposed(p):
    return jnp.tanh(X @ p["a"].T + row(p["b"])) @ p["c"].T + row(p["d"])


def mapped(p):
    return jax.vmap(lambda x: p["c"] @ jnp.tanh(p["a"] @ x + p["b"]) + p["d"])(X)


def one_example(p):
    return p["c"].T @ jnp.tanh(X[0] @ p["a"] + p["b"]) + p["d"]


def called(p):
    return jax.jit(lambda a: jax.checkpoint(lambda a: jnp.tanh(X @ a + row(p["b"])))(a))(
        p["a"]
    ) @ p["c"] + row(p["d"])


def half(p):
    return jnp.tanh(X.astype(jnp.bfloat16) @ p["a"].astype(jnp.bfloat16)) @ p["c"].astype(
        jnp.bfloat16
    )


def heads(p):
    inner = jnp.tanh(jnp.einsum("ntd,dhk->nthk", SEQUENCE, p["q"]) + p["qb"][None, None])
    return jnp.einsum("nthk,hkd->ntd", inner, p["o"]) + p["ob"][None, None]


def convolution(p):
    numbers = ("NHWC", "HWIO", "NHWC")
    hidden = jax.lax.conv_general_dilated(IMAGES, p["k"], (2, 2), "SAME", dimension_numbers=numbers)
    return jnp.tanh(hidden + p["b"][None, None, None]).reshape(2, -1) @ p["c"]


def channels_first(p):
    images = IMAGES.transpose(0, 3, 1, 2)
    hidden = jax.lax.conv_general_dilated(images, p["k"], (2, 1), "VALID", rhs_dilation=(1, 2))
    return jnp.tanh(hidden + p["b"][None, :, None, None]).reshape(2, -1) @ p["c"]


def patches(p):
    return jnp.tanh(normal(5, 7, 18) @ p["k"].reshape(-1, 4) + p["b"][None, None]) @ p["c"]


def shared(p):
    return jnp.tanh(jnp.tanh(X @ p["a"] + row(p["b"])) @ p["a"] + row(p["b"])) @ p["c"]


def looped(p):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["a"]), None), X, length=3)[0] @ p["c"]


def seen_without_its_bias(p):
    product = X @ p["a"]
    return jnp.tanh(product + row(p["b"])) @ p["c"] + jnp.sin(product) @ p["e"]


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(8)(x))
        x = x + nn.MultiHeadDotProductAttention(2)(x, x)
        return nn.Dense(3)(nn.gelu(nn.Dense(7)(x)))


def attention_of_flax(params):
    return third_party_model(lambda params: Transformer().apply(params, SEQUENCE))(params)


def parameters_of_flax():
    return third_party_model(jax.jit(Transformer().init))(jax.random.key(0), SEQUENCE)


KERNEL = {"k": normal(3, 3, 3, 4), "b": normal(4), "c": normal(64, 2)}
# name, function, parameters (or what makes them), pairs (weight, bias) that are layers
CASES = [
    ("perceptron", perceptron, WEIGHTS, ["ab", "cd"]),
    ("transposed weights", transposed, TRANSPOSED, ["ab", "cd"]),
    ("vmap over examples", mapped, TRANSPOSED, ["ab", "cd"]),
    ("one example", one_example, WEIGHTS, ["ab", "cd"]),
    ("jit and remat", called, WEIGHTS, ["ab", "cd"]),
    ("bfloat16 products", half, {"a": WEIGHTS["a"], "c": WEIGHTS["c"]}, ["a", "c"]),
    (
        "attention",
        heads,
        {"q": normal(8, 2, 4), "qb": normal(2, 4), "o": normal(2, 4, 8), "ob": normal(8)},
        None,
    ),
    ("convolution", convolution, KERNEL, ["kb", "c"]),
    (
        "channels first",
        channels_first,
        {"k": normal(4, 3, 3, 3), "b": normal(4), "c": normal(48, 2)},
        ["kb", "c"],
    ),
    (
        "kernel as a matrix",
        patches,
        {"k": normal(3, 3, 2, 4), "b": normal(4), "c": normal(4, 2)},
        ["kb", "c"],
    ),
    ("shared weights", shared, {"a": normal(3, 3), "b": normal(3), "c": normal(3, 2)}, ["c"]),
    ("inside a loop", looped, {"a": normal(3, 3), "c": normal(3, 2)}, ["c"]),
    ("without its bias", seen_without_its_bias, {**WEIGHTS, "e": normal(4, 2)}, ["a", "c", "e"]),
    ("flax", attention_of_flax, parameters_of_flax, None),
]


@pytest.mark.parametrize(
    ("function", "params", "pairs"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_inputs_and_cotangents_make_the_gradient(function, params, pairs):
    params = params() if callable(params) else params
    outputs, jvp = jax.linearize(function, params)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    reading = read_dense_layers(jvp, params)
    cotangent = (
        jnp.cos(jnp.arange(outputs.size, dtype=jnp.float32))
        .reshape(outputs.shape)
        .astype(outputs.dtype)
    )
    transpose = jax.jit(lambda cotangent: jax.linear_transpose(jvp, params)(cotangent)[0])
    expected = jax.tree.leaves(transpose(cotangent))
    cotangents, others = jax.jit(reading.pull_back)(cotangent)

    tolerance = (
        {"rtol": 2e-2, "atol": 2e-2}
        if outputs.dtype == jnp.bfloat16
        else {"rtol": 1e-4, "atol": 1e-4}
    )
    seen = set(others)
    for layer, cotangent in zip(reading.layers, cotangents, strict=True):
        product = layer.inputs.astype(cotangent.dtype).T @ cotangent
        product = (product.T if layer.transposed else product).reshape(expected[layer.weight].shape)
        np.testing.assert_allclose(product.astype(jnp.float32), expected[layer.weight], **tolerance)
        seen.add(layer.weight)
        if layer.bias is not None:
            total = cotangent.sum(axis=0).reshape(expected[layer.bias].shape)
            np.testing.assert_allclose(total, expected[layer.bias], **tolerance)
            seen.add(layer.bias)
    for index, gradient in others.items():
        np.testing.assert_allclose(gradient, expected[index], **tolerance)
    assert seen == set(range(len(names)))
    if pairs is None:  # every matrix is in a layer
        matrices = {index for index, leaf in enumerate(expected) if leaf.ndim > 1}
        assert {layer.weight for layer in reading.layers} == matrices - {
            layer.bias for layer in reading.layers
        }
    else:
        found = [
            [layer.weight, *([] if layer.bias is None else [layer.bias])]
            for layer in reading.layers
        ]
        assert sorted("".join(names[i][2:-2] for i in pair) for pair in found) == sorted(pairs)


def test_what_is_no_layer_has_its_gradient():
    params = {"scale": normal(3), "table": normal(6, 3)}
    tokens = jnp.asarray([1, 5, 1])
    outputs, jvp = jax.linearize(lambda p: p["table"][tokens] * row(p["scale"]), params)
    layers, pull_back = read_dense_layers(jvp, params)
    expected = jax.linear_transpose(jvp, params)(jnp.ones_like(outputs))[0]
    assert layers == ()
    _, others = pull_back(jnp.ones_like(outputs))
    np.testing.assert_allclose(others[0], expected["scale"], rtol=1e-6)
    np.testing.assert_allclose(others[1], expected["table"], rtol=1e-6)


def test_a_leaf_that_is_repeated_is_in_no_layer():
    """It is used once for each repetition, and each has a cotangent of its own."""
    params = {"w": normal(8, 4)}

    def model(p):
        repeated = jnp.broadcast_to(p["w"][None], (6, 8, 4))
        return jnp.tensordot(SEQUENCE, repeated, axes=((1, 2), (0, 1)))

    outputs, jvp = jax.linearize(model, params)
    layers, pull_back = read_dense_layers(jvp, params)
    assert layers == ()
    _, others = pull_back(jnp.ones_like(outputs))
    expected = jax.linear_transpose(jvp, params)(jnp.ones_like(outputs))[0]
    np.testing.assert_allclose(others[0], expected["w"], rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((), (1, 1)),
        ((7,), (7, 1)),
        ((3, 5), (3, 5)),
        ((64, 4, 16), (64, 64)),  # features to heads
        ((4, 16, 64), (64, 64)),  # and back
        ((5, 32, 64), (160, 64)),  # a convolution along one axis
        ((2, 3, 2), (6, 2)),  # the later of two ties
        ((3, 3, 2, 4), (18, 4)),
        ((16, 1, 3, 3), (16, 9)),
        ((0, 3), (0, 3)),
    ],
)
def test_leaves_as_matrices(shape, sides):
    assert matrix_shape(shape) == sides


def test_notes_of_a_dense_layer():
    """The worked example at the head of the inspector."""
    params = [normal(3, 4), normal(4)]
    _, jvp = jax.linearize(lambda p: X @ p[0] + row(p[1]), params)
    push_forward = jax.make_jaxpr(jvp)(params)
    notes = inspect(push_forward, [leaf.shape for leaf in params])
    assert [equation.primitive.name for equation in push_forward.eqns] == [
        "dot_general",
        "broadcast_in_dim",
        "add",
    ]
    assert list(notes.sites) == [(0,), (2,)]
    dense, bias = notes.sites.values()
    assert (dense.kind, dense.leaf, dense.output.shape) == ("dense", 0, (5, 4))
    assert (dense.input_axes, dense.output_axes) == (((), (0,)), ((), (1,)))
    assert (bias.kind, bias.leaf, bias.output_axes) == ("bias", 1, ((), (0,)))
    assert dense.bias == Bias(leaf=1, sum=(2,), trail=(0,))
    assert notes.bias_holds((0,))
    np.testing.assert_array_equal(dense.inputs, X)
