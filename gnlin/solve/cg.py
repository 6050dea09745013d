"""Preconditioned conjugate gradients on pytrees."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer

from gnlin import tree
from gnlin.checks import check_integer
from gnlin.solve.system import Preconditioner, PreconditionerFunction, Solution, System
from gnlin.tree import Params

MOST_UNROLLED = 32


@dataclasses.dataclass(frozen=True)
class CG:
    r"""Conjugate gradients, matrix-free: one GGN product (about 4/3 of a gradient) for each step.

    Minimises :math:`\varphi(x) = \tfrac12 x^\top A x - b^\top x`, :math:`A = J^\top H J + \lambda
    D`. The first of these to come true ends the solve:

    * relative residual: :math:`\|b - Ax\| \le \text{rtol}\,\|b\|`;
    * relative progress (Martens 2010, section 4.4): over the last :math:`m = \max(10, k/10)` of k
      steps, the fraction of φ gained is less than :math:`m \cdot` `progress_tol`;
    * `max_steps` steps;
    * breakdown: :math:`p^\top A p \le 0` along a search direction, or a number that is not finite.
      What was reached before stays the answer.

    The right-hand side is brought to unit size first, so every tolerance is relative to the
    problem. Vectors and scalars of the iteration are held in at least float32.

    Statistics: ``cg/steps``, ``cg/residual`` (relative), ``cg/converged`` (by either tolerance).
    The residual is that of the recurrence, which costs nothing; on an ill-conditioned system the
    true one ends at about ε·cond(A).

    Args:
        max_steps: most products spent on one solve, warm start aside.
        rtol: tolerance on the relative residual; about 0.3 suits a direction whose length a step
            rule then chooses.
        progress_tol: tolerance on relative progress per step; Martens uses 5e-4. 0 turns the rule
            off.
        preconditioner: a record such as `Kronecker()`, or a function ``System -> (v -> M⁻¹v)``, M
            symmetric positive definite; `None` is the identity.
        warm_start: start from this fraction of the last solution, 0 being from nothing. Costs one
            product and keeps one vector in the state; a start with φ > 0 is dropped in favour of
            zero.
        unroll: write `max_steps` iterations, at most 32, one after another instead of in a loop.
            The result is the same, and all the products are paid for, needed or not. On CPU this is
            many times faster for convolutions, which XLA runs slowly inside loops.

    Raises:
        ValueError: an argument is out of its range.

    References: Hestenes & Stiefel 1952; Martens, Deep learning via Hessian-free optimization, 2010.

    Example:
        >>> import gnlin
        >>> gnlin.CG(max_steps=20, rtol=1e-3, warm_start=0.95)
        CG(max_steps=20, rtol=0.001, progress_tol=0.0, preconditioner=None, warm_start=0.95,
        unroll=False)
    """

    max_steps: int = 50
    rtol: float = 1e-4
    progress_tol: float = 0.0
    preconditioner: Preconditioner | PreconditionerFunction | None = None
    warm_start: float = 0.0
    unroll: bool = False

    def __post_init__(self):
        check_integer("max_steps", self.max_steps)
        for name in ("rtol", "progress_tol"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) or hasattr(value, "dtype")
            if not is_number or not (isinstance(value, Tracer) or value >= 0):
                raise ValueError(f"`{name}` must be a number of at least 0; got {value!r}")
        # Whether anything is carried is part of the form of the state: a traced number cannot say.
        if isinstance(self.warm_start, (bool, Tracer)) or not 0 <= self.warm_start <= 1:
            raise ValueError(
                f"`warm_start` must be a fraction between 0 and 1; got {self.warm_start!r}"
            )
        known = self.preconditioner is None or isinstance(self.preconditioner, Preconditioner)
        if isinstance(self.preconditioner, type) or not (known or callable(self.preconditioner)):
            raise TypeError(
                "`preconditioner` must be a function of the System or a record such as gnlin.Kronecker(); "
                f"got {self.preconditioner!r}"
            )
        if not isinstance(self.unroll, bool):
            raise TypeError(f"`unroll` must be True or False; got {self.unroll!r}")
        if self.unroll and self.max_steps > MOST_UNROLLED:
            raise ValueError(
                f"`unroll` needs `max_steps` of at most {MOST_UNROLLED}; got {self.max_steps!r}"
            )

    def init(self, params: Params) -> tuple[Any, dict[str, jax.Array]]:
        last = tree.zeros_like(params, tree.accumulation_dtype(params)) if self.warm_start else ()
        kept = (
            self.preconditioner.init_state(params)
            if isinstance(self.preconditioner, Preconditioner)
            else ()
        )
        return (last, kept), _stats(0, 0.0, False)

    def solve(self, system: System, rhs: Params, carry: Any) -> tuple[Solution, Any]:
        dtype = tree.accumulation_dtype(rhs)

        def matvec(vector):
            return tree.cast(system.matvec(tree.cast_like(vector, rhs)), dtype)

        last, kept = carry or ((), ())
        precondition, kept = self._preconditioner_of(system, rhs, dtype, kept)
        size = tree.max_abs(rhs)
        unit = jnp.where(size > 0, size, jnp.ones_like(size))
        b = jax.tree.map(lambda leaf: leaf.astype(dtype) / unit, rhs)
        b_norm = jnp.sqrt(tree.inner(b, b))  # entries are at most 1, so that squares stay in range
        start, residual, objective = self._start(matvec, b, unit, last)
        iteration = _Recurrence(matvec, precondition, self.rtol * b_norm, self.progress_tol)
        final = self._iterate(
            iteration, iteration.first(start, residual, objective, self.max_steps)
        )

        relative = jnp.where(
            b_norm == 0, 0, final.residual_norm / jnp.where(b_norm == 0, 1, b_norm)
        )
        # b of the order of the smallest or largest floats may take the product out of range; nor is
        # a NaN in range. The norm vouches for every entry, and compiles faster than a test of each.
        largest = min(
            (float(jnp.finfo(leaf.dtype).max) for leaf in jax.tree.leaves(rhs)), default=0.0
        )
        in_range = jnp.sqrt(tree.inner(final.x, final.x)) * unit <= largest
        solution = jax.tree.map(lambda leaf: jnp.where(in_range, leaf * unit, 0), final.x)
        stats = _stats(final.steps, relative, final.converged & in_range)
        return Solution(tree.cast_like(solution, rhs), stats), (
            solution if self.warm_start else (),
            kept,
        )

    def _preconditioner_of(self, system, rhs, dtype, kept):
        if self.preconditioner is None:
            return None, kept
        if isinstance(self.preconditioner, Preconditioner):
            apply, kept = self.preconditioner.prepare(system, rhs, kept)
        else:
            apply = self.preconditioner(system)
            if not callable(apply):
                raise TypeError(
                    "`preconditioner`, a function of the System, must return the function v ↦ M⁻¹v; "
                    f"got {type(apply).__name__}"
                )
        return lambda vector: tree.cast(apply(tree.cast_like(vector, rhs)), dtype), kept

    def _start(self, matvec, b, unit, last):
        """``(x, b − Ax, φ(x))``."""
        zero, nothing = tree.zeros_like(b), jnp.zeros([], unit.dtype)
        if not self.warm_start:
            return zero, b, nothing
        start = jax.tree.map(lambda leaf: self.warm_start * (leaf / unit), last)
        product = matvec(start)
        objective = tree.inner(start, product) / 2 - tree.inner(b, start)
        useful = objective < 0  # false for a NaN too
        return tree.select(
            useful, (start, tree.subtract(b, product), objective), (zero, b, nothing)
        )

    def _iterate(self, iteration, first):
        def unfinished(now):
            return ~now.converged & ~now.broken & (now.steps < self.max_steps)

        if not self.unroll:
            return jax.lax.while_loop(unfinished, iteration.next, first)

        def turn(now, _):
            after = tree.select(unfinished(now), iteration.next(now), now)
            # Otherwise XLA computes each update of x anew inside all later ones, and compiles for
            # minutes.
            return jax.lax.optimization_barrier(after), None

        return jax.lax.scan(turn, first, length=self.max_steps, unroll=self.max_steps)[0]


class _Iterate(NamedTuple):
    steps: jax.Array
    x: Params
    residual: Params
    direction: Params
    rz: jax.Array  # <r, M⁻¹r>
    residual_norm: jax.Array
    objectives: Any  # φ after each step; () where the rule on progress is off
    converged: jax.Array
    broken: jax.Array


@dataclasses.dataclass(frozen=True)
class _Recurrence:
    """Two inner products and three updates of vectors for each product; a preconditioner adds one inner product."""

    matvec: Callable[[Params], Params]
    precondition: Callable[[Params], Params] | None
    tolerance: jax.Array  # on ‖r‖
    progress_tol: chex.Numeric

    def first(self, x: Params, residual: Params, objective: jax.Array, max_steps: int) -> _Iterate:
        z, rz, norm = self._measure(residual)
        watched = isinstance(self.progress_tol, Tracer) or self.progress_tol > 0
        return _Iterate(
            steps=jnp.zeros([], jnp.int32),
            x=x,
            residual=residual,
            direction=z,
            rz=rz,
            residual_norm=norm,
            objectives=jnp.zeros([max_steps + 1], norm.dtype).at[0].set(objective)
            if watched
            else (),
            converged=norm <= self.tolerance,
            broken=~tree.all_finite((rz, norm)),
        )

    def next(self, now: _Iterate) -> _Iterate:
        product = self.matvec(now.direction)
        curvature = tree.inner(now.direction, product)
        # A finite curvature vouches for every entry of the product: the iterate to keep is known
        # before it is updated.
        sound = (curvature > 0) & jnp.isfinite(curvature) & (now.rz > 0)
        length = now.rz / jnp.where(sound, curvature, 1)
        x = tree.select(sound, tree.add_scaled(now.x, length, now.direction), now.x)
        residual = tree.select(sound, tree.add_scaled(now.residual, -length, product), now.residual)
        z, rz, norm = self._measure(residual)
        steps = now.steps + sound.astype(jnp.int32)
        objectives, stalled = self._progress(now.objectives, steps, length * now.rz / 2)
        return _Iterate(
            steps=steps,
            x=x,
            residual=residual,
            direction=tree.add_scaled(z, rz / jnp.where(now.rz > 0, now.rz, 1), now.direction),
            rz=rz,
            residual_norm=norm,
            objectives=objectives,
            converged=sound & ((norm <= self.tolerance) | stalled),
            broken=~(sound & tree.all_finite((rz, norm))),
        )

    def _measure(self, residual):
        """``(z, <r, z>, ‖r‖)`` with z = M⁻¹r."""
        squared = tree.inner(residual, residual)
        if self.precondition is None:
            return residual, squared, jnp.sqrt(squared)
        z = self.precondition(residual)
        return z, tree.inner(residual, z), jnp.sqrt(squared)

    def _progress(self, objectives, steps, decrease):
        """``(φ after each step, whether it has stalled)``; a step of length α lowers φ by ½ α <r, M⁻¹r>."""
        if isinstance(objectives, tuple):
            return objectives, jnp.asarray(False)
        objective = objectives[steps - 1] - decrease
        objectives = objectives.at[steps].set(objective)
        window = jnp.maximum(10, steps // 10)
        gained = (objective - objectives[jnp.maximum(steps - window, 0)]) / objective
        stalled = (
            (steps > window)
            & (objective < 0)
            & (gained < window.astype(objective.dtype) * self.progress_tol)
        )
        return objectives, stalled


def _stats(steps, residual, converged) -> dict[str, jax.Array]:
    return {
        "cg/steps": jnp.asarray(steps, jnp.int32),
        "cg/residual": jnp.asarray(residual, float),
        "cg/converged": jnp.asarray(converged, bool),
    }
