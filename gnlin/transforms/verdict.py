"""Is a step taken? By the loss after it, before it is taken or one update later.

`gauss_newton` asks `past_of` about the last step, and `try_step` about that of the present update.
`settle` keeps what the next update has to know.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlin import tree
from gnlin.transforms.damping import judged
from gnlin.transforms.gain import Trial, is_zero, no_trial, resolution, trial_of
from gnlin.transforms.memory import Last, Memory, digest, late_trial, recall, trend_after
from gnlin.transforms.step_length import Step
from gnlin.tree import Batch, Params

# So many first steps are all tried.
_FRESH = 3


class Past(NamedTuple):
    """The verdict on the last step."""

    last: Last
    memory: Memory  # that the last update left
    batch: jax.Array  # digest of the batch
    judged: jax.Array  # whether this loss is its trial
    back: jax.Array  # whether it has to be taken back
    damping: Any  # state of the policy after it
    gain_ratio: jax.Array


def past_of(
    policy: Any, damping: Any, memory: Any, params: Params, batch: Batch, value: jax.Array
) -> Past | None:
    """Judge the last step by the loss of the same batch, where that is known now.

    Args:
        policy: the damping policy.
        damping: its state.
        memory: of the last update; () where every step is tried at once.
        params: the parameters now.
        batch: the batch now.
        value: loss now.
    """
    if not memory:
        return None
    known = digest(batch)
    last = recall(memory, params, known, value)

    def late() -> tuple[jax.Array, Trial]:
        return late_trial(memory, last, value)

    # It reads all parameters several times, for nothing where batches change.
    none = jnp.asarray(False), no_trial(value, memory.length)
    is_trial, trial = jax.lax.cond(last.again & memory.open, late, lambda: none)
    adapted, accepted, _ = judged(policy, damping, trial)
    back = is_trial & ~accepted
    last = last._replace(alarm=last.alarm | back)
    damping = tree.select(is_trial, adapted, damping)
    return Past(last, memory, known, is_trial, back, damping, trial.gain_ratio)


class Outcome(NamedTuple):
    """What became of the step of this update before it is taken."""

    tried: jax.Array
    accepted: jax.Array
    damping: Any  # state of the policy after it
    gain_ratio: jax.Array
    length: jax.Array  # of the step
    stats: dict[str, jax.Array]


def try_step(policy, before, models, chosen, past, check, problem, params, batch) -> Outcome:
    """Try a step by the loss after it, where that is due."""
    value = models.loss.value
    length = tree.norm(chosen.step) if chosen.length is None else chosen.length

    def with_loss(new_value: jax.Array) -> Trial:
        return trial_of(value, new_value, chosen.change, chosen.step, models.rhs, length)

    def trial_now() -> Trial:
        # A forward pass. It is on `batch`, as is the loss before the step.
        return with_loss(problem.value(tree.add(params, chosen.step), batch))

    if past is None or check == 1:
        due, trial = jnp.asarray(True), trial_now()
    else:
        due = past.last.alarm | (past.last.count < _FRESH) | (past.memory.since + 1 >= check)
        due = due & ~past.last.again & chosen.modelled
        trial = jax.lax.cond(due, trial_now, lambda: no_trial(value, length))
    adapted, accepted, stats = judged(policy, before, trial)
    # A step that is not tried is taken where its model promises no rise.
    harmless = (
        chosen.sound
        & jnp.isfinite(value)
        & (chosen.change <= resolution(value).astype(chosen.change.dtype))
    )
    accepted = jnp.where(due, accepted, harmless)
    return Outcome(due, accepted, adapted, trial.gain_ratio, length, stats)


class Settled(NamedTuple):
    """The update, once both steps are judged."""

    step: Params
    accepted: jax.Array
    gain_ratio: jax.Array
    memory: Any
    stats: Mapping[str, jax.Array]  # of the policy at its last trial


def settle(
    past: Past | None,
    outcome: Outcome,
    chosen: Step,
    params: Params,
    gradient: Params,
    models: Any,
    telling: jax.Array,
    metrics: Mapping[str, jax.Array],
) -> Settled:
    """The update with both verdicts, and what it leaves to the next one.

    Args:
        past: the verdict on the last step.
        outcome: of the step of this update.
        chosen: that step.
        params: the parameters now.
        gradient: what the step rule wants to be remembered.
        models: those of the update.
        telling: whether this update says anything to the next one.
        metrics: of the last update.
    """
    # Exact zeros where it is refused: a NaN times 0 would be a NaN.
    taken = tree.select(outcome.accepted, chosen.step, tree.zeros_like(chosen.step))
    before = metrics["gain_ratio"]
    gain_ratio = jnp.where(outcome.tried, outcome.gain_ratio.astype(before.dtype), before)
    stats = {
        name: jnp.where(outcome.tried, stat, metrics.get(name, stat))
        for name, stat in outcome.stats.items()
    }
    if past is None:
        return Settled(taken, outcome.accepted, gain_ratio, (), stats)
    memory, value, none = past.memory, models.loss.value, jnp.asarray(False)
    dtype = memory.value.dtype
    after = Memory(
        params=params,
        # After a refusal momentum begins anew.
        gradient=tree.select(outcome.accepted, gradient, models.rhs),
        plain=past.last.again | ~outcome.accepted | (memory.count == 0),
        value=value.astype(dtype),
        change=chosen.change.astype(dtype),
        length=jnp.where(outcome.accepted, outcome.length, 0).astype(dtype),
        # Where there is a step, nobody asks.
        settled=jax.lax.cond(outcome.length == 0, lambda: is_zero(models.rhs), lambda: none),
        open=~outcome.tried & outcome.accepted,
        batch=past.batch,
        trend=trend_after(memory, value),
        since=jnp.where(outcome.tried | past.judged, 0, memory.since + 1),
        count=jnp.asarray(optax.safe_increment(memory.count)),
    )
    after = tree.select(telling, after, memory)
    # The place that is left again is no place to go on from. Nor does a direction continue the step
    # that led there and back: what rounding left of it is noise.
    after = tree.select(past.back, memory._replace(open=none, plain=none), after)
    return Settled(
        step=tree.select(past.back, tree.subtract(memory.params, params), taken),
        accepted=outcome.accepted & ~past.back,
        gain_ratio=jnp.where(past.judged, past.gain_ratio.astype(before.dtype), gain_ratio),
        memory=after,
        stats=stats,
    )
