"""Adam in the eigenbasis of Kronecker factors: a direction for small batches.

`gauss_newton` calls `Eigenbasis.solve`. The factors are those of `kronecker`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import check_fraction, check_integer, shows_signature
from gnlin.problem.curvature import System
from gnlin.sharding import check_mesh
from gnlin.solve.inverses import together
from gnlin.solve.kronecker import Kronecker, KroneckerState
from gnlin.solve.protocols import Solution, Stats
from gnlin.structure.layers import Layout, layouts, read_layers
from gnlin.tree import Params

_FIRST = 3  # systems that are all refreshed: one sample is no average


class EigenbasisState(NamedTuple):
    """Factors, their eigenvectors, and the moments of Adam; trees like the parameters."""

    count: jax.Array  # of systems
    factors: KroneckerState
    left: Params  # (stack..., n, n) for each leaf, eigenvectors in columns; () where there are none
    right: Params
    mean: Params  # of the right-hand sides
    square: Params  # of their squares, in the eigenbasis


@shows_signature
@dataclasses.dataclass(frozen=True)
class Eigenbasis:
    r"""Adam in the eigenbasis of the Kronecker factors of the Gauss-Newton matrix.

    Let :math:`A = U \Lambda U^\top` and :math:`S = W \Sigma W^\top` be the factors of a matrix of
    parameters, as in `Kronecker`, and B its right-hand side. Then

    .. math:: M \leftarrow \beta_1 M + (1 - \beta_1) B, \qquad
              V \leftarrow \beta_2 V + (1 - \beta_2) (U^\top B W)^{\circ 2}, \qquad
              X = U \, \frac{U^\top \hat M W}{\sqrt{\hat V} + \varepsilon} \, W^\top,

    with Nesterov's :math:`\hat M \propto \beta_1 M + (1 - \beta_1) B` and both means corrected for
    their start. Vectors, and sides longer than `max_side`, have their own axes for a basis. Factors
    and eigenvectors are refreshed in the first systems, and then every few.

    Kronecker factors alone take the noise of a small batch for curvature that is exact. Here the
    basis is that of the curvature, and the sizes are those of the gradients that came. SOAP is the
    same with the moments of gradients for factors.

    The direction has no length. The best for the batch is too long where batches are small. So
    ``gauss_newton(objective, solver=Eigenbasis())`` takes a share of it, a learning rate of 0.3.
    Larger batches want a larger share.

    Statistics: ``eigenbasis/finite``; where it is false the direction is zero.

    Args:
        momentum: β₁.
        decay: β₂.
        refresh: systems from one refresh to the next.
        kronecker: options of the factors. Their average takes a sample at each refresh alone.

    Raises:
        ValueError, TypeError: an argument is out of its range.

    References: Vyas et al., SOAP, arXiv 2409.11321; George et al., Fast approximate natural
    gradient descent in a Kronecker-factored eigenbasis, 2018; Dozat 2016 (Nesterov's mean).

    Example:
        >>> import gnlin
        >>> objective = gnlin.Objective.least_squares(lambda p: p["w"] @ p["w"])
        >>> tx = gnlin.gauss_newton(objective, solver=gnlin.Eigenbasis())
    """

    momentum: float = 0.9
    decay: float = 0.95
    refresh: int = 10
    kronecker: Kronecker = dataclasses.field(
        default_factory=lambda: Kronecker(decay=0.8, fraction=1.0)
    )
    direction_only: ClassVar[bool] = True

    def __post_init__(self):
        check_fraction("momentum", self.momentum, one=False)
        check_fraction("decay", self.decay, one=False)
        check_integer("refresh", self.refresh, least=1)
        if not isinstance(self.kronecker, Kronecker):
            raise TypeError(f"`kronecker` must be a gnlin.Kronecker record; got {self.kronecker!r}")

    def init(self, params: Params) -> tuple[EigenbasisState, Stats]:
        dtype = tree.accumulation_dtype(params)
        factors, _ = self.kronecker.init(params)

        def vectors(length: int, layout: Layout) -> jax.Array:
            if layout.is_vector or length > self.kronecker.max_side:
                return jnp.zeros([], dtype)
            return jnp.broadcast_to(jnp.eye(length, dtype=dtype), (*layout.stacked, length, length))

        bases = [[vectors(side, each) for side in each.sides] for each in layouts(params)]
        structure = jax.tree.structure(params)
        left, right = (jax.tree.unflatten(structure, [b[side] for b in bases]) for side in (0, 1))
        empty = tree.zeros_like(params, dtype)
        state = EigenbasisState(jnp.zeros([], jnp.int32), factors, left, right, empty, empty)
        return state, _stats(False)

    def solve(
        self, system: System, rhs: Params, state: EigenbasisState
    ) -> tuple[Solution, EigenbasisState]:
        check_mesh(rhs)
        dtype, own = tree.accumulation_dtype(rhs), layouts(rhs)
        factors, left, right = self._basis(system, rhs, state)
        mean, square, found = [], [], []
        count = (state.count + 1).astype(dtype)
        old = zip(*map(jax.tree.leaves, (rhs, state.mean, state.square)), strict=True)
        bases = zip(jax.tree.leaves(left), jax.tree.leaves(right), own, strict=True)
        for (b, m, v), basis in zip(old, bases, strict=True):
            b = b.astype(dtype)
            m = self.momentum * m + (1 - self.momentum) * b
            ahead = self.momentum * m + (1 - self.momentum) * b
            v = self.decay * v + (1 - self.decay) * jnp.square(_rotate(b, *basis))
            size = jnp.sqrt(v / (1 - self.decay**count))
            # An entry that never had a gradient has none now.
            scaled = _rotate(ahead, *basis) / jnp.where(size > 0, size, 1)
            scaled = scaled / (1 - self.momentum ** (count + 1))
            found.append(_rotate(scaled, *basis, back=True))
            mean.append(m)
            square.append(v)
        structure = jax.tree.structure(rhs)
        direction, mean, square = (
            jax.tree.unflatten(structure, each) for each in (found, mean, square)
        )
        sound = tree.all_finite(direction)
        direction = tree.select(sound, direction, tree.zeros_like(direction))
        state = EigenbasisState(state.count + 1, factors, left, right, mean, square)
        return Solution(tree.cast_like(direction, rhs), _stats(sound)), state

    def _basis(
        self, system: System, rhs: Params, state: EigenbasisState
    ) -> tuple[KroneckerState, Params, Params]:
        """Factors and eigenvectors, refreshed where it is time."""

        def refreshed() -> tuple[KroneckerState, Params, Params]:
            reading = read_layers(system.jvp, rhs)
            factors = self.kronecker.averaged(reading, system, rhs, state.factors)
            sides = [
                _eigenvectors(jax.tree.leaves(moments), jax.tree.leaves(old))
                for moments, old in ((factors.left, state.left), (factors.right, state.right))
            ]
            structure = jax.tree.structure(rhs)
            left, right = (jax.tree.unflatten(structure, side) for side in sides)
            return factors, left, right

        due = (state.count % self.refresh == 0) | (state.count < _FIRST)
        return jax.lax.cond(due, refreshed, lambda: (state.factors, state.left, state.right))


def _eigenvectors(moments: Sequence[jax.Array], before: Sequence[jax.Array]) -> list[jax.Array]:
    """Eigenvectors of the moments of all leaves that had some before."""
    places = [place for place, old in enumerate(before) if old.ndim]
    # Without the spare row and column of a bias.
    sizes = [before[place].shape[-1] for place in places]
    matrices = [moments[p][..., :size, :size] for p, size in zip(places, sizes, strict=True)]
    vectors = together(lambda matrices: jnp.linalg.eigh(matrices)[1], matrices)
    found = dict(zip(places, vectors, strict=True))
    return [found.get(place, old) for place, old in enumerate(before)]


def _rotate(
    leaf: jax.Array, left: jax.Array, right: jax.Array, layout: Layout, back: bool = False
) -> jax.Array:
    """UᵀBW of a leaf, in its shape; UBWᵀ on the way back."""
    if layout.is_vector:
        return leaf
    matrix = leaf.reshape(layout.matrices)
    if left.ndim:
        matrix = (left if back else jnp.swapaxes(left, -2, -1)) @ matrix
    if right.ndim:
        matrix = matrix @ (jnp.swapaxes(right, -2, -1) if back else right)
    return matrix.reshape(leaf.shape)


def _stats(finite: Any) -> Stats:
    return {"eigenbasis/finite": jnp.asarray(finite, bool)}
