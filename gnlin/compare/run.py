"""One contestant, one setting, one seed: train, watch, and return a record."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnlin import metrics, predict
from gnlin.compare.contestants import Contestant, Setting
from gnlin.compare.cost import StepCost, flops, product_flops
from gnlin.compare.tasks import Task

# Steps are compiled in chunks; this many of them make a run, or one for each step of a short run.
_CHUNKS = 256

Record = dict[str, Any]


def steps_of(task: Task, contestant: Contestant) -> int:
    """Steps that a run takes: the task's for that kind of batch times the contestant's share, in whole chunks."""
    steps = max(1, round(contestant.budget * (task.steps if contestant.batch == "mini" else task.full_batch_steps)))
    return steps - steps % _chunk_length(steps)


class Program:
    """A contestant compiled for a task, once for all settings and seeds.

    Args:
        task: the problem.
        contestant: the optimiser.
        unit_flops: FLOPs of a gradient-equivalent, from `cost.gradient_flops`.

    Attributes:
        cost: work of a step.
        compile_seconds: what compiling took.
    """

    def __init__(self, task: Task, contestant: Contestant, unit_flops: float):
        self.task, self.contestant = task, contestant
        self.steps = steps_of(task, contestant)
        self.chunk_length = _chunk_length(self.steps)
        began = time.perf_counter()
        setting = _traced(contestant.grid[0])
        params = task.init(jax.random.key(0))
        self._init = jax.jit(self._initialised).lower(setting, params).compile()
        carry = params, self._init(setting, params)
        self._chunk = jax.jit(self._trained).lower(setting, carry, self._indices(0)[0], task.train).compile()
        self._measure = jax.jit(self._measured).lower(carry, task.train, task.held_out).compile()
        self.compile_seconds = time.perf_counter() - began
        examples = task.batch_size if contestant.batch == "mini" else task.train_size
        solves = "cg/steps" in metrics(carry[1])
        product = product_flops(task, examples) / unit_flops if solves else 0.0
        self.cost = StepCost(flops(self._chunk) / unit_flops, product)

    def run(self, setting: Setting, seed: int, on_progress: Callable[[float], None] = lambda fraction: None) -> Record:
        """Train and return the record.

        Its ``curve`` has, at each evaluation, ``step``, ``cost`` (cumulative gradient-equivalents; evaluations are not
        counted), ``loss`` on all training data and ``accuracy`` on the held-out data, both of the model being trained,
        which is the linearised one while an anchor is kept. A run ends, ``diverged``, at a loss that is not finite.
        ``seconds`` is the time spent on steps, without compiling and evaluating.
        """
        values = _traced(setting)
        params = self.task.init(jax.random.key(seed))
        carry = params, self._init(values, params)
        curve: dict[str, list] = {"step": [], "cost": [], "loss": [], "accuracy": []}
        cost = seconds = 0.0
        self._evaluate(carry, 0, cost, curve)
        for number, indices in enumerate(self._indices(seed), start=1):
            began = time.perf_counter()
            carry, iterations = jax.block_until_ready(self._chunk(values, carry, indices, self.task.train))
            seconds += time.perf_counter() - began
            cost += self.cost.of(self.chunk_length, int(iterations) if self.cost.product else self.chunk_length)
            if self._is_watched(number):
                self._evaluate(carry, number * self.chunk_length, cost, curve)
                if not math.isfinite(curve["loss"][-1]):
                    break
            on_progress(number * self.chunk_length / self.steps)
        return {
            "task": self.task.name,
            "contestant": self.contestant.name,
            "setting": dict(setting),
            "seed": seed,
            "steps": self.steps,
            "diverged": not math.isfinite(curve["loss"][-1]),
            "seconds": seconds,
            "compile_seconds": self.compile_seconds,
            "cost_per_step": self.cost.step,
            "cost_per_product": self.cost.product,
            "curve": curve,
        }

    def _is_watched(self, number: int) -> bool:
        """Every chunk in the first eighth of a mini-batch run, then every fourth; every one of a full-batch run."""
        chunks = self.steps // self.chunk_length
        return self.contestant.batch == "full" or number <= chunks // 8 or number % 4 == 0 or number == chunks

    def _indices(self, seed: int) -> np.ndarray:
        """Mini-batches by chunk, (chunks, chunk length, batch size); a batch size of 0 stands for all training data."""
        shape = (self.steps // self.chunk_length, self.chunk_length, -1)
        if self.contestant.batch == "full":
            return np.zeros((*shape[:2], 0), np.int32)
        return self.task.batches(seed, self.steps).reshape(shape)

    def _evaluate(self, carry, step: int, cost: float, curve: dict[str, list]) -> None:
        loss, accuracy = self._measure(carry, self.task.train, self.task.held_out)
        for name, value in (("step", step), ("cost", cost), ("loss", float(loss)), ("accuracy", float(accuracy))):
            curve[name].append(value)

    # What is compiled.

    def _initialised(self, setting, params):
        return self.contestant.make(self.task.objective, setting).init(params)

    def _trained(self, setting, carry, indices, train):
        """A chunk of the one training loop that serves every contestant; also the CG iterations in it."""
        objective = self.task.objective
        tx = optax.with_extra_args_support(self.contestant.make(objective, setting))

        def step(carry, chosen):
            params, opt_state = carry
            batch = train if chosen.size == 0 else jax.tree.map(lambda leaf: leaf[chosen], train)
            _, grads = objective.value_and_grad(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
            return (optax.apply_updates(params, updates), opt_state), metrics(opt_state).get("cg/steps", 0)

        carry, iterations = jax.lax.scan(step, carry, indices)
        return carry, jnp.sum(iterations)

    def _measured(self, carry, train, held_out):
        params, opt_state = carry
        objective = self.task.objective
        loss = objective.loss_of(predict(objective, opt_state, params, train), train)
        return loss, self.task.accuracy(predict(objective, opt_state, params, held_out), held_out)


def _chunk_length(steps: int) -> int:
    return max(1, steps // _CHUNKS)


def _traced(setting: Setting) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, jnp.float32) for name, value in setting.items()}
