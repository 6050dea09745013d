"""One entry, one setting, one seed: train, evaluate, and return a record."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gnlin
from gnlin.compare.entrants.entry import Entry
from gnlin.compare.runs.cost import flops
from gnlin.compare.runs.evaluation import MEASURES, measures
from gnlin.compare.runs.meter import Metered, metered
from gnlin.compare.runs.records import Record
from gnlin.compare.tasks.task import Task


class Spent(NamedTuple):
    """The state of a run's accounts.

    Attributes:
        steps: made so far.
        cost: gradient-equivalents so far, those of the first state among them.
        seconds: of steps so far.
        price: gradient-equivalents that the next step may cost, as far as is known.
    """

    steps: int
    cost: float
    seconds: float
    price: float


class Begun(NamedTuple):
    """A run before its first step.

    Attributes:
        advance: (trained, indices, step) ↦ (trained, FLOPs to add). It makes a step for each row of
            `indices`; the first of them is number `step`.
        trained: parameters and state.
        compile_seconds: time of compiling for this run alone.
    """

    advance: Callable[..., tuple[Any, Any]]
    trained: tuple[Any, Any]
    compile_seconds: float


def metered_step(task: Task, entry: Entry) -> Metered:
    """An entry's step with a meter: (setting, params, state, batch, key) ↦ (params, state)."""
    key, setting = jax.eval_shape(lambda: (jax.random.key(0), jnp.asarray(entry.grid[0], float)))
    size = task.examples(entry.options.get("batch", "full")) or task.train_size
    params, batch = task.params_shapes(), task.batch_shapes(size)

    def init(setting, params, batch, key):
        return entry.method(task, setting).init(params, batch, key)

    def step(setting, params, state, batch, key):
        return entry.method(task, setting).step(params, state, batch, key)

    state = jax.eval_shape(init, setting, params, batch, key)
    return metered(step, setting, params, state, batch, key)


class Program:
    """An entry compiled for a task, once for all settings and seeds.

    Use it within ``task.precision()``.

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
        compile_seconds: time of compiling.
    """

    def __init__(self, task: Task, entry: Entry, work: float, unit_flops: float):
        self.task, self.entry, self.work, self._unit = task, entry, work, unit_flops
        self.train = jax.tree.map(jnp.asarray, task.train)
        self.held_out = jax.tree.map(jnp.asarray, task.held_out)
        self.batch_size = task.examples(entry.options.get("batch", "full"))
        self._method = entry.method(task, entry.grid[0])
        self.cycle = self._method.cycle
        key = jax.random.key(0)
        batch = self._batch_of(np.zeros(self.batch_size or 0, np.int32))
        start = self._number(entry.grid[0]), task.init(key), batch, key
        if self._method.traced:
            self._metered = metered_step(task, entry)
            self.start_cost = flops(self._initialised, *start) / unit_flops
            self.step_cost, self.varies = self._metered.flops / unit_flops, self._metered.varies
            state = jax.eval_shape(self._initialised, *start)
        elif self._method.flops > 0:
            self.start_cost, self.varies = 0.0, False
            self.step_cost = self._method.flops / unit_flops
            state = self._method.init(*start[1:])
        else:
            raise ValueError("a method that is not traced must say the `flops` of its step")
        self.compile_seconds = 0.0
        if self.start_cost < work:  # otherwise its runs fail, with this as their reason
            self._compile(start, state)

    def run(
        self, number: float, seed: int, on_progress: Callable[[float], None] = lambda fraction: None
    ) -> Record:
        """Train until the work left does not pay for another step, and return the outcome.

        The ``curve`` has these values at each evaluation: ``step``; ``cost``, gradient-equivalents
        so far; ``seconds`` of steps so far. Neither counts evaluations. ``loss`` is on all training
        data, ``quality`` on the held-out data. Both are of the model being trained, which is the
        linearised one while an anchor is kept. ``network_loss`` and ``network_quality`` are those
        of the network itself.

        A run ends, ``diverged``, at a loss that is not finite. Where the task `stops`, a run also
        ends at the first evaluation that finds the target reached. A run that moves its anchor ends
        with its last whole cycle, since a loss right after the anchor has moved says little.
        """
        if self.start_cost >= self.work:
            cost = f"{self.start_cost:.0f} gradient-equivalents of {self.work:g}"
            reason = f"its first state alone costs {cost}: raise --work, or take another task"
            return {"status": "failed", "reason": reason}
        batches = self._batches(seed, 1 + int(self.work / self.step_cost))
        advance, trained, compile_seconds = self._begin(number, seed, batches[0])
        curve: dict[str, list] = {name: [] for name in ("step", "cost", "seconds", *MEASURES)}
        spent = Spent(0, self.start_cost, 0.0, self.step_cost)
        self._evaluate(trained, spent, curve)
        while (left := self._steps_left(spent)) > 0:
            on_progress(min(spent.cost / self.work, 0.99))
            count = self._steps_until_evaluation(spent, left)
            end = spent.steps + count
            if end > len(batches):  # steps turn out cheaper than `step_cost`
                batches = self._batches(seed, 2 * end)
            began = time.perf_counter()
            trained, more = jax.block_until_ready(
                advance(trained, batches[spent.steps : end], spent.steps)
            )
            seconds = time.perf_counter() - began
            spent = self._after(spent, count, float(more) / self._unit, seconds)
            self._evaluate(trained, spent, curve)
            loss = curve["loss"][-1]
            if not math.isfinite(loss) or (self.task.stops and loss <= self.task.target):
                break
        return self._outcome(spent, trained, curve, self.compile_seconds + compile_seconds)

    # The accounts.

    def _steps_left(self, spent: Spent) -> int:
        """As many steps as the work left pays for; one at least at the beginning.

        Where the budget allows for a cycle, the run goes on until its last cycle ends.
        """
        affordable = max(0, int((self.work - spent.cost) / spent.price + 1e-6))
        last = max(1, spent.steps + affordable)
        if last >= self.cycle:
            begun = -(-spent.steps // self.cycle)  # a cycle that was begun is ended
            last = self.cycle * max(last // self.cycle, begun)
        return last - spent.steps

    def _steps_until_evaluation(self, spent: Spent, left: int) -> int:
        """Steps to make at once. The pauses are shorter in the first eighth of a run."""
        pause = max(self.work / (256 if spent.cost < self.work / 8 else 64), self._least_pause)
        count = min(int(pause / spent.price), self._longest, left)
        if self.varies:  # the price is a guess: make one step at first, then at most double them
            count = min(count, spent.steps)
        return max(1, count)

    def _after(self, spent: Spent, count: int, more: float, seconds: float) -> Spent:
        """The accounts after `count` steps that cost `more` than `step_cost` each."""
        # No step is free, so that every run ends.
        of_these = max(count * self.step_cost + more, 0.01 * count)
        steps, cost = spent.steps + count, spent.cost + of_these
        mean = (cost - self.start_cost) / steps
        return Spent(steps, cost, spent.seconds + seconds, max(mean, of_these / count))

    def _evaluate(self, trained, spent: Spent, curve: dict[str, list]) -> None:
        """Add a point to the curve."""
        values = map(float, self._measure(trained, self.train, self.held_out))
        for name, value in zip(curve, (*spent[:3], *values), strict=True):
            curve[name].append(value)

    def _outcome(self, spent: Spent, trained, curve, compile_seconds: float) -> Record:
        diverged = not math.isfinite(curve["loss"][-1])
        reason = f"the training loss was not finite after {spent.steps} steps" if diverged else ""
        return {
            "status": "diverged" if diverged else "finished",
            "reason": reason,
            "steps": spent.steps,
            "seconds": spent.seconds,
            "compile_seconds": compile_seconds,
            "cost_per_step": (spent.cost - self.start_cost) / spent.steps,
            "metrics": {name: float(value) for name, value in gnlin.metrics(trained[1]).items()},
            "curve": curve,
        }

    # The beginning of a run.

    def _begin(self, number: float, seed: int, first: np.ndarray) -> Begun:
        """Draw parameters and make the first state."""
        batch = self._batch_of(first)
        if not self._method.traced:
            return self._begin_untraced(number, seed, batch)
        params, key = self.task.init(jax.random.key(seed)), jax.random.key(seed)
        setting = self._number(number)

        def advance(trained, indices, step):
            count = len(indices)
            # One compilation serves all counts: its indices have the length of the longest pause.
            padding = np.zeros((self._longest - count, indices.shape[1]), np.int32)
            indices = np.concatenate([indices, padding])
            return self._advance(setting, trained, indices, count, self.train, key, step)

        return Begun(advance, (params, self._init(setting, params, batch, key)), 0.0)

    def _begin_untraced(self, number: float, seed: int, batch: Any) -> Begun:
        """The method compiles by itself, with a first step that is thrown away."""
        params, key = self.task.init(jax.random.key(seed)), jax.random.key(seed)
        method, began = self.entry.method(self.task, number), time.perf_counter()
        jax.block_until_ready(method.step(params, method.init(params, batch, key), batch, key))
        compile_seconds = time.perf_counter() - began
        params = self.task.init(jax.random.key(seed))  # the step may have consumed the others

        def advance(trained, indices, step):
            params, state = trained
            for number, chosen in enumerate(indices, start=step):
                now = jax.random.fold_in(key, number)
                params, state = method.step(params, state, self._batch_of(chosen), now)
            return (params, state), 0.0

        return Begun(advance, (params, method.init(params, batch, key)), compile_seconds)

    def _number(self, value: float) -> jax.Array:
        return jnp.asarray(value, float)

    def _batch_of(self, indices: Any) -> Any:
        if self.batch_size is None:
            return self.train
        return jax.tree.map(lambda leaf: leaf[indices], self.train)

    def _batches(self, seed: int, steps: int) -> np.ndarray:
        """Indices of the examples of each step, (steps, batch size).

        A batch size of 0 stands for all training data.
        """
        if self.batch_size is None:
            return np.zeros((steps, 0), np.int32)
        return self.task.batches(seed, steps, self.batch_size)

    # The compiled functions.

    def _compile(self, start: tuple, state: Any) -> None:
        """Compile for arguments like ``(setting, params, batch, key) = start``."""
        # Evaluations see at most twice as many examples as steps do.
        self._least_pause = (
            0.5 * self.task.train_size / (self.task.batch_size or self.task.train_size)
        )
        self._longest = max(1, int(max(self.work / 64, self._least_pause) / self.step_cost))
        setting, params, _, key = start
        began = time.perf_counter()
        if self._method.traced:
            self._init = jax.jit(self._initialised).lower(*start).compile()
            trained = params, self._init(*start)
            indices = np.zeros((self._longest, self.batch_size or 0), np.int32)
            arguments = setting, trained, indices, 1, self.train, key, 0
            self._advance = jax.jit(self._trained).lower(*arguments).compile()
            jax.block_until_ready(self._advance(*arguments))  # the first call is slow
        measure = jax.jit(measures(self.task, self._method))
        self._measure = measure.lower((params, state), self.train, self.held_out).compile()
        self.compile_seconds = time.perf_counter() - began

    def _initialised(self, setting, params, batch, key):
        return self.entry.method(self.task, setting).init(params, batch, key)

    def _trained(self, setting, trained, indices, count, train, key, first):
        """Make `count` steps. Also returns the FLOPs to add to those of as many steps."""

        def one(number, carry):
            params, state, total = carry
            batch = train
            if self.batch_size is not None:
                batch = jax.tree.map(lambda leaf: leaf[indices[number]], train)
            now = jax.random.fold_in(key, first + number)
            (params, state), more = self._metered.call(setting, params, state, batch, now)
            return params, state, total + more

        params, state, total = jax.lax.fori_loop(0, count, one, (*trained, jnp.float32(0)))
        return (params, state), total
