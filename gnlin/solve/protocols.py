"""The parts of a solve: solvers and preconditioners, and the records that they return.

A transform such as `gauss_newton` hands a solver the `System` of its quadratic model, and takes a
`Solution` back. `cg`, `dense`, `dual`, `blocks` and `kronecker` are solvers. `kronecker`, `jacobi`
and `nystrom` are preconditioners of `cg`.

A part is a frozen record of options. Its state passes through every call, and lies in the state of
the optimiser. ``init(params) -> (state, stats)`` gives the first one. States have fixed shapes and
dtypes; a part without state has ``()``. Statistics are flat dictionaries of scalars, with the same
names and dtypes from ``init`` on.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import chex
import jax

from gnlin import tree
from gnlin.checks import check_part, returned
from gnlin.problem.curvature import System
from gnlin.tree import Params

Stats = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Solution:
    """The result of a solve.

    Attributes:
        direction: x, in the dtypes of the right-hand side; always finite.
        stats: flat dictionary of scalars. Their names begin with that of the solver
            (``cg/iterations``, ...).
        state_is_finite: whether the next state is known to be finite. Otherwise all of it is looked
            at, and one that is not finite is not kept.
    """

    direction: Params
    stats: Stats
    state_is_finite: bool = False


@runtime_checkable
class Solver(Protocol):
    """A frozen record that solves a `System`, (JᵀHJ + λD) x = b.

    The direction of some solvers has no length of its own, as that of `Kronecker`. Such a solver
    has the attribute ``direction_only = True``, and needs a step rule.

    Example:
        >>> import dataclasses, gnlin, jax, jax.numpy as jnp
        >>> @dataclasses.dataclass(frozen=True)
        ... class Richardson:   # x ← x + ω (b − Ax)
        ...     rate: float
        ...     def init(self, params):
        ...         return (), {}
        ...     def solve(self, system, rhs, state):
        ...         def improve(_, x):
        ...             step = lambda x, b, a: x + self.rate * (b - a)
        ...             return jax.tree.map(step, x, rhs, system.matvec(x))
        ...         return gnlin.Solution(jax.lax.fori_loop(0, 200, improve, rhs), {}), state
        >>> objective = gnlin.Objective.least_squares(lambda p: jnp.array([2.0, 1.0]) * p - 1.0)
        >>> tx = gnlin.scale_by_gauss_newton(objective, 0.0, solver=Richardson(0.2))
        >>> updates, _ = tx.update(None, tx.init(jnp.zeros(2)), jnp.zeros(2))
        >>> -updates.round(3)
        Array([0.5, 1. ], dtype=float32)
    """

    def init(self, params: Params) -> tuple[Any, Stats]:
        """``(state, stats)`` before the first solve."""
        ...

    def solve(self, system: System, rhs: Params, state: Any) -> tuple[Solution, Any]:
        """``(solution, next state)`` for the right-hand side b."""
        ...


@runtime_checkable
class RadiusSolver(Solver, Protocol):
    """A `Solver` that can also find the least λ at which ‖D^½ x‖ ≤ Δ."""

    def solve_within(
        self, system: System, rhs: Params, state: Any, radius: chex.Numeric
    ) -> tuple[Solution, Any, jax.Array]:
        """``(solution, next state, λ)``; the damping of the system is not used."""
        ...


class Preparation(NamedTuple):
    """A preconditioner made ready for one system.

    Attributes:
        apply: v ↦ M⁻¹v, on trees in the dtypes of the parameters; symmetric, positive definite.
        stats: flat dictionary of scalars.
    """

    apply: Callable[[Params], Params]
    stats: Stats


@runtime_checkable
class Preconditioner(Protocol):
    """A frozen record that approximates the inverse of a `System` by M⁻¹, for `CG`.

    Example:
        >>> import dataclasses, gnlin, jax, jax.numpy as jnp
        >>> @dataclasses.dataclass(frozen=True)
        ... class Diagonal:   # M = E + λI, E a tree of numbers that are known
        ...     numbers: object
        ...     def init(self, params):
        ...         return (), {}
        ...     def prepare(self, system, params, state):
        ...         inverse = jax.tree.map(lambda e: 1 / (e + system.damping), self.numbers)
        ...         apply = lambda vector: jax.tree.map(jnp.multiply, inverse, vector)
        ...         return gnlin.Preparation(apply, {}), state
        >>> scales = jnp.array([1.0, 10.0, 100.0])
        >>> objective = gnlin.Objective.least_squares(lambda p: scales * p - 1.0)
        >>> solver = gnlin.CG(preconditioner=Diagonal(scales**2))
        >>> tx = gnlin.scale_by_gauss_newton(objective, 1e-3, solver=solver)
        >>> _, state = tx.update(None, tx.init(jnp.zeros(3)), jnp.zeros(3))
        >>> int(gnlin.metrics(state)["cg/iterations"])   # M = G + λI
        1
    """

    def init(self, params: Params) -> tuple[Any, Stats]:
        """``(state, stats)`` before the first system."""
        ...

    def prepare(self, system: System, params: Params, state: Any) -> tuple[Preparation, Any]:
        """``(preparation, next state)`` for one system, on trees like `params`."""
        ...


# A preconditioner without state: given a system, the action v ↦ M⁻¹v.
PreconditionerFunction = Callable[[System], Callable[[Params], Params]]


def begin(name: str, part: Any, params: Params) -> tuple[Any, Stats]:
    """``(state, stats)`` of a part, the argument called `name`, before its first use."""
    return returned(f"{name}.init", part.init(params), object, Mapping)


def solved(solver: Solver, system: System, rhs: Params, state: Any) -> tuple[Solution, Any]:
    """``(solution, next state)`` of a solver; the state before where the next is not finite."""
    found = solver.solve(system, rhs, state)
    solution, after = returned("solver.solve", found, Solution, object)
    return solution, after if solution.state_is_finite else tree.if_finite(after, state)


def check_solver(name: str, solver: Any) -> None:
    """Raise unless `solver`, the argument called `name`, is a record that solves systems."""
    # `Kronecker` is both, and passes. A class has the methods of its records; it is named below.
    if isinstance(solver, Preconditioner) and not isinstance(solver, (type, Solver)):
        raise TypeError(
            f"`{name}` must solve systems; a preconditioner is for "
            f"gnlin.CG(preconditioner={solver!r})"
        )
    check_part(name, solver, ("init", "solve"), "a solver record", "gnlin.CG() or gnlin.Dense()")


def check_solves(name: str, solver: Any) -> None:
    """Raise if the direction of `solver` has no length of its own."""
    # A user's solver need not have the attribute.
    if getattr(solver, "direction_only", False):
        raise TypeError(
            f"`{name}` must solve the system; {solver!r} gives a direction without a length. It is "
            f"for gnlin.gauss_newton(objective, solver={solver!r}), whose step rule finds one"
        )
