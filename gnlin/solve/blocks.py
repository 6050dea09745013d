"""Block-diagonal Gauss-Newton: one anchor, one small system for each block of parameters.

A transform calls `Blocks.solve` with the whole system. It cuts out one `System` for each block and
hands it to a solver of this room, such as `cg` or `dense`.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import shows_signature
from gnlin.problem.curvature import System
from gnlin.solve.protocols import Solution, Solver, Stats, check_solver
from gnlin.tree import Params


@shows_signature
@dataclasses.dataclass(frozen=True)
class Blocks:
    r"""Block-diagonal part of a system, each block solved by itself: layer-wise Gauss-Newton.

    Block k has the columns :math:`J_k` of J, and the parts :math:`D_k` and :math:`b_k` of D and b:

    .. math:: (J_k^\top H J_k + \lambda D_k)\, x_k = b_k \qquad \text{for every label } k.

    The systems share one linearisation. A product with :math:`J_k^\top H J_k` works through all
    layers between the block and the outputs. So all blocks together cost more than the whole system
    at equal iterations of `CG`. But they are smaller and better conditioned, and fit `Dense` where
    the whole does not. A block without curvature disturbs no other.

    Statistics: those of the solvers. Counts are summed over blocks, of other numbers the largest is
    reported, and flags are true where all are. ``cg/iterations`` thus counts the products of all
    blocks.

    Args:
        solver: a record from `gnlin.solve`, or one for each label, ``{label: record}``.
        labels: the block of each leaf, as for `optax.partition`. It is a tree of labels (strings,
            numbers or flags), of the form of the parameters or a prefix of it. A function from
            parameters to such a tree serves as well. A mask as for `optax.masked` makes two blocks,
            True and False.

    Raises:
        TypeError: `solver` is no record; a label is not hashable.
        ValueError: at init: `labels` does not match the parameters, or `solver` has none for a
            label.

    Reference: Abreu, Vyas, Kakade & Morwani, arXiv 2510.09378 (layer-wise Gauss-Newton).

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> objective = gnlin.Objective.least_squares(lambda p: p["a"] + 2.0 * p["b"] - 1.0)
        >>> by_name = gnlin.Blocks(gnlin.Dense(), lambda params: {name: name for name in params})
        >>> tx = gnlin.scale_by_gauss_newton(objective, damping=0.0, solver=by_name)
        >>> params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
        >>> updates, _ = tx.update(None, tx.init(params), params)
        >>> -updates["a"].round(4), -updates["b"].round(4)   # each as if the other stood still
        (Array([1.], dtype=float32), Array([0.5], dtype=float32))
    """

    solver: Solver | Mapping[Any, Solver]
    labels: Any | Callable[[Params], Any]

    def __post_init__(self):
        for solver in self.solver.values() if isinstance(self.solver, Mapping) else [self.solver]:
            check_solver("solver", solver)

    @property
    def direction_only(self) -> bool:
        """Whether a block's direction has no length of its own."""
        solvers = self.solver.values() if isinstance(self.solver, Mapping) else [self.solver]
        return any(getattr(solver, "direction_only", False) for solver in solvers)

    def init(self, params: Params) -> tuple[tuple[Any, ...], Stats]:
        leaves = jax.tree.leaves(params)
        states, stats = [], []
        for label, at in self._indices(params).items():
            state, of_block = self._solver_of(label).init(_take(leaves, at))
            states.append(state)
            stats.append(of_block)
        return tuple(states), _combined(stats)

    def solve(self, system: System, rhs: Params, state: Any) -> tuple[Solution, Any]:
        leaves, structure = jax.tree.flatten(rhs)
        scaling = None if system.scaling is None else jax.tree.leaves(system.scaling)
        directions, stats, states = list(leaves), [], []
        # Labels come in the order of the leaves, as in `init`, so each block meets its own state.
        for (label, at), of_block in zip(self._indices(rhs).items(), state, strict=True):
            # H acts on outputs, so all blocks share it with λ.
            block = dataclasses.replace(
                system,
                jvp=_push_forward(system, rhs, at),
                vjp=_pull_back(system, at),
                scaling=None if scaling is None else _take(scaling, at),
            )
            solution, of_block = self._solver_of(label).solve(block, _take(leaves, at), of_block)
            for index, direction in zip(at, solution.direction, strict=True):
                directions[index] = direction
            stats.append(solution.stats)
            states.append(of_block)
        return Solution(jax.tree.unflatten(structure, directions), _combined(stats)), tuple(states)

    def _solver_of(self, label: Hashable) -> Solver:
        if not isinstance(self.solver, Mapping):
            return self.solver
        if label not in self.solver:
            raise ValueError(
                f"`solver` must have a record for every label; got {list(self.solver)}, "
                f"without {label!r}"
            )
        return self.solver[label]

    def _indices(self, params: Params) -> dict[Hashable, list[int]]:
        """Label ↦ positions of its leaves, in the order in which labels appear."""
        labels = self.labels(params) if callable(self.labels) else self.labels
        try:
            spread = tree.spread(labels, params)
        except (ValueError, TypeError) as error:
            raise ValueError(
                "`labels` must be a tree of labels of the form of `params`, or a prefix of it; "
                f"got {labels!r} for {jax.tree.structure(params)}"
            ) from error
        found: dict[Hashable, list[int]] = {}
        for index, label in enumerate(spread):
            if not isinstance(label, Hashable):
                raise TypeError(f"`labels` must be strings, numbers or flags; got {label!r}")
            found.setdefault(label, []).append(index)
        return found


def _take(leaves: list[jax.Array], at: list[int]) -> list[jax.Array]:
    return [leaves[index] for index in at]


def _push_forward(system: System, like: Params, at: list[int]) -> Callable:
    """Block v_k ↦ J_k v_k.

    JAX knows that the tangents of other leaves are zeros, and computes nothing for them.
    """
    leaves, structure = jax.tree.flatten(tree.zeros_like(like))

    def embedded(block):
        whole = list(leaves)
        for index, leaf in zip(at, block, strict=True):
            whole[index] = leaf
        return system.jvp(jax.tree.unflatten(structure, whole))

    # The function is linear, so its derivative is itself, at any point.
    return lambda block: jax.jvp(embedded, (_take(leaves, at),), (block,))[1]


def _pull_back(system: System, at: list[int]) -> Callable:
    """Cotangent u ↦ J_kᵀu. Under `jit` work that leads to other leaves alone is never done."""
    return lambda cotangent: _take(jax.tree.leaves(system.vjp(cotangent)), at)


def _combined(stats: list[Stats]) -> Stats:
    # Solvers differ in their statistics: each name has those of the blocks that report it.
    names = dict.fromkeys(name for each in stats for name in each)
    return {
        name: _reduced(jnp.stack([each[name] for each in stats if name in each])) for name in names
    }


def _reduced(values: jax.Array) -> jax.Array:
    if values.dtype == bool:
        return jnp.all(values)
    return (
        # A sum of int32 would be int64 under x64, and change the form of the state.
        jnp.sum(values, dtype=values.dtype)
        if jnp.issubdtype(values.dtype, jnp.integer)
        else jnp.max(values)
    )
