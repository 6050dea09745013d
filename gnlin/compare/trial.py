"""One entry, one setting, one seed: train, watch, and return a record."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gnlin import Objective
from gnlin.compare.cost import StepCost, batch_shapes, flops, params_shapes
from gnlin.compare.entry import Entry
from gnlin.compare.task import Task

# Steps are compiled in chunks, about this many to a run.
_CHUNKS = 256
# More examples than this are evaluated in pieces that stay in the cache.
_WHOLE, _PIECE = 2048, 256

Record = dict[str, Any]
_MEASURES = ("loss", "quality", "network_loss", "network_quality")


def step_cost(task: Task, entry: Entry, unit_flops: float) -> StepCost:
    """Work of an entry's steps, in units of `unit_flops` (from `cost.gradient_flops`)."""
    method = entry.contestant.build(task, {**entry.options, entry.contestant.tuned: entry.grid[0]})
    if not method.traced:
        if not method.hidden_flops > 0:
            raise ValueError("a method that is not traced must say its `hidden_flops`")
        return StepCost(method.hidden_flops / unit_flops)
    params, key = params_shapes(task), jax.eval_shape(lambda: jax.random.key(0))
    batch = batch_shapes(task, _examples(task, entry) or task.train_size)
    state = jax.eval_shape(method.init, params, batch, key)
    start = flops(method.init, params, batch, key) / unit_flops
    step = (flops(method.step, params, state, batch, key) + method.hidden_flops) / unit_flops
    has_turns = jax.eval_shape(method.turns, state) is not None
    return StepCost(step, method.turn_flops() / unit_flops if has_turns else 0.0, start)


def _examples(task: Task, entry: Entry) -> int | None:
    return task.examples(entry.options.get("batch", "full"))


class Program:
    """An entry compiled for a task, once for all settings and seeds. Use it within ``task.precision()``.

    Args:
        task: the problem.
        entry: the optimiser.
        work: budget of a run, in gradient-equivalents.
        unit_flops: FLOPs of a gradient-equivalent, from `cost.gradient_flops`.

    Attributes:
        cost: work of a step.
        compile_seconds: what compiling took.
    """

    def __init__(self, task: Task, entry: Entry, work: float, unit_flops: float):
        self.task, self.entry, self.work = task, entry, work
        self.train = jax.tree.map(jnp.asarray, task.train)
        self.held_out = jax.tree.map(jnp.asarray, task.held_out)
        self.batch_size = _examples(task, entry)
        params, key, setting = task.init(jax.random.key(0)), jax.random.key(0), self._number(entry.grid[0])
        method = self._method(entry.grid[0])
        self.traced = method.traced
        self.predict = method.predict
        self.cost = step_cost(task, entry, unit_flops)
        # A step whose loop does not turn at all is the cheapest.
        self.max_steps = max(1, math.ceil(work / max(self.cost.step - self.cost.turn, 0.1 * self.cost.step)))
        # Evaluations see at most twice as many examples as steps do.
        self.least_pause = 0.5 * task.train_size / (self.task.batch_size or task.train_size)
        self.chunk_length = max(1, int(work / self.cost.step) // _CHUNKS) if self.traced else 1

        began = time.perf_counter()
        first = self._batch_of(np.zeros(self.batch_size or 0, np.int32))
        if self.traced:
            self._init = jax.jit(self._initialised).lower(setting, params, first, key).compile()
            carry = params, self._init(setting, params, first, key)
            indices = np.zeros((self.chunk_length, self.batch_size or 0), np.int32)
            self._chunk = jax.jit(self._trained).lower(setting, carry, indices, self.train, key, 0).compile()
            shapes = carry[1]
        else:
            # Its own compilation comes with the first step, which is made here and thrown away.
            shapes = method.init(params, first, key)
            shapes = jax.block_until_ready(method.step(task.init(jax.random.key(0)), shapes, first, key))[1]
        self._measure = jax.jit(self._measured).lower((params, shapes), self.train, self.held_out).compile()
        self.compile_seconds = time.perf_counter() - began

    def run(self, number: float, seed: int, on_progress: Callable[[float], None] = lambda fraction: None) -> Record:
        """Train until the work is spent, and return what came of it.

        The ``curve`` has, at each evaluation, ``step``, ``cost`` (gradient-equivalents so far), ``seconds`` (of steps
        so far; neither counts evaluations), ``loss`` on all training data and ``quality`` on the held-out data, both of
        the model being trained, which is the linearised one while an anchor is kept, and the same of the network
        itself. A run ends, ``diverged``, at a loss that is not finite.
        """
        advance, carry = self._start(number, seed)
        curve: dict[str, list] = {name: [] for name in ("step", "cost", "seconds", *_MEASURES)}
        cost, seconds, steps = self.cost.start, 0.0, 0
        self._evaluate(carry, (steps, cost, seconds), curve)
        batches = self._batches(seed)
        while cost < self.work and len(batches[steps : steps + self.chunk_length]) == self.chunk_length:
            indices = batches[steps : steps + self.chunk_length]
            began = time.perf_counter()
            carry, turns = jax.block_until_ready(advance(carry, indices, steps))
            seconds += time.perf_counter() - began
            steps += self.chunk_length
            cost += self.cost.of(self.chunk_length, int(turns) if self.cost.turn else self.chunk_length)
            if cost >= curve["cost"][-1] + self._pause(cost) or cost >= self.work:
                self._evaluate(carry, (steps, cost, seconds), curve)
                if not math.isfinite(curve["loss"][-1]):
                    break
            on_progress(min(cost / self.work, 1.0))
        if curve["step"][-1] != steps:
            self._evaluate(carry, (steps, cost, seconds), curve)
        diverged = not math.isfinite(curve["loss"][-1])
        return {
            "status": "diverged" if diverged else "finished",
            "reason": f"the training loss was not finite after {steps} steps" if diverged else "",
            "steps": steps,
            "seconds": seconds,
            "compile_seconds": self.compile_seconds,
            "cost_per_step": self.cost.step,
            "cost_per_turn": self.cost.turn,
            "curve": curve,
        }

    def _method(self, number: Any):
        return self.entry.contestant.build(self.task, {**self.entry.options, self.entry.contestant.tuned: number})

    def _number(self, value: float) -> jax.Array:
        return jnp.asarray(value, float)

    def _batch_of(self, indices: np.ndarray) -> Any:
        return self.train if self.batch_size is None else jax.tree.map(lambda leaf: leaf[indices], self.train)

    def _start(self, number: float, seed: int):
        """``(advance, carry)``; ``advance(carry, indices, step)`` makes a chunk of steps."""
        params, key = self.task.init(jax.random.key(seed)), jax.random.key(seed)
        batch = self._batch_of(self._batches(seed)[0])
        if self.traced:
            setting = self._number(number)

            def advance(carry, indices, step):
                return self._chunk(setting, carry, indices, self.train, key, step)

            return advance, (params, self._init(setting, params, batch, key))

        method = self._method(number)

        def advance_one(carry, indices, step):
            params, state = carry
            params, state = method.step(params, state, self._batch_of(indices[0]), jax.random.fold_in(key, step))
            return (params, state), method.turns(state) or 1

        return advance_one, (params, method.init(params, batch, key))

    def _batches(self, seed: int) -> np.ndarray:
        """Indices of the examples of each step, (steps, batch size); a batch size of 0 stands for all training data."""
        steps = -(-self.max_steps // self.chunk_length) * self.chunk_length
        if self.batch_size is None:
            return np.zeros((steps, 0), np.int32)
        return self.task.batches(seed, steps, self.batch_size)

    def _pause(self, cost: float) -> float:
        """Work between two evaluations: less of it in the first eighth of a run, where most happens."""
        return max(self.work / (256 if cost < self.work / 8 else 64), self.least_pause)

    def _evaluate(self, carry, spent: tuple[int, float, float], curve: dict[str, list]) -> None:
        values = [float(value) for value in self._measure(carry, self.train, self.held_out)]
        for name, value in zip(("step", "cost", "seconds", *_MEASURES), (*spent, *values), strict=True):
            curve[name].append(value)

    # What is compiled.

    def _initialised(self, setting, params, batch, key):
        return self._method(setting).init(params, batch, key)

    def _trained(self, setting, carry, indices, train, key, step):
        """A chunk of steps; also how often their inner loops turned."""
        method = self._method(setting)

        def one(carry, chosen):
            params, state, step = carry
            batch = train if self.batch_size is None else jax.tree.map(lambda leaf: leaf[chosen], train)
            params, state = method.step(params, state, batch, jax.random.fold_in(key, step))
            turns = method.turns(state)
            return (params, state, step + 1), jnp.asarray(1 if turns is None else turns, jnp.int32)

        (params, state, _), turns = jax.lax.scan(one, (*carry, jnp.asarray(step)), indices)
        return (params, state), jnp.sum(turns)

    def _measured(self, carry, train, held_out):
        """The `_MEASURES`."""
        params, state = carry

        def judged(objective: Objective, data):
            trained = objective.loss_of(self.predict(objective, params, state, data), data)
            return jnp.stack([trained, objective.value(params, data)])

        loss, network_loss = self._mean(lambda data: judged(self.task.objective, data), train)
        quality, network_quality = self._mean(lambda data: judged(self.task.quality.objective, data), held_out)
        return loss, quality, network_loss, network_quality

    def _mean(self, function: Callable[[Any], jax.Array], data: Any) -> jax.Array:
        """``function(data)``, a mean over examples, in pieces that fit into memory where there are mini-batches."""
        size = len(jax.tree.leaves(data)[0])
        if self.task.batch_size is None or size <= _WHOLE:
            return function(data)
        whole = size - size % _PIECE
        pieces = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, _PIECE, *leaf.shape[1:]), data)
        total = _PIECE * jax.lax.map(function, pieces).sum(axis=0)
        if whole < size:
            total += (size - whole) * function(jax.tree.map(lambda leaf: leaf[whole:], data))
        return total / size
