"""What an update leaves to the next one: the step's origin, its prediction, and its batch.

Where a batch comes twice in a row, the loss of the second update is the trial of the first one's
step, and costs nothing. `gauss_newton` keeps a `Memory` in its state, and hands the step rule what
it recalls as `Last`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.transforms.gain import Trial, gain_ratio
from gnlin.tree import Batch, Params

# The loss is called alarming where it is so much above its recent mean.
_ALARM = 0.1
# So much of the recent mean is kept at a step.
_TREND = 0.7


class Memory(NamedTuple):
    """The last update, as the next one will need it."""

    params: Params  # where it was
    gradient: Params  # its right-hand side, or that with momentum
    plain: jax.Array  # whether `gradient` is without momentum
    value: jax.Array  # loss there
    change: jax.Array  # predicted for the step
    length: jax.Array  # of the step
    settled: jax.Array  # whether the gradient was zero, and no step the right one
    open: jax.Array  # whether the step still has to be tried
    batch: jax.Array  # digest of the batch
    trend: jax.Array  # mean of recent losses
    since: jax.Array  # updates since a step was tried
    count: jax.Array  # of updates that are remembered


class Last(NamedTuple):
    """The last update, as a step rule sees it.

    Attributes:
        again: whether the last update had the same batch.
        step: the step that was made since, whatever wrappers did with the update.
        gradient: the right-hand side of then, or that with momentum.
        plain: whether `gradient` is without momentum.
        alarm: whether the loss is well above that of recent updates, or a step has been refused.
        count: of updates before.
    """

    again: jax.Array
    step: Params
    gradient: Params
    plain: jax.Array
    alarm: jax.Array
    count: jax.Array


def begin_memory(params: Params) -> Memory:
    dtype = tree.accumulation_dtype(params)
    zero, never = jnp.zeros([], dtype), jnp.zeros([], bool)
    none, count = jnp.zeros([2], jnp.uint32), jnp.zeros([], jnp.int32)
    origin = tree.zeros_like(params)
    numbers = (zero, zero, zero, never, never, none, zero, count, count)
    return Memory(origin, origin, never, *numbers)


def recall(memory: Memory, params: Params, batch: jax.Array, value: jax.Array) -> Last:
    """The last update, as the present one finds it.

    Args:
        memory: of the last update.
        params: the parameters now.
        batch: digest of the batch now.
        value: loss now.
    """
    known = memory.count > 0
    value = value.astype(memory.trend.dtype)
    again = known & jnp.all(batch == memory.batch)
    step = tree.subtract(params, memory.params)
    step = tree.select(known, step, tree.zeros_like(step))
    high = value > memory.trend + _ALARM * jnp.abs(memory.trend)
    return Last(again, step, memory.gradient, memory.plain, known & ~again & high, memory.count)


def late_trial(memory: Memory, last: Last, value: jax.Array) -> tuple[jax.Array, Trial]:
    """``(whether it is one, the trial of the last step by the loss now)``, of the same batch.

    It is none where a wrapper scaled or averaged the step that was handed out, so that another was
    made.
    """
    # In units of the step that was handed out, so that squares of small numbers do not vanish.
    tiny = jnp.finfo(memory.length.dtype).tiny
    unit = jnp.where(memory.length > tiny, memory.length, 1)
    relative = tree.scale(1 / unit, last.step)
    length = unit * jnp.sqrt(tree.inner(relative, relative))
    # Steps of half precision are rounded when they are added.
    eps = (
        max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(last.step))
        if jax.tree.leaves(last.step)
        else 0.0
    )
    slack = 0.1 * memory.length + 4 * eps * tree.norm(memory.params)
    ours = jnp.abs(length - memory.length) <= slack
    # A step that was lost in rounding says nothing. One of zeros was that of a failed solve.
    ours &= (length > 0) | (memory.length == 0)
    # In the dtype of the loss, whose resolution counts.
    before = memory.value.astype(value.dtype)
    ratio = gain_ratio(before, value, memory.change, (length > 0) | memory.settled)
    slope = tree.inner(memory.gradient, last.step)
    return ours, Trial(ratio, before - value, slope, length, math.inf, last.again)


def trend_after(memory: Memory, value: jax.Array) -> jax.Array:
    """The mean of recent losses, this one included."""
    mean = _TREND * memory.trend + (1 - _TREND) * value.astype(memory.trend.dtype)
    return jnp.where(memory.count > 0, mean, value.astype(memory.trend.dtype))


def digest(batch: Batch) -> jax.Array:
    """Two words that tell batches apart; equal for equal batches.

    Every entry enters with a weight of its own place, modulo 2³².
    """
    words, place = jnp.zeros([2], jnp.uint32), 0
    for leaf in jax.tree.leaves(batch):
        bits = _bits(leaf)
        # The size of a batch may be symbolic, as under `jax.export`.
        known = isinstance(place, int)
        start = jnp.uint32(place % 2**32) if known else jnp.asarray(place).astype(jnp.uint32)
        index = jnp.arange(bits.size, dtype=jnp.uint32) + start
        place += bits.size
        # Odd weights: a change of one entry alone always changes the sum.
        first = jnp.sum(bits * (2 * index * jnp.uint32(0x9E3779B1) + 1), dtype=jnp.uint32)
        mixed = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA6B)
        second = jnp.sum(mixed * (2 * index * jnp.uint32(0xC2B2AE35) + 1), dtype=jnp.uint32)
        words = words * jnp.uint32(31) + jnp.stack([first, second])
    return words


def _bits(leaf) -> jax.Array:
    """The entries of an array as words of 32 bits."""
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == jnp.bool_ or leaf.dtype.itemsize < 1:
        return leaf.astype(jnp.uint32).ravel()
    width = 8 * leaf.dtype.itemsize
    if width == 64:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
    unsigned = jnp.dtype(f"uint{width}")
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32).ravel()
