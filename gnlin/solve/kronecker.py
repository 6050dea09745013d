"""Kronecker factors of the Gauss-Newton matrix: a preconditioner, and a solver by itself.

`gauss_newton` calls `Kronecker.solve`, and `cg` calls `Kronecker.prepare`. The layers come from
`gnlin.structure.layers`, and the sample from `sampling`. The direction goes to the step rule in
`transforms/step_length.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import check_fraction, check_integer, shows_signature
from gnlin.problem.curvature import System
from gnlin.sharding import by_compiler, check_mesh, sharded_like
from gnlin.solve.direction import apply_inverse
from gnlin.solve.factorisation import Inverse, empty_inverse, inverse_of
from gnlin.solve.factors import Factors, Share, moments_of_gradient, moments_of_layer
from gnlin.solve.protocols import Preparation, Solution, Stats
from gnlin.solve.sampling import root_sample
from gnlin.structure.layers import Layout, Reading, Use, layouts, read_layers
from gnlin.tree import Params

# So many first systems have factors of their own: parameters and averages change fast.
_FRESH = 3


class KroneckerState(NamedTuple):
    """Second moments on the two sides of each leaf, seen as a matrix; trees like the parameters.

    A moment is one longer than its side: the last row and column belong to the constant input that
    a bias multiplies. A side longer than `max_side` has the diagonal alone, and so has a vector.
    """

    count: jax.Array  # of systems whose factors entered the average
    left: Params  # (stack..., n, n) or (stack..., n) for each leaf, of the rows of its matrix
    right: Params  # the same of its columns
    kept: Any  # `_Kept`, the inverses, where they serve several systems


class _Kept(NamedTuple):
    """The inverse that the next systems use again."""

    inverse: jax.Array  # of the damped moments, all entries of `Inverse`
    uses: jax.Array  # how many more systems it is for
    damping: jax.Array  # λ in it


@shows_signature
@dataclasses.dataclass(frozen=True)
class Kronecker:
    r"""Block-diagonal Kronecker approximation of the Gauss-Newton matrix, for any network.

    Let a dense layer y = xW + b be applied R times, with inputs :math:`\bar x = (x, 1)` and
    cotangents :math:`s` of y. Then

    .. math:: G_W \approx A \otimes S, \qquad
              A = \frac1R \sum_r \bar x_r^\top \bar x_r, \qquad
              S = \sum_r s_r^\top s_r,

    where the cotangents are those of one sample of independent signs ε,

    .. math:: s = \Big(\frac{\partial z}{\partial y}\Big)^{\!\top} H^{1/2} \varepsilon, \qquad
              \varepsilon_i = \pm 1.

    Layers are found in the linearisation of the model, so nothing has to be registered. Other
    leaves have the moments of the pseudo-gradient :math:`V = J^\top H^{1/2} \varepsilon`, whose
    covariance is G: :math:`A = VV^\top / \|V\|`, :math:`S = V^\top V / \|V\|`. A vector that is in
    no layer has the diagonal alone. :math:`H^{1/2}\varepsilon` comes from Lanczos' method on H, in
    output space, for any loss.

    Moments are averaged over steps, in the state of the optimiser. The damping λ of the system is
    shared between the factors,

    .. math:: M = \Big(A + \pi\sqrt{\lambda}\, I\Big) \otimes
                  \Big(S + \tfrac{1}{\pi}\sqrt{\lambda}\, I\Big), \qquad
              \pi^2 = \frac{\operatorname{tr} A / \dim A}{\operatorname{tr} S / \dim S}.

    It is a preconditioner in ``CG(preconditioner=Kronecker())``. As a solver it gives the direction
    M⁻¹b, whose length a step rule has to find (`Momentum`, the default of `gauss_newton`). A
    scaling D of the system is ignored.

    The inverse of a long side has its leading eigenvectors, and the mean of the other eigenvalues.
    Few eigenvalues are above the damping (Puiu).

    With ``refresh=T`` factors are taken and inverted at every T-th system, and the inverses are
    kept between. The first systems all have their own. A λ that has grown by half or more is
    honoured at once, by inverses out of turn. The state then has all inverses in one array, too.

    Statistics: ``kronecker/finite``; where it is false the direction is zero.

    Args:
        decay: of the average over systems. The average begins as a plain mean.
        fraction: share of the applications of a layer that enter its moments; never fewer than 64.
        max_side: longest side with a matrix of moments; a longer one has the diagonal alone.
        seed: of the samples ε.
        refresh: T, systems for each inverse.
        rank: of the inverse of a side that is more than eight times as long. `None` inverts all.

    Raises:
        ValueError: an argument is out of its range.

    References: Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate
    curvature, 2015; Gupta, Koren & Singer, Shampoo, arXiv 1802.09568 (moments of matrix-shaped
    gradients); Puiu, Randomized K-FACs, arXiv 2206.15397 (inverses of low rank).

    Example:
        >>> import gnlin
        >>> gnlin.CG(max_iterations=5, preconditioner=gnlin.Kronecker()).max_iterations
        5
    """

    decay: float = 0.95
    fraction: float = 0.25
    max_side: int = 4096
    seed: int = 0
    refresh: int = 1
    rank: int | None = 64
    direction_only: ClassVar[bool] = True  # M⁻¹b approximates no solution: its length is arbitrary

    def __post_init__(self):
        check_fraction("decay", self.decay, one=False)
        check_fraction("fraction", self.fraction, zero=False)
        for name in ("max_side", "seed"):
            check_integer(name, getattr(self, name), least=0)
        check_integer("refresh", self.refresh)
        if self.rank is not None:
            check_integer("rank", self.rank)

    def init(self, params: Params) -> tuple[KroneckerState, Stats]:
        dtype = tree.accumulation_dtype(params)

        def moment(stack: tuple[int, ...], length: int) -> jax.Array:
            square = length <= self.max_side
            return jnp.zeros([*stack, *[length + 1] * (2 if square else 1)], dtype)

        def factors(layout: Layout) -> Factors:
            if layout.is_vector:
                return Factors(jnp.zeros([math.prod(layout.shape)], dtype), jnp.zeros([], dtype))
            return Factors(*(moment(layout.stacked, length) for length in layout.sides))

        count, own = jnp.zeros([], jnp.int32), layouts(params)
        zeros = [factors(each) for each in own]
        kept = ()
        if self.refresh > 1:
            inverse = tree.flatten(empty_inverse(zeros, own, self.rank), dtype)
            kept = _Kept(inverse, count, jnp.zeros([], dtype))
        return _state_of(count, zeros, params, kept), _stats(False)

    def solve(
        self, system: System, rhs: Params, state: KroneckerState
    ) -> tuple[Solution, KroneckerState]:
        preparation, state = self.prepare(system, rhs, state)
        direction = preparation.apply(rhs)
        sound = preparation.stats["kronecker/finite"] & tree.all_finite(direction)
        direction = tree.select(sound, direction, tree.zeros_like(direction))
        return Solution(direction, _stats(sound), state_is_finite=True), state

    def prepare(
        self, system: System, params: Params, state: KroneckerState
    ) -> tuple[Preparation, KroneckerState]:
        check_mesh(params)
        damping = jnp.asarray(system.damping, tree.accumulation_dtype(params))
        found: list[Sequence[Use]] = []

        def refreshed() -> tuple[Inverse, jax.Array, KroneckerState]:
            # Here and not outside, where inputs would be computed for all systems. What comes out
            # is the shape of the layers alone.
            reading = read_layers(system.jvp, params)
            found.append(reading.uses)
            after = self.averaged(reading, system, params, state)
            inverse, sound = inverse_of(reading.uses, _factors_of(after), damping, self.rank)
            return inverse, sound, after

        def refreshed_and_kept() -> tuple[jax.Array, KroneckerState]:
            inverse, sound, after = refreshed()
            uses = jnp.where(after.count > _FRESH, self.refresh - 1, 0).astype(jnp.int32)
            kept = _Kept(tree.flatten(inverse, damping.dtype), uses, damping)
            # An inverse that failed serves no other system, and leaves nothing behind.
            return sound, tree.select(sound, after._replace(kept=kept), state)

        def reused() -> tuple[jax.Array, KroneckerState]:
            kept = state.kept._replace(uses=state.kept.uses - 1)
            return jnp.asarray(True), state._replace(kept=kept)

        if self.refresh == 1:
            inverse, sound, after = refreshed()
            next_state = tree.select(sound, after, state)
        else:
            # The share of λ in an inverse may be too large for a while, and not too small.
            due = (state.kept.uses <= 0) | (damping > 1.5 * state.kept.damping)
            sound, next_state = jax.lax.cond(due, refreshed_and_kept, reused)
            entries = jnp.where(sound, next_state.kept.inverse, 0)
            empty = jax.eval_shape(
                lambda: empty_inverse(_factors_of(state), layouts(params), self.rank)
            )
            inverse = tree.unflatten(entries, empty)

        # Under `jax.disable_jit` the branch that is not taken is not run.
        uses = found[0] if found else read_layers(system.jvp, params).uses

        def apply(vector: Params) -> Params:
            # Of the layers it takes the shapes alone, so they are no argument.
            apply_to = functools.partial(apply_inverse, uses)
            found = by_compiler(apply_to, inverse, _factors_of(state), vector)
            return jax.tree.map(sharded_like, found, vector)

        return Preparation(apply, _stats(sound)), next_state

    def averaged(
        self, reading: Reading, system: System, params: Params, state: KroneckerState
    ) -> KroneckerState:
        """The state with the moments of this system in its average."""
        before = _factors_of(state)
        latest = self._moments(reading, system, params, before, state.count)
        count = state.count + 1
        # A plain mean, until the average has as much of the past as `decay` says.
        part = 1 - 1 / count.astype(tree.accumulation_dtype(params))
        keep = jnp.minimum(part, self.decay**self.refresh)
        factors = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, before, latest)
        return _state_of(count, factors, params, state.kept)

    def _moments(self, reading: Reading, system, params, before, count) -> list[Factors]:
        """Moments of this system alone, in the order of the leaves."""
        dtype = tree.accumulation_dtype(params)
        like = jax.eval_shape(system.jvp, params)
        if not tree.size(like):
            raise ValueError(
                "`batch` has no examples, or the model no outputs: "
                "there is nothing to take moments of"
            )
        # A fresh sample for each system, and the same one for the same state.
        key = jax.random.fold_in(jax.random.key(self.seed), count)
        sample = root_sample(system.output_hessian, like, key)
        # One pull-back gives the cotangents of all layers, and V at all other leaves.
        of_layers, of_others = reading.pull_back(tree.cast_like(sample, like))
        found = list(before)  # a bias that belongs to a layer keeps its moment, of zeros
        for leaf, use in enumerate(reading.uses):
            if use.sites:
                share = Share(self.fraction, count, dtype)
                found[leaf] = by_compiler(
                    moments_of_layer, use, of_layers[leaf], share, before[leaf]
                )
            elif leaf in of_others:
                gradient = of_others[leaf].astype(dtype)
                found[leaf] = by_compiler(moments_of_gradient, gradient, use.layout, before[leaf])
        return found


def _factors_of(state: Any) -> list[Factors]:
    lefts, rights = jax.tree.leaves(state.left), jax.tree.leaves(state.right)
    return [Factors(left, right) for left, right in zip(lefts, rights, strict=True)]


def _state_of(
    count: jax.Array, factors: Sequence[Factors], params: Params, kept: Any
) -> KroneckerState:
    return KroneckerState(count, *_sides(factors, params), kept)


def _sides(factors: Sequence[Factors], params: Params) -> tuple[Params, Params]:
    """``(left, right)``, trees like the parameters."""
    structure = jax.tree.structure(params)
    left = jax.tree.unflatten(structure, [each.left for each in factors])
    return left, jax.tree.unflatten(structure, [each.right for each in factors])


def _stats(finite: jax.Array | bool) -> Stats:
    return {"kronecker/finite": jnp.asarray(finite, bool)}
