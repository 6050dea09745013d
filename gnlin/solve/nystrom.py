"""A low-rank approximation of the Gauss-Newton matrix from a random sketch: a preconditioner.

`cg` calls `Nystrom.prepare` once for each system. The sketch takes products with the whole system,
and needs no layers.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import check_integer, shows_signature
from gnlin.problem.curvature import System
from gnlin.sharding import check_mesh
from gnlin.solve.protocols import Preparation, Stats
from gnlin.tree import Params

# U must stay orthonormal and M⁻¹ definite: products in TF32 or bfloat16, accelerators' default, are
# too coarse.
_EXACTLY = jax.lax.Precision.HIGHEST


class NystromState(NamedTuple):
    count: jax.Array  # of systems; those at multiples of `refresh_every` were sketched
    vectors: jax.Array  # U, (P, rank)
    eigenvalues: jax.Array  # Λ, (rank,), from the largest down


@shows_signature
@dataclasses.dataclass(frozen=True)
class Nystrom:
    r"""Randomised Nyström preconditioner of the damped Gauss-Newton system,
    ``CG(preconditioner=Nystrom())``.

    From a sketch :math:`Y = G\Omega`, Ω (P × rank) with orthonormal columns,

    .. math:: U \Lambda U^\top = Y (\Omega^\top Y)^{-1} Y^\top, \qquad
              M^{-1} = (\lambda_r + \lambda)\, U (\Lambda + \lambda I)^{-1} U^\top + (I - U U^\top),

    where :math:`\lambda_r` is the least of Λ. The system that remains has about the condition
    number of G + λI without its `rank` largest eigenvalues. A sketch costs `rank` products, as many
    as `rank` iterations of CG. So it pays where CG would take several times as many, and not for a
    solve of ten.

    Ω spans the last U plus as much of normal noise. From sketch to sketch this is a block power
    method, which finds as much as twice the rank would without it. A sketch may also serve
    `refresh_every` systems in a row. That is cheap where steps are small. Where they are not, an
    outdated U takes more iterations than none.

    With a scaling D of the system, G is :math:`D^{-1/2} G D^{-1/2}` above, and M⁻¹ has
    :math:`D^{-1/2}` on both sides. M is positive definite: λ counts as at least 100 ε λ₁, where ε
    is the resolution of float32 (or float64). D counts as 1 where it is 0. The state has P · rank
    numbers.

    Args:
        rank: columns of the sketch; at most P, the number of parameters, are used.
        refresh_every: systems that one sketch serves. 1 sketches every one.
        batch_size: products that are taken together. Each holds one copy of the activations of the
            network. On CPUs one by one is no slower. An accelerator that a single product does not
            fill is faster with more.
        seed: of the noise, which is fresh for each sketch.

    Raises:
        ValueError: an argument is out of its range.

    References: Frangella, Tropp & Udell, Randomized Nyström preconditioning, arXiv 2110.02820,
    algorithm 2.1; Halko, Martinsson & Tropp, Finding structure with randomness, arXiv 0909.4061,
    section 4.5 (power iteration).

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> scales = 10.0 ** -jnp.arange(0.0, 3.0, 0.1)   # condition number 10⁶
        >>> objective = gnlin.Objective.least_squares(lambda p: scales * p - 1.0)
        >>> params = jnp.zeros(30)
        >>> def iterations(preconditioner):
        ...     solver = gnlin.CG(max_iterations=200, preconditioner=preconditioner)
        ...     tx = gnlin.scale_by_gauss_newton(objective, damping=1e-4, solver=solver)
        ...     _, state = tx.update(None, tx.init(params), params)
        ...     return int(gnlin.metrics(state)["cg/iterations"])
        >>> iterations(gnlin.Nystrom(rank=20)) < iterations(None) / 3
        True
    """

    rank: int = 20
    refresh_every: int = 1
    batch_size: int = 1
    seed: int = 0

    def __post_init__(self):
        for name, least in (("rank", 1), ("refresh_every", 1), ("batch_size", 1), ("seed", 0)):
            check_integer(name, getattr(self, name), least)

    def init(self, params: Params) -> tuple[NystromState, Stats]:
        dtype, size = tree.accumulation_dtype(params), tree.size(params)
        rank = min(self.rank, size)
        count = jnp.zeros([], jnp.int32)
        return NystromState(count, jnp.zeros([size, rank], dtype), jnp.zeros([rank], dtype)), {}

    def prepare(
        self, system: System, params: Params, state: NystromState
    ) -> tuple[Preparation, NystromState]:
        check_mesh(params)
        root = _root_of_scaling(system, params)

        def refreshed():
            key = jax.random.fold_in(jax.random.key(self.seed), state.count)
            sketch = self._sketch(system, params, root, key, state.vectors)
            return _approximate(*sketch, _resolution(params))

        def kept():
            return state.vectors, state.eigenvalues

        if self.refresh_every == 1:
            vectors, eigenvalues = refreshed()
        else:
            due = state.count % self.refresh_every == 0
            vectors, eigenvalues = jax.lax.cond(due, refreshed, kept)
        next_state = NystromState(state.count + 1, vectors, eigenvalues)
        apply = _inverse(vectors, eigenvalues, jnp.asarray(system.damping, root.dtype), root)
        return Preparation(apply, {}), next_state

    def _sketch(self, system, params, root, key, last) -> tuple[jax.Array, jax.Array]:
        """``(Ω, Y)``, both (P, rank)."""
        dtype = root.dtype

        def product(column):
            # The vector is rounded to the dtypes of the parameters, so Ω is rounded likewise.
            vector = tree.unflatten(column / root, params)
            image = system.ggn(vector)
            return tree.flatten(vector, dtype) * root, tree.flatten(image, dtype) / root

        # Columns of noise have a norm of about 1, as those of U.
        noise = jax.random.normal(key, last.shape, dtype) / jnp.sqrt(
            jnp.asarray(max(len(last), 1), dtype)
        )
        columns = jnp.linalg.qr(last + noise)[0].T
        together = min(self.batch_size, len(columns))
        test, images = jax.lax.map(product, columns, batch_size=together if together > 1 else None)
        return test.T, images.T


def _root_of_scaling(system: System, params: Params) -> jax.Array:
    """D^½, (P,)."""
    dtype = tree.accumulation_dtype(params)
    if system.scaling is None:
        return jnp.ones([tree.size(params)], dtype)
    diagonal = tree.flatten(system.scaling, dtype)
    return jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))


def _resolution(params: Params) -> float:
    """ε of the coarsest dtype among the leaves, in which products are computed."""
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(params)), default=0.0)


def _approximate(
    test: jax.Array, images: jax.Array, resolution: float
) -> tuple[jax.Array, jax.Array]:
    """``(U, Λ)`` with UΛUᵀ = Y (ΩᵀY)⁻¹ Yᵀ, computed of G + νI and shifted back."""
    # Rounding leaves ΩᵀY with eigenvalues below zero, of the order of ν. Where Cholesky's
    # factorisation would still fail, the square root of the eigenvalues does not.
    shift = resolution * jnp.linalg.norm(images)
    shifted = images + shift * test
    core = jnp.matmul(test.T, shifted, precision=_EXACTLY)
    eigenvalues, vectors = jnp.linalg.eigh((core + core.T) / 2)
    inverse_root = (
        vectors / jnp.sqrt(jnp.maximum(eigenvalues, jnp.where(shift > 0, shift, 1)))[None, :]
    )
    # With B = (Y + νΩ)(ΩᵀY + νI)^-½ the approximation is BBᵀ: its eigenvectors are the left
    # singular vectors of B, and its eigenvalues the squares of the singular values.
    q, r = jnp.linalg.qr(jnp.matmul(shifted, inverse_root, precision=_EXACTLY))
    left, singular_values, _ = jnp.linalg.svd(r)
    return jnp.matmul(q, left, precision=_EXACTLY), jnp.maximum(
        jnp.square(singular_values) - shift, 0
    )


def _inverse(vectors, eigenvalues, damping, root) -> Callable[[Params], Params]:
    eps, dtype = jnp.finfo(root.dtype).eps, root.dtype
    largest = jnp.max(eigenvalues, initial=0)
    # I − UUᵀ is zero on the span of U up to rounding, which must not outweigh the first term.
    damping = jnp.maximum(damping, jnp.where(largest == 0, 1, 100 * eps * largest))
    least = jnp.min(eigenvalues, initial=jnp.inf)
    # M⁻¹ = I − U diag(taken) Uᵀ, with taken = 1 − (λ_r + λ) / (Λ + λ).
    taken = 1 - (least + damping) / (eigenvalues + damping)

    def apply(vector: Params) -> Params:
        flat = tree.flatten(vector, dtype) / root
        along = jnp.matmul(vectors.T, flat, precision=_EXACTLY)
        flat -= jnp.matmul(vectors, taken * along, precision=_EXACTLY)
        return tree.unflatten(flat / root, vector)

    return apply
