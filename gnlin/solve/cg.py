"""Preconditioned conjugate gradients on pytrees.

`CG.solve` brings the right-hand side to unit size, prepares the preconditioner and chooses a start.
`_Recurrence` makes the iterations. The preconditioners are in `kronecker`, `jacobi` and `nystrom`,
and the direction goes back to the transform.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer

from gnlin import tree
from gnlin.checks import check_integer, returned, shows_signature
from gnlin.problem.curvature import System
from gnlin.solve.protocols import (
    Preconditioner,
    PreconditionerFunction,
    Preparation,
    Solution,
    Stats,
    begin,
)
from gnlin.tree import Params

MOST_UNROLLED = 32


class CGState(NamedTuple):
    last: Any  # the last solution, where the next solve starts; () without a warm start
    preconditioner: Any


@shows_signature
@dataclasses.dataclass(frozen=True)
class CG:
    r"""Conjugate gradients, matrix-free: one GGN product (about 4/3 of a gradient) an iteration.

    It minimises

    .. math:: \varphi(x) = \tfrac12 x^\top A x - b^\top x, \qquad A = J^\top H J + \lambda D.

    The solve ends at the first of these:

    * relative residual: :math:`\|b - Ax\| \le \text{rtol}\,\|b\|`;
    * relative progress (Martens 2010, section 4.4): over the last :math:`m = \max(10, k/10)` of k
      iterations, the fraction of φ gained is less than :math:`m` times `progress_tol`;
    * `max_iterations` iterations;
    * breakdown: :math:`p^\top A p \le 0` along a search direction, or a number that is not finite.
      The iterate before it stays the answer.

    The right-hand side is brought to unit size first, so every tolerance is relative to the
    problem. Vectors and scalars of the iteration have at least float32.

    Statistics: ``cg/iterations``, ``cg/residual`` (relative), ``cg/converged`` (by either
    tolerance), and those of the preconditioner. The residual is that of the recurrence, which costs
    nothing. On an ill-conditioned system the true one ends at about ε·cond(A).

    Args:
        max_iterations: most products spent on one solve, warm start aside.
        rtol: tolerance on the relative residual. About 0.3 suits a direction whose length a step
            rule then chooses.
        progress_tol: tolerance on relative progress per iteration; Martens uses 5e-4. 0 turns the
            rule off.
        preconditioner: a record such as `Kronecker()`, or a function ``System -> (v -> M⁻¹v)``, M
            symmetric positive definite; `None` is the identity.
        warm_start: start from this fraction of the last solution; 0 starts from zero. It costs one
            product, and one vector more in the state. A start with φ > 0 is dropped for zero.
        unroll: write `max_iterations` iterations, at most 32, one after another instead of in a
            loop. The result is the same. All the products are paid for, needed or not. On CPU this
            is many times faster for convolutions, which XLA runs slowly inside loops.

    Raises:
        ValueError, TypeError: an argument is out of its range.

    References: Hestenes & Stiefel 1952; Martens, Deep learning via Hessian-free optimization, 2010.

    Example:
        >>> import gnlin
        >>> gnlin.CG(max_iterations=20, rtol=1e-3, warm_start=0.95).max_iterations
        20
    """

    max_iterations: int = 50
    rtol: float = 1e-4
    progress_tol: float = 0.0
    preconditioner: Preconditioner | PreconditionerFunction | None = None
    warm_start: float = 0.0
    unroll: bool = False

    def __post_init__(self):
        check_integer("max_iterations", self.max_iterations)
        for name in ("rtol", "progress_tol"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) or hasattr(value, "dtype")
            if not is_number or not (isinstance(value, Tracer) or value >= 0):
                raise ValueError(f"`{name}` must be a number of at least 0; got {value!r}")
        # Only a warm start has a vector in the state, and a traced number cannot decide its form.
        if isinstance(self.warm_start, (bool, Tracer)) or not 0 <= self.warm_start <= 1:
            raise ValueError(
                f"`warm_start` must be a fraction between 0 and 1; got {self.warm_start!r}"
            )
        known = self.preconditioner is None or isinstance(self.preconditioner, Preconditioner)
        if isinstance(self.preconditioner, type) or not (known or callable(self.preconditioner)):
            raise TypeError(
                "`preconditioner` must be a function of the System or a record such as "
                f"gnlin.Kronecker(), with the methods init, prepare; got {self.preconditioner!r}"
            )
        if not isinstance(self.unroll, bool):
            raise TypeError(f"`unroll` must be True or False; got {self.unroll!r}")
        if self.unroll and self.max_iterations > MOST_UNROLLED:
            raise ValueError(
                f"`unroll` needs `max_iterations` of at most {MOST_UNROLLED}; "
                f"got {self.max_iterations!r}"
            )

    def init(self, params: Params) -> tuple[CGState, Stats]:
        last = tree.zeros_like(params, tree.accumulation_dtype(params)) if self.warm_start else ()
        state, stats = (), {}
        if isinstance(self.preconditioner, Preconditioner):
            state, stats = begin("preconditioner", self.preconditioner, params)
        return CGState(last, state), {**_stats(0, 0.0, False), **stats}

    def solve(self, system: System, rhs: Params, state: CGState) -> tuple[Solution, CGState]:
        dtype = tree.accumulation_dtype(rhs)

        def matvec(vector):
            # The model wants the dtypes of the parameters, and the iteration at least float32.
            return tree.cast(system.matvec(tree.cast_like(vector, rhs)), dtype)

        prepared, preconditioner_state = self._prepare(system, rhs, state.preconditioner)
        size = tree.max_abs(rhs)
        unit = jnp.where(size > 0, size, jnp.ones_like(size))
        b = jax.tree.map(lambda leaf: leaf.astype(dtype) / unit, rhs)
        b_norm = jnp.sqrt(tree.inner(b, b))  # entries are at most 1, so that squares stay in range
        start = self._start(matvec, b, unit, state.last)
        recurrence = _Recurrence(matvec, prepared.apply, self.rtol * b_norm, self.progress_tol)
        first = recurrence.first(start, self.max_iterations)
        final = self._iterate(recurrence, first)

        relative = final.residual_norm / jnp.where(b_norm == 0, 1, b_norm)
        # b = 0 has the solution 0, whose relative residual is 0 and not 0/0.
        relative = jnp.where(b_norm == 0, 0, relative)
        # The product with `unit` may leave the range where b is of the order of the smallest or
        # largest floats. A NaN is out of range, too. The norm vouches for every entry, and it
        # compiles faster than a test of each.
        most = (float(jnp.finfo(leaf.dtype).max) for leaf in jax.tree.leaves(rhs))
        in_range = jnp.sqrt(tree.inner(final.x, final.x)) * unit <= min(most, default=0.0)
        solution = jax.tree.map(lambda leaf: jnp.where(in_range, leaf * unit, 0), final.x)
        stats = _stats(final.iterations, relative, final.converged & in_range)
        next_state = CGState(solution if self.warm_start else (), preconditioner_state)
        return Solution(tree.cast_like(solution, rhs), {**stats, **prepared.stats}), next_state

    def _prepare(self, system, rhs, state) -> tuple["_Prepared", Any]:
        """The preconditioner on vectors in the accumulation dtype, and its next state."""
        dtype = tree.accumulation_dtype(rhs)
        if self.preconditioner is None:
            return _Prepared(None, {}), state
        if isinstance(self.preconditioner, Preconditioner):
            result = self.preconditioner.prepare(system, rhs, state)
            preparation, state = returned("preconditioner.prepare", result, Preparation, object)
        else:
            preparation = Preparation(self.preconditioner(system), {})
        if not callable(preparation.apply):
            raise TypeError(
                "`preconditioner`, a function of the System, must return the function v ↦ M⁻¹v; "
                f"got {type(preparation.apply).__name__}"
            )

        def apply(vector):
            return tree.cast(preparation.apply(tree.cast_like(vector, rhs)), dtype)

        return _Prepared(apply, preparation.stats), state

    def _start(self, matvec, b, unit, last) -> "_Start":
        zero = _Start(tree.zeros_like(b), b, jnp.zeros([], unit.dtype))
        if not self.warm_start:
            return zero
        # The last solution has units of its own. Here it is in those of this right-hand side.
        x = jax.tree.map(lambda leaf: self.warm_start * (leaf / unit), last)
        product = matvec(x)
        # φ(x), and φ(0) = 0: a start with φ ≥ 0 is no better than zero.
        objective = tree.inner(x, product) / 2 - tree.inner(b, x)
        warm = _Start(x, tree.subtract(b, product), objective)
        return tree.select(objective < 0, warm, zero)  # false for a NaN too

    def _iterate(self, recurrence: "_Recurrence", first: "_Iterate") -> "_Iterate":
        def unfinished(now):
            return ~now.converged & ~now.broken & (now.iterations < self.max_iterations)

        if not self.unroll:
            return jax.lax.while_loop(unfinished, recurrence.next, first)

        def turn(now, _):
            after = tree.select(unfinished(now), recurrence.next(now), now)
            # Otherwise XLA computes each update of x anew inside all later ones, and compiles for
            # minutes.
            return jax.lax.optimization_barrier(after), None

        length = self.max_iterations
        return jax.lax.scan(turn, first, length=length, unroll=length)[0]


class _Prepared(NamedTuple):
    apply: Callable[[Params], Params] | None  # None is the identity, which costs nothing
    stats: Stats


class _Start(NamedTuple):
    x: Params
    residual: Params  # b − Ax
    objective: jax.Array  # φ(x)


class _Iterate(NamedTuple):
    iterations: jax.Array
    x: Params
    residual: Params  # r = b − Ax, by the recurrence
    direction: Params  # p, conjugate to all before it
    rz: jax.Array  # <r, M⁻¹r>
    residual_norm: jax.Array
    objectives: Any  # φ after each iteration; () where the rule on progress is off
    converged: jax.Array
    broken: jax.Array  # pᵀAp ≤ 0, or a number that is not finite


@dataclasses.dataclass(frozen=True)
class _Recurrence:
    """One product an iteration, with two inner products and three updates of vectors.

    A preconditioner adds one inner product.
    """

    matvec: Callable[[Params], Params]
    precondition: Callable[[Params], Params] | None
    tolerance: jax.Array  # on ‖r‖
    progress_tol: chex.Numeric

    def first(self, start: _Start, max_iterations: int) -> _Iterate:
        z, rz, norm = self._measure(start.residual)
        objectives: Any = ()
        # A traced tolerance may turn out positive. Then φ of every iteration is needed.
        if isinstance(self.progress_tol, Tracer) or self.progress_tol > 0:
            objectives = jnp.zeros([max_iterations + 1], norm.dtype).at[0].set(start.objective)
        return _Iterate(
            iterations=jnp.zeros([], jnp.int32),
            x=start.x,
            residual=start.residual,
            direction=z,
            rz=rz,
            residual_norm=norm,
            objectives=objectives,
            # b = 0, or a warm start that is good enough: no product is taken.
            converged=norm <= self.tolerance,
            broken=~tree.all_finite((rz, norm)),
        )

    def next(self, now: _Iterate) -> _Iterate:
        product = self.matvec(now.direction)
        curvature = tree.inner(now.direction, product)
        # A finite curvature vouches for every entry of the product, so the iterate to keep is known
        # before the vectors are updated. <r, M⁻¹r> ≤ 0 says that M is not positive definite.
        sound = (curvature > 0) & jnp.isfinite(curvature) & (now.rz > 0)
        # α = <r, M⁻¹r> / pᵀAp
        length = now.rz / jnp.where(sound, curvature, 1)
        x = tree.select(sound, tree.add_scaled(now.x, length, now.direction), now.x)
        residual = tree.add_scaled(now.residual, -length, product)
        residual = tree.select(sound, residual, now.residual)
        z, rz, norm = self._measure(residual)
        # β = <r', M⁻¹r'> / <r, M⁻¹r>
        beta = rz / jnp.where(now.rz > 0, now.rz, 1)
        iterations = now.iterations + sound.astype(jnp.int32)
        # An iteration of length α lowers φ by ½ α <r, M⁻¹r>.
        objectives, stalled = self._progress(now.objectives, iterations, length * now.rz / 2)
        return _Iterate(
            iterations=iterations,
            x=x,
            residual=residual,
            direction=tree.add_scaled(z, beta, now.direction),
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

    def _progress(self, objectives, iterations, decrease):
        """``(φ after each iteration, whether it has stalled)``."""
        if isinstance(objectives, tuple):
            return objectives, jnp.asarray(False)
        objective = objectives[iterations - 1] - decrease
        objectives = objectives.at[iterations].set(objective)
        window = jnp.maximum(10, iterations // 10)
        gained = (objective - objectives[jnp.maximum(iterations - window, 0)]) / objective
        too_little = gained < window.astype(objective.dtype) * self.progress_tol
        # φ(0) = 0, so φ is negative as soon as anything is gained.
        return objectives, (iterations > window) & (objective < 0) & too_little


def _stats(iterations, residual, converged) -> Stats:
    return {
        "cg/iterations": jnp.asarray(iterations, jnp.int32),
        "cg/residual": jnp.asarray(residual, float),
        "cg/converged": jnp.asarray(converged, bool),
    }
