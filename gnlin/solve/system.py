"""The one linear system of the package, and what a solver returns."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import chex
import jax

from gnlin import tree
from gnlin.tree import Outputs, Params


@dataclasses.dataclass(frozen=True)
class System:
    """The damped Gauss-Newton system (JᵀHJ + λD) x = b.

    Attributes:
        jvp: v ↦ Jv.
        vjp: u ↦ Jᵀu.
        output_hessian: u ↦ Hu, in output space.
        damping: λ ≥ 0, a scalar.
        scaling: D, a tree of non-negative diagonal entries shaped like the parameters, in their
            accumulation dtype; `None` is the identity.
    """

    jvp: Callable[[Params], Outputs]
    vjp: Callable[[Outputs], Params]
    output_hessian: Callable[[Outputs], Outputs]
    damping: chex.Numeric
    scaling: Params | None = None

    def matvec(self, vector: Params) -> Params:
        """The product (JᵀHJ + λD) v, in the dtypes of the parameters."""
        curved = self.vjp(self.output_hessian(self.jvp(vector)))
        return tree.add_scaled(curved, self.damping, self.damp_direction(vector))

    def damp_direction(self, vector: Params) -> Params:
        """The product Dv."""
        if self.scaling is None:
            return vector
        return jax.tree.map(
            lambda d, v: (d * v.astype(d.dtype)).astype(v.dtype), self.scaling, vector
        )


@dataclasses.dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        step: x, in the dtypes of the right-hand side; always finite.
        stats: flat dictionary of scalars, its keys prefixed by the solver's name (``cg/steps``,
            ...).
    """

    step: Params
    stats: dict[str, jax.Array]


class Solver(Protocol):
    """A frozen record that solves a `System`.

    ``init`` returns what is carried from one solve to the next (fixed shapes and dtypes, ``()``
    where nothing is) and statistics of the same form as those of ``solve``.
    """

    def init(self, params: Params) -> tuple[Any, dict[str, jax.Array]]: ...

    def solve(self, system: System, rhs: Params, carry: Any) -> tuple[Solution, Any]: ...


# A preconditioner without memory: given a system, the action v ↦ M⁻¹v.
PreconditionerFunction = Callable[[System], Callable[[Params], Params]]


@runtime_checkable
class Preconditioner(Protocol):
    """A frozen record that approximates the inverse of a system by a symmetric positive definite
    M⁻¹.

    ``init_state`` returns what is kept from one system to the next, in fixed shapes and dtypes;
    ``prepare`` the action v ↦ M⁻¹v, on trees in the dtypes of `params`, and the next state.
    """

    def init_state(self, params: Params) -> Any: ...

    def prepare(
        self, system: System, params: Params, state: Any
    ) -> tuple[Callable[[Params], Params], Any]: ...


@runtime_checkable
class RadiusSolver(Solver, Protocol):
    """A `Solver` that can also find the least λ at which the step stays within a radius, ‖D^½ x‖ ≤
    Δ.

    ``solve_within`` returns that λ beside what ``solve`` does; the damping of the system is not
    looked at.
    """

    def solve_within(
        self, system: System, rhs: Params, carry: Any, radius: chex.Numeric
    ) -> tuple[Solution, Any, jax.Array]: ...


def check_solver(name: str, solver: Any) -> None:
    """Raise unless `solver`, the argument called `name`, is a record that solves systems."""
    if isinstance(solver, type):
        raise TypeError(
            f"`{name}` must be a solver record, not its class; write {solver.__name__}(...)"
        )
    if isinstance(solver, Preconditioner) and not hasattr(solver, "solve"):
        raise TypeError(
            f"`{name}` must solve systems; a preconditioner is for gnlin.CG(preconditioner={solver!r})"
        )
    if not (hasattr(solver, "init") and hasattr(solver, "solve")):
        raise TypeError(
            f"`{name}` must be a solver record such as gnlin.CG() or gnlin.Dense(); got {solver!r}"
        )
