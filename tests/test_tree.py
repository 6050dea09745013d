"""Pytree arithmetic, and the helper of the tests that says how exact it should be."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import tolerance

from gnlin import tree

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)
SHAPES = st.sampled_from([(), (1,), (3,), (2, 3), (0,), (2, 0)])


@st.composite
def trees(draw, values=st.floats(-100, 100, width=16), dtypes=st.sampled_from(FLOATS)):
    """Dictionaries that hold an array, a tuple of arrays and a None."""

    def array():
        shape = draw(SHAPES)
        entries = draw(st.lists(values, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        return jnp.asarray(np.array(entries, np.float32).reshape(shape)).astype(draw(dtypes))

    return {"a": array(), "pair": (array(), array()), "nothing": None}


def entries(data):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(data)])


@given(trees())
def test_flatten_and_unflatten_are_inverse(data):
    vector = tree.flatten(data, jnp.float32)
    assert vector.shape == (tree.size(data),)
    assert vector.dtype == jnp.float32
    chex.assert_trees_all_equal(tree.unflatten(vector, data), data)
    chex.assert_trees_all_equal_shapes_and_dtypes(tree.unflatten(vector, data), data)


def test_flatten_of_an_empty_tree():
    assert tree.flatten({"nothing": None}, jnp.float32).shape == (0,)


@given(trees())
def test_norm_and_inner_agree_with_float64(data):
    exact = entries(data)
    # Sums of at most 18 terms, compared with the size of what was summed.
    np.testing.assert_allclose(tree.norm(data), np.linalg.norm(exact), **tolerance(jnp.float32, 32))
    np.testing.assert_allclose(
        tree.inner(data, data), np.sum(exact**2), **tolerance(jnp.float32, 32)
    )
    assert tree.norm(data).dtype == jnp.float32
    assert tree.inner(data, data).dtype == jnp.float32


@given(st.integers(-18, 18), st.integers(1, 5))
def test_norm_neither_overflows_nor_underflows(exponent, count):
    """Entries near both ends of float32's range, whose squares are far out of it."""
    value = np.float32(10.0) ** np.float32(2 * exponent)
    norm = tree.norm([jnp.full(count, value), jnp.full((2, 2), value)])
    np.testing.assert_allclose(
        float(norm), float(value) * np.sqrt(count + 4), rtol=tolerance(jnp.float32)["rtol"]
    )


def test_norm_of_zero_and_of_what_is_not_finite():
    assert tree.norm({"w": jnp.zeros(3)}) == 0
    assert tree.norm({"nothing": None}) == 0
    assert jnp.isnan(tree.norm({"w": jnp.array([1.0, jnp.nan])}))
    assert not jnp.isfinite(tree.norm({"w": jnp.array([1.0, jnp.inf])}))


def test_inner_accumulates_in_float32():
    """4096 ones: a sum in bfloat16 stops at 256, where adding 1 no longer changes it."""
    ones = jnp.ones(4096, jnp.bfloat16)
    assert tree.inner(ones, ones) == 4096
    assert tree.inner(ones, ones).dtype == jnp.float32


def test_reductions_in_the_widest_dtype(x64):
    mixed = {"a": jnp.ones(3, jnp.float32), "b": jnp.full(2, 2.0, jnp.float64)}
    assert tree.inner(mixed, mixed) == 11
    assert tree.inner(mixed, mixed).dtype == jnp.float64
    assert tree.accumulation_dtype(mixed) == jnp.float64
    assert tree.accumulation_dtype({"a": jnp.ones(2, jnp.bfloat16)}) == jnp.float32
    assert tree.accumulation_dtype({}) == jnp.float32


@given(trees(), st.booleans())
def test_select_keeps_no_nan(data, condition):
    """The branch not taken may hold anything; structure and dtypes, those of booleans included,
    stay.
    """
    data = {**data, "flag": jnp.asarray(True)}
    poison = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, jnp.nan if leaf.dtype != bool else False), data
    )
    chosen = (
        tree.select(condition, data, poison) if condition else tree.select(condition, poison, data)
    )
    chex.assert_trees_all_equal(chosen, data)
    chex.assert_trees_all_equal_shapes_and_dtypes(chosen, data)


@given(trees(), st.floats(-10, 10, width=16))
def test_scaling_keeps_dtypes(data, factor):
    strength = jnp.asarray(factor, jnp.float32)
    for result in (tree.scale(strength, data), tree.add_scaled(data, strength, data)):
        chex.assert_trees_all_equal_shapes_and_dtypes(result, data)
    for leaf, scaled in zip(
        jax.tree.leaves(data), jax.tree.leaves(tree.scale(strength, data)), strict=True
    ):
        np.testing.assert_allclose(
            np.asarray(scaled, np.float64),
            factor * np.asarray(leaf, np.float64),
            **tolerance(leaf.dtype, 1000),
        )


def test_add_scaled_rounds_once():
    """1 + 1.5 · 2⁻⁹ lies nearer to 1 than to bfloat16's next number, 1 + 2⁻⁷; two such halves do
    not.
    """
    one, small = jnp.asarray(1.0, jnp.bfloat16), jnp.asarray(2.0**-9, jnp.bfloat16)
    assert tree.add_scaled(one, 1.5, small) == 1
    assert tree.add_scaled(one, 3.0, small) == 1 + 2.0**-7


def test_casts(x64):
    data = {"a": jnp.ones(2, jnp.float32), "b": (jnp.ones([], jnp.bfloat16), None)}
    like = {"a": jnp.ones(2, jnp.float64), "b": (jnp.ones([], jnp.float16), None)}
    chex.assert_trees_all_equal_shapes_and_dtypes(tree.cast_like(data, like), like)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree.cast(data, jnp.float64))} == {
        jnp.dtype("float64")
    }


def test_copy_has_buffers_of_its_own():
    data = {"w": jnp.ones(3), "b": (jnp.zeros([]), None)}
    for old, new in zip(jax.tree.leaves(data), jax.tree.leaves(tree.copy(data)), strict=True):
        assert old.unsafe_buffer_pointer() != new.unsafe_buffer_pointer()
        assert jnp.array_equal(old, new)


@given(trees(values=st.sampled_from([0.0, 1.0, -2.0, np.nan, np.inf])))
def test_finiteness_and_size(data):
    exact = entries(data)
    assert bool(tree.all_finite(data)) == bool(np.all(np.isfinite(exact)))
    assert tree.size(data) == exact.size
    np.testing.assert_array_equal(tree.max_abs(data), np.max(np.abs(exact), initial=0))


def test_holes_are_filled_from_the_whole():
    whole = {"a": jnp.ones(2), "b": (jnp.zeros(3), None), "c": {"d": jnp.ones([])}}
    hidden = {"a": optax.MaskedNode(), "b": (jnp.full(3, 7.0), None), "c": optax.MaskedNode()}
    assert tree.has_holes(hidden)
    assert not tree.has_holes(whole)
    filled = tree.fill_holes(hidden, whole)
    chex.assert_trees_all_equal(filled, {**whole, "b": (jnp.full(3, 7.0), None)})
    assert tree.fill_holes(whole, whole)["a"] is whole["a"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64], ids=str)
def test_tolerance_is_some_units_in_the_last_place(dtype):
    eps = float(jnp.finfo(dtype).eps)
    bounds = tolerance(dtype, scale=4)
    assert bounds == {"rtol": 4 * eps, "atol": 4 * eps}
    np.testing.assert_allclose(1 + 3 * eps, 1.0, **bounds)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(1 + 12 * eps, 1.0, **bounds)
    assert tolerance(dtype)["rtol"] > bounds["rtol"]
