"""One entry, one setting, one seed: train, watch, and return a record."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gnlin
from gnlin import Objective
from gnlin.compare.entrants.entry import Entry
from gnlin.compare.report.summary import Record
from gnlin.compare.runs.cost import batch_shapes, flops, params_shapes
from gnlin.compare.runs.meter import Metered, metered
from gnlin.compare.tasks.task import Task

# More examples than this are evaluated in pieces that stay in the cache.
_WHOLE, _PIECE = 2048, 256

_MEASURES = ("loss", "quality", "network_loss", "network_quality")


def metered_step(task: Task, entry: Entry) -> Metered:
    """An entry's step with a meter: (setting, params, state, batch, key) ↦ (params, state)."""
    key, setting = jax.eval_shape(lambda: (jax.random.key(0), jnp.asarray(entry.grid[0], float)))
    size = task.examples(entry.options.get("batch", "full")) or task.train_size
    params, batch = params_shapes(task), batch_shapes(task, size)
    state = jax.eval_shape(
        lambda setting, *rest: entry.method(task, setting).init(*rest), setting, params, batch, key
    )
    return metered(
        lambda setting, *rest: entry.method(task, setting).step(*rest),
        setting,
        params,
        state,
        batch,
        key,
    )


class Program:
    """An entry compiled for a task, once for all settings and seeds. Use it within
    ``task.precision()``.

    Args:
        task: the problem.
        entry: the optimiser.
        work: budget of a run, in gradient-equivalents.
        unit_flops: FLOPs of a gradient-equivalent, from `cost.gradient_flops`.

    Attributes:
        start_cost: gradient-equivalents of the first state.
        step_cost: gradient-equivalents of a step whose loops turn once and whose branches are the
            dearest.
        varies: whether steps may cost more or less than that.
        compile_seconds: what compiling took.
    """

    def __init__(self, task: Task, entry: Entry, work: float, unit_flops: float):
        self.task, self.entry, self.work, self._unit = task, entry, work, unit_flops
        self.train = jax.tree.map(jnp.asarray, task.train)
        self.held_out = jax.tree.map(jnp.asarray, task.held_out)
        self.batch_size = task.examples(entry.options.get("batch", "full"))
        params, key, setting = (
            task.init(jax.random.key(0)),
            jax.random.key(0),
            self._number(entry.grid[0]),
        )
        method = entry.method(task, entry.grid[0])
        self.traced, self.predict, self.cycle = method.traced, method.predict, method.cycle
        batch = self._batch_of(np.zeros(self.batch_size or 0, np.int32))
        if self.traced:
            self._metered = metered_step(task, entry)
            self.start_cost = flops(self._initialised, setting, params, batch, key) / unit_flops
            self.step_cost, self.varies = self._metered.flops / unit_flops, self._metered.varies
            shapes = jax.eval_shape(self._initialised, setting, params, batch, key)
        elif method.flops > 0:
            self.start_cost, self.step_cost, self.varies = 0.0, method.flops / unit_flops, False
            shapes = method.init(params, batch, key)
        else:
            raise ValueError("a method that is not traced must say the `flops` of its step")
        self.compile_seconds = 0.0
        if self.start_cost >= work:
            return  # as its runs will say
        # Evaluations see at most twice as many examples as steps do.
        self._least_pause = 0.5 * task.train_size / (task.batch_size or task.train_size)
        self._longest = max(1, int(max(work / 64, self._least_pause) / self.step_cost))

        began = time.perf_counter()
        if self.traced:
            self._init = jax.jit(self._initialised).lower(setting, params, batch, key).compile()
            carry = params, self._init(setting, params, batch, key)
            indices = np.zeros((self._longest, self.batch_size or 0), np.int32)
            self._advance = (
                jax.jit(self._trained)
                .lower(setting, carry, indices, 1, self.train, key, 0)
                .compile()
            )
            jax.block_until_ready(
                self._advance(setting, carry, indices, 1, self.train, key, 0)
            )  # the first is slow
        self._measure = (
            jax.jit(self._measured).lower((params, shapes), self.train, self.held_out).compile()
        )
        self.compile_seconds = time.perf_counter() - began

    def run(
        self, number: float, seed: int, on_progress: Callable[[float], None] = lambda fraction: None
    ) -> Record:
        """Train until the work left does not pay for another step, and return what came of it.

        The ``curve`` has, at each evaluation, ``step``, ``cost`` (gradient-equivalents so far),
        ``seconds`` (of steps so far; neither counts evaluations), ``loss`` on all training data and
        ``quality`` on the held-out data, both of the model being trained, which is the linearised
        one while an anchor is kept, and the same of the network itself. A run ends, ``diverged``,
        at a loss that is not finite. One that moves its anchor ends with its last whole cycle,
        since a loss says little of an optimiser whose anchor has just been moved.
        """
        if self.start_cost >= self.work:
            reason = f"its first state alone costs {self.start_cost:.0f} gradient-equivalents of {self.work:g}"
            return {"status": "failed", "reason": f"{reason}: raise --work, or take another task"}
        batches = self._batches(seed, 1 + int(self.work / self.step_cost))
        advance, carry, compile_seconds = self._begin(number, seed, batches[0])
        curve: dict[str, list] = {name: [] for name in ("step", "cost", "seconds", *_MEASURES)}
        cost, seconds, steps = self.start_cost, 0.0, 0
        mean = price = self.step_cost  # of a step; of the next one, as far as is known
        self._evaluate(carry, (steps, cost, seconds), curve)
        while (left := self._steps_left(steps, cost, price)) > 0:
            on_progress(min(cost / self.work, 0.99))
            count = min(int(self._pause(cost) / price), self._longest, left)
            count = max(
                1, min(count, steps) if self.varies else count
            )  # a first step tells what steps cost
            if steps + count > len(batches):  # they cost less than they look
                batches = self._batches(seed, 2 * (steps + count))
            began = time.perf_counter()
            carry, more = jax.block_until_ready(
                advance(carry, batches[steps : steps + count], steps)
            )
            seconds += time.perf_counter() - began
            steps += count
            spent = max(
                count * self.step_cost + float(more) / self._unit, 0.01 * count
            )  # none is free: runs end
            cost += spent
            mean = (cost - self.start_cost) / steps
            price = max(mean, spent / count)
            self._evaluate(carry, (steps, cost, seconds), curve)
            if not math.isfinite(curve["loss"][-1]):
                break
        diverged = not math.isfinite(curve["loss"][-1])
        return {
            "status": "diverged" if diverged else "finished",
            "reason": f"the training loss was not finite after {steps} steps" if diverged else "",
            "steps": steps,
            "seconds": seconds,
            "compile_seconds": self.compile_seconds + compile_seconds,
            "cost_per_step": mean,
            "metrics": {name: float(value) for name, value in gnlin.metrics(carry[1]).items()},
            "curve": curve,
        }

    def _steps_left(self, steps: int, cost: float, price: float) -> int:
        """As many as the work left pays for; where a run has room for a cycle, until its last one
        ends.

        It begins with one step at least.
        """
        last = max(1, steps + max(0, int((self.work - cost) / price + 1e-6)))
        if last >= self.cycle:
            begun = -(-steps // self.cycle)  # a cycle that was begun is ended
            last = self.cycle * max(last // self.cycle, begun)
        return last - steps

    def _number(self, value: float) -> jax.Array:
        return jnp.asarray(value, float)

    def _batch_of(self, indices: np.ndarray) -> Any:
        return (
            self.train
            if self.batch_size is None
            else jax.tree.map(lambda leaf: leaf[indices], self.train)
        )

    def _begin(self, number: float, seed: int, first: np.ndarray):
        """``(advance, carry, seconds)``: ``advance(carry, indices, step)`` makes steps, on what it took to compile."""
        params, key = self.task.init(jax.random.key(seed)), jax.random.key(seed)
        batch = self._batch_of(first)
        if self.traced:
            setting = self._number(number)

            def advance(carry, indices, step):
                count = len(indices)
                indices = np.concatenate(
                    [indices, np.zeros((self._longest - count, indices.shape[1]), np.int32)]
                )
                return self._advance(setting, carry, indices, count, self.train, key, step)

            return advance, (params, self._init(setting, params, batch, key)), 0.0

        # It compiles by itself, with a first step that is thrown away.
        method, began = self.entry.method(self.task, number), time.perf_counter()
        jax.block_until_ready(method.step(params, method.init(params, batch, key), batch, key))
        compile_seconds = time.perf_counter() - began
        params = self.task.init(jax.random.key(seed))  # the step may have consumed them

        def advance_untraced(carry, indices, step):
            params, state = carry
            for number, chosen in enumerate(indices, start=step):
                params, state = method.step(
                    params, state, self._batch_of(chosen), jax.random.fold_in(key, number)
                )
            return (params, state), 0.0

        return advance_untraced, (params, method.init(params, batch, key)), compile_seconds

    def _batches(self, seed: int, steps: int) -> np.ndarray:
        """Indices of the examples of each step, (steps, batch size); a batch size of 0 stands for all training data."""
        if self.batch_size is None:
            return np.zeros((steps, 0), np.int32)
        return self.task.batches(seed, steps, self.batch_size)

    def _pause(self, cost: float) -> float:
        """Work between two evaluations: less of it in the first eighth of a run, where most happens."""
        return max(self.work / (256 if cost < self.work / 8 else 64), self._least_pause)

    def _evaluate(self, carry, spent: tuple[int, float, float], curve: dict[str, list]) -> None:
        values = [float(value) for value in self._measure(carry, self.train, self.held_out)]
        for name, value in zip(
            ("step", "cost", "seconds", *_MEASURES), (*spent, *values), strict=True
        ):
            curve[name].append(value)

    # What is compiled.

    def _initialised(self, setting, params, batch, key):
        return self.entry.method(self.task, setting).init(params, batch, key)

    def _trained(self, setting, carry, indices, count, train, key, first):
        """`count` steps; also the FLOPs to add to those of as many steps."""

        def one(number, carry):
            params, state, total = carry
            batch = (
                train
                if self.batch_size is None
                else jax.tree.map(lambda leaf: leaf[indices[number]], train)
            )
            key_now = jax.random.fold_in(key, first + number)
            (params, state), more = self._metered.call(setting, params, state, batch, key_now)
            return params, state, total + more

        params, state, total = jax.lax.fori_loop(0, count, one, (*carry, jnp.float32(0)))
        return (params, state), total

    def _measured(self, carry, train, held_out):
        """The `_MEASURES`."""
        params, state = carry

        def judged(objective: Objective, data):
            trained = objective.loss_of(self.predict(objective, params, state, data), data)
            return jnp.stack([trained, objective.value(params, data)])

        loss, network_loss = self._mean(lambda data: judged(self.task.objective, data), train)
        quality, network_quality = self._mean(
            lambda data: judged(self.task.quality.objective, data), held_out
        )
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
