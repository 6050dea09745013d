"""The spectral condition: the size of an update, matrix by matrix, at which features move at every
width.

Features h of a layer have entries of order one, so ‖h‖ ~ √n with n of them, and should move by as
much. A map W from fan-in to fan-out features does that where

    ‖W‖ ~ √(fan-out / fan-in)   and   ‖ΔW‖ ~ √(fan-out / fan-in)

in the spectral norm, the largest singular value. An optimiser decides the direction of ΔW; here is
how far.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnlin import tree
from gnlin.checks import is_integer
from gnlin.problem.objective import check_params
from gnlin.tree import Params
from gnlin.width.fans import FansOf, Layout, layouts


class SpectralConditionState(NamedTuple):
    vectors: Any  # of each matrix its leading right singular vector, (matrices, blocks, columns); None for vectors
    metrics: dict[str, jax.Array]


def scale_by_spectral_condition(
    fans: FansOf = None, *, lanczos_steps: int = 8
) -> optax.GradientTransformationExtraArgs:
    r"""Give each matrix of the updates the spectral norm √(fan-out/fan-in).

    .. math:: U \leftarrow \sqrt{\frac{\text{fan-out}}{\text{fan-in}}}\; \frac{U}{\|U\|},
              \qquad \|U\| = \sigma_{\max}(U).

    Stands behind what makes the direction (`optax.scale_by_adam`, momentum,
    `scale_by_gauss_newton`) and before `optax.scale_by_learning_rate`, whose η is then the relative
    change of every layer's features: the same at every width and for every optimiser. What decays
    the weights comes after it.

    The norm is found by Golub-Kahan-Lanczos from the singular vector of the update before, which is
    kept in the state, and a hundredth of a fixed random vector, for an update may be at right
    angles to the one before: `lanczos_steps` products with U and as many with its transpose, at
    most 4 · `lanczos_steps` operations for each parameter. But for rounding the estimate is not
    above the norm; by how much below is measured in the documentation.

    An update of zero stays zero. Any other is brought to size, however small a normal number it
    was: a gradient that is only rounding is scaled up as well, and near a minimum the learning rate
    has to fall. An update that is not finite is handed on as NaN, for `optax.apply_if_finite` and
    its like to see, and leaves the kept vectors alone.

    Metrics: ``spectral/largest`` and ``spectral/smallest``, over all matrices, of ‖U‖ /
    √(fan-out/fan-in) before the scaling.

    Args:
        fans: the axes of each leaf, where its number of axes does not say enough: a `Fans`, a tree
            of `Fans` (`None` for the default) of the form of the parameters or a prefix of it, or a
            function from parameters to such a tree. In `optax.inject_hyperparams` it has to be
            among the ``static_args``, as `lanczos_steps` always is. By default vectors are biases,
            matrices (in, out), and what has four axes or more the kernels of convolutions.
        lanczos_steps: at least 1, and static.

    Returns:
        An `optax.GradientTransformationExtraArgs`; parameters are not needed. Norms are computed in
        at least float32, updates keep their dtypes.

    Raises:
        ValueError, TypeError: `lanczos_steps` is out of range; at init: `fans` does not fit the
            parameters, or a leaf of three axes is without.

    References: Yang, Simon & Bernstein, A spectral condition for feature learning, arXiv 2310.17813
    (Condition 1); Golub & Kahan, Calculating the singular values and pseudo-inverse of a matrix,
    1965.

    Example:
        >>> import gnlin, jax, jax.numpy as jnp, optax
        >>> params = {"kernel": jnp.ones((4, 9)), "bias": jnp.zeros(9)}
        >>> tx = optax.chain(
        ...     optax.scale_by_adam(), gnlin.width.scale_by_spectral_condition(), optax.scale_by_learning_rate(0.1))
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> updates, _ = tx.update(grads, tx.init(params))
        >>> jnp.linalg.norm(updates["kernel"], 2).round(3), jnp.linalg.norm(updates["bias"]).round(3)  # √(9/4), √9
        (Array(0.15, dtype=float32), Array(0.3, dtype=float32))
    """
    if not is_integer(lanczos_steps) or lanczos_steps < 1:
        raise ValueError(
            f"`lanczos_steps` must be an integer of at least 1; got {lanczos_steps!r}. In optax.inject_hyperparams "
            "name it among the static_args."
        )

    def init_fn(params):
        check_params(params, allow_holes=True)
        vectors = jax.tree.map(_start, layouts(fans, params), params)
        return SpectralConditionState(vectors, {name: jnp.asarray(0.0, float) for name in _METRICS})

    def update_fn(updates, state, params: Params = None, **extra_args):
        del params, extra_args
        if updates is None:
            raise ValueError(
                "`updates` is missing: what is scaled is the update that the transform before it made"
            )
        leaves, structure = jax.tree.flatten(updates)
        plan = structure.flatten_up_to(layouts(fans, updates))
        kept = _vectors_for(structure, plan, state.vectors)
        scaled = [_scaled(*each, lanczos_steps) for each in zip(leaves, plan, kept, strict=True)]
        new_updates, vectors = (
            jax.tree.unflatten(structure, [each[i] for each in scaled]) for i in (0, 1)
        )
        ratios = [jnp.ravel(ratio).astype(float) for _, _, ratio in scaled if ratio.size]
        ratios = jnp.concatenate(ratios) if ratios else jnp.zeros(1)
        return new_updates, SpectralConditionState(
            vectors, {name: of(ratios) for name, of in _METRICS.items()}
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


_METRICS = {"spectral/largest": jnp.max, "spectral/smallest": jnp.min}


def _start(layout: Layout, leaf: jax.Array) -> jax.Array | None:
    matrices, blocks, rows, columns = layout.stack
    if min(rows, columns) <= 1 or not leaf.size:
        return None  # the norm of a vector needs no search
    return jnp.zeros(
        (matrices, blocks, columns), tree.accumulation_dtype(leaf)
    )  # nothing is known of it yet


def _vectors_for(structure: Any, plan: list[Layout], vectors: Any) -> list[jax.Array | None]:
    """The kept vectors in the order of the leaves."""
    try:
        kept = structure.flatten_up_to(vectors)
    except ValueError:
        kept = None
    if kept is None or any(
        jnp.shape(vector) != (*layout.stack[:2], layout.stack[3])
        for vector, layout in zip(kept, plan, strict=True)
        if vector is not None
    ):
        raise ValueError(
            "`opt_state` does not match `updates`; call tx.init(params) with the parameters of these updates."
        )
    return kept


def _scaled(update: jax.Array, layout: Layout, start: jax.Array | None, steps: int):
    """``(update to size, vectors to keep, norm before / prescription)`` of one leaf."""
    if not update.size:
        return update, start, jnp.zeros([0])
    wide = update.astype(tree.accumulation_dtype(update))
    matrices = layout.split(wide)
    # Squares of gradients underflow long before gradients do: norms are taken relative to the
    # largest entry.
    peak = jnp.max(jnp.abs(matrices), axis=(1, 2, 3))
    # The reciprocal of the unit has to be a number, too.
    units = jnp.where(peak == 0, 1, jnp.minimum(peak, jnp.finfo(wide.dtype).max / 4)).astype(
        wide.dtype
    )
    units = jnp.where(jnp.isfinite(peak), units, jnp.nan)
    norms, vectors = _norms(matrices, units, start, steps)
    norm = jnp.max(norms, axis=1)
    factor = layout.prescription / jnp.where(norm == 0, 1, norm).astype(wide.dtype)  # NaN stays NaN
    # One after the other, and not by the quotient of both, which may be too small for a number.
    relative = jax.lax.optimization_barrier(wide / layout.spread(units))
    return (
        (relative * layout.spread(factor)).astype(update.dtype),
        vectors,
        norm / layout.prescription * units,
    )


def _norms(
    matrices: jax.Array, units: jax.Array, start: jax.Array | None, steps: int
) -> tuple[jax.Array, jax.Array | None]:
    """``(norms / units, vectors to keep)`` of (matrices, blocks, rows, columns); units are (matrices)."""
    if start is None:
        return jnp.sqrt(jnp.sum((matrices / units[:, None, None, None]) ** 2, axis=(2, 3))), None

    def of_matrix(blocks, starts, unit):
        return jax.vmap(lambda block, vector: leading_pair(block, vector, unit, steps))(
            blocks, starts
        )

    norms, vectors = jax.vmap(of_matrix)(matrices, start, units)
    sound = (norms > 0) & jnp.all(jnp.isfinite(vectors), axis=-1)
    return norms, jnp.where(sound[..., None], vectors, start)


def leading_pair(
    matrix: jax.Array, start: jax.Array, unit: chex.Numeric, steps: int
) -> tuple[jax.Array, jax.Array]:
    """Estimates ``(σ, v)`` of the largest singular value of A = matrix / unit (m, n) and its right
    singular vector (n).

    With k steps, U (m, k) and V (n, k + 1) orthonormal, and B bidiagonal (k, k + 1),

        Uᵀ A V = B,     A vᵢ = βᵢ₋₁ uᵢ₋₁ + αᵢ uᵢ,     Aᵀ uᵢ = αᵢ vᵢ + βᵢ vᵢ₊₁,

    σ is the norm of B and v is V times its right singular vector: the best pair in the spaces
    searched. V begins with `start`, a unit vector or zero, which is turned a little lest A maps it
    to zero. Orthogonality is left to the recurrence; what rounding takes from it makes copies of
    values found, which do not harm the largest.
    """
    dtype, (rows, columns) = matrix.dtype, matrix.shape
    steps, root = (
        min(steps, rows, columns),
        jnp.sqrt(unit),
    )  # half of it on either side, so that nothing overflows
    # Any fixed numbers will do that no matrix of a network is orthogonal to by construction, as it
    # is to ones.
    anywhere = np.random.default_rng(0).normal(size=columns)
    start, _ = _normalised(start + jnp.asarray(0.01 * anywhere / np.linalg.norm(anywhere), dtype))

    def step(i, carry):
        vectors, left, beta, diagonal, above = carry
        left, alpha = _normalised(_product(matrix, vectors[i] / root) / root - beta * left)
        right, beta = _normalised(_product(left / root, matrix) / root - alpha * vectors[i])
        return (
            vectors.at[i + 1].set(right),
            left,
            beta,
            diagonal.at[i].set(alpha),
            above.at[i].set(beta),
        )

    zeros = jnp.zeros(steps, dtype)
    vectors = jnp.zeros((steps + 1, columns), dtype).at[0].set(start)
    carry = (vectors, jnp.zeros(rows, dtype), jnp.zeros([], dtype), zeros, zeros)
    # A loop and no list of steps: it compiles a quarter of the code, which counts where there are
    # many matrices.
    vectors, _, _, diagonal, above = jax.lax.fori_loop(0, steps, step, carry)
    bidiagonal = jnp.pad(jnp.diag(diagonal), ((0, 0), (0, 1))) + jnp.pad(
        jnp.diag(above), ((0, 0), (1, 0))
    )
    squares, rotations = jnp.linalg.eigh(bidiagonal.T @ bidiagonal)
    vector, _ = _normalised(rotations[:, -1] @ vectors)
    return jnp.sqrt(jnp.maximum(squares[-1], 0)), vector


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # What accelerators make of float32 by default has three digits, too few for the recurrence.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _normalised(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The vector at length one, zero if it is zero, and its length."""
    length = jnp.sqrt(jnp.sum(vector**2))
    return vector / jnp.where(length == 0, 1, length).astype(vector.dtype), length
