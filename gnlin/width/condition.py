"""The spectral condition: the size of each update for which features move at every width.

The n features h of a layer have entries of order one, so ‖h‖ ~ √n. Training should change them by
as much. A map W from fan-in to fan-out features does so where

    ‖W‖ ~ √(fan-out / fan-in)   and   ‖ΔW‖ ~ √(fan-out / fan-in)

in the spectral norm, the largest singular value. An optimiser decides the direction of ΔW. This
module decides its size.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnlin import tree
from gnlin.checks import is_integer, shows_signature
from gnlin.problem.objective import check_params
from gnlin.tree import Params
from gnlin.width.fans import FansOf, Layout, layouts


class SpectralConditionState(NamedTuple):
    # The leading right singular vector of each block, (matrices, blocks, columns). None for a leaf
    # of vectors.
    vectors: Any
    metrics: dict[str, jax.Array]


@shows_signature
def scale_by_spectral_condition(
    fans: FansOf = None, *, lanczos_steps: int = 8
) -> optax.GradientTransformationExtraArgs:
    r"""Give each matrix of the updates the spectral norm √(fan-out/fan-in).

    .. math:: U \leftarrow \sqrt{\frac{\text{fan-out}}{\text{fan-in}}}\; \frac{U}{\|U\|},
              \qquad \|U\| = \sigma_{\max}(U).

    It stands after the transform that makes the direction (`optax.scale_by_adam`, momentum,
    `scale_by_gauss_newton`) and before `optax.scale_by_learning_rate`. The rate η is then the
    relative change of every layer's features. It means the same at every width and for every
    optimiser. Weight decay comes after the scaling.

    Golub-Kahan-Lanczos finds the norm. It starts from the singular vector of the update before,
    which is in the state, plus a hundredth of a fixed random vector. The random part is there
    because an update may be at right angles to the one before. The search makes `lanczos_steps`
    products with U and as many with its transpose: at most 4 · `lanczos_steps` operations for each
    parameter. The estimate never exceeds the norm, except by rounding. The documentation measures
    how far below it is.

    An update of zero stays zero. Every other update gets the prescribed size, however small a
    normal number it was. A gradient that is only rounding is scaled up as well, so the learning
    rate has to fall near a minimum. An update that is not finite is handed on as NaN, so that
    `optax.apply_if_finite` and its like see it. It leaves the vectors of the state alone.

    Metrics: ``spectral/largest`` and ``spectral/smallest``, over all matrices, of ‖U‖ /
    √(fan-out/fan-in) before the scaling.

    Args:
        fans: the axes of each leaf, where its number of axes does not determine them. It is a
            `Fans`, a tree of `Fans`, or a function from parameters to such a tree. The tree has the
            form of the parameters or is a prefix of it; `None` in it stands for the default. By
            default leaves of one axis are biases and those of two are matrices (in, out). Leaves of
            four or more are the kernels of convolutions. `optax.inject_hyperparams` needs `fans`
            among the ``static_args``.
        lanczos_steps: at least 1, and static: always among the ``static_args``.

    Returns:
        An `optax.GradientTransformationExtraArgs`; parameters are not needed. Updates keep their
        shapes and dtypes. Norms are computed in at least float32.

    Raises:
        ValueError, TypeError: `lanczos_steps` is out of range; at init: `fans` does not fit the
            parameters, or a leaf of three axes has none.

    References: Yang, Simon & Bernstein, A spectral condition for feature learning, arXiv 2310.17813
    (Condition 1); Golub & Kahan, Calculating the singular values and pseudo-inverse of a matrix,
    1965.

    Example:
        >>> import gnlin, jax, jax.numpy as jnp, optax
        >>> params = {"kernel": jnp.ones((4, 9)), "bias": jnp.zeros(9)}
        >>> tx = optax.chain(
        ...     optax.scale_by_adam(),
        ...     gnlin.width.scale_by_spectral_condition(),
        ...     optax.scale_by_learning_rate(0.1),
        ... )
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> updates, _ = tx.update(grads, tx.init(params))
        >>> jnp.linalg.norm(updates["kernel"], 2).round(3)                      # 0.1 √(9/4)
        Array(0.15, dtype=float32)
        >>> jnp.linalg.norm(updates["bias"]).round(3)                           # 0.1 √9
        Array(0.3, dtype=float32)
    """
    if not is_integer(lanczos_steps) or lanczos_steps < 1:
        raise ValueError(
            f"`lanczos_steps` must be an integer of at least 1; got {lanczos_steps!r}. In "
            "optax.inject_hyperparams name it among the static_args."
        )

    def init_fn(params):
        check_params(params, allow_holes=True)
        vectors = jax.tree.map(_start, layouts(fans, params), params)
        return SpectralConditionState(vectors, {name: jnp.asarray(0.0, float) for name in _METRICS})

    def update_fn(updates, state, params: Params = None, **extra_args):
        del params, extra_args
        if updates is None:
            raise ValueError(
                "`updates` is missing: pass the update of the transform before this one, which is "
                "the one that is scaled"
            )
        leaves, structure = jax.tree.flatten(updates)
        plan = structure.flatten_up_to(layouts(fans, updates))
        starts = _vectors_of(state, structure, plan)
        scaled = [
            _scale(leaf, layout, start, lanczos_steps)
            for leaf, layout, start in zip(leaves, plan, starts, strict=True)
        ]
        new_updates = jax.tree.unflatten(structure, [each.update for each in scaled])
        vectors = jax.tree.unflatten(structure, [each.vectors for each in scaled])
        ratios = [jnp.ravel(each.ratios).astype(float) for each in scaled if each.ratios.size]
        all_ratios = jnp.concatenate(ratios) if ratios else jnp.zeros(1)
        metrics = {name: reduce(all_ratios) for name, reduce in _METRICS.items()}
        return new_updates, SpectralConditionState(vectors, metrics)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


_METRICS = {"spectral/largest": jnp.max, "spectral/smallest": jnp.min}


def _start(layout: Layout, leaf: jax.Array) -> jax.Array | None:
    """The vectors before the first update: zero, for nothing is known of them."""
    stack = layout.stack
    if min(stack.rows, stack.columns) <= 1 or not leaf.size:
        return None  # the norm of a vector needs no search
    return jnp.zeros((stack.matrices, stack.blocks, stack.columns), tree.accumulation_dtype(leaf))


def _vectors_of(
    state: SpectralConditionState, structure: Any, plan: list[Layout]
) -> list[jax.Array | None]:
    """The vectors of the state in the order of the leaves.

    Raises:
        ValueError: they belong to other parameters.
    """
    mismatch = ValueError(
        "`opt_state` does not match `updates`; call tx.init(params) with the parameters of these "
        "updates."
    )
    try:
        vectors = structure.flatten_up_to(state.vectors)
    except ValueError:
        raise mismatch from None
    for vector, layout in zip(vectors, plan, strict=True):
        expected = (layout.stack.matrices, layout.stack.blocks, layout.stack.columns)
        if vector is not None and jnp.shape(vector) != expected:
            raise mismatch
    return vectors


class _Scaled(NamedTuple):
    """One leaf after the scaling."""

    update: jax.Array
    vectors: jax.Array | None
    ratios: jax.Array  # of the norm before the scaling to the prescription, (matrices)


def _scale(update: jax.Array, layout: Layout, start: jax.Array | None, steps: int) -> _Scaled:
    """Give each matrix of one leaf its prescribed norm; the search starts at `start`."""
    if not update.size:
        return _Scaled(update, start, jnp.zeros([0]))
    wide = update.astype(tree.accumulation_dtype(update))
    matrices = layout.split(wide)
    units = _units(matrices)
    norms, vectors = _norms(matrices, units, start, steps)
    norm = jnp.max(norms, axis=1)
    nonzero = jnp.where(norm == 0, 1, norm)  # an update of zero stays zero; NaN stays NaN
    factor = layout.prescription / nonzero.astype(wide.dtype)
    # Two steps, and a barrier lest the compiler merges them: factor / unit may overflow or
    # underflow where both of its parts are ordinary numbers.
    relative = jax.lax.optimization_barrier(wide / layout.spread(units))
    new = (relative * layout.spread(factor)).astype(update.dtype)
    return _Scaled(new, vectors, norm / layout.prescription * units)


def _units(matrices: jax.Array) -> jax.Array:
    """The largest entry of each matrix, (matrices): the unit in which its norm is computed.

    Squares of gradients underflow long before gradients do. In this unit only squares that do not
    matter underflow. The unit of zero is one, and that of numbers that are not finite is NaN.
    """
    peak = jnp.max(jnp.abs(matrices), axis=(1, 2, 3))
    # The compiler may multiply by the reciprocal of the unit. 1 / max is subnormal, which is
    # flushed to zero; 4 / max is a normal number.
    bounded = jnp.minimum(peak, jnp.finfo(matrices.dtype).max / 4)
    units = jnp.where(peak == 0, 1, bounded).astype(matrices.dtype)
    return jnp.where(jnp.isfinite(peak), units, jnp.nan)


def _norms(
    matrices: jax.Array, units: jax.Array, start: jax.Array | None, steps: int
) -> tuple[jax.Array, jax.Array | None]:
    """Norms of all blocks in `units`, (matrices, blocks), and the vectors for the state."""
    if start is None:
        return jnp.sqrt(jnp.sum((matrices / units[:, None, None, None]) ** 2, axis=(2, 3))), None

    def of_matrix(blocks, starts, unit):
        return jax.vmap(lambda block, vector: leading_pair(block, vector, unit, steps))(
            blocks, starts
        )

    norms, vectors = jax.vmap(of_matrix)(matrices, start, units)
    # An update of zero has no singular vector, and NaN in the state would outlast the update.
    sound = (norms > 0) & jnp.all(jnp.isfinite(vectors), axis=-1)
    return norms, jnp.where(sound[..., None], vectors, start)


class _Lanczos(NamedTuple):
    """The recurrence before step i; k steps in all, of a matrix (m, n)."""

    vectors: jax.Array  # v₀ … vᵢ in the first rows of (k + 1, n)
    left: jax.Array  # uᵢ₋₁, (m)
    beta: jax.Array  # βᵢ₋₁
    diagonal: jax.Array  # α of B, (k)
    above: jax.Array  # β of B, (k)


def leading_pair(
    matrix: jax.Array, start: jax.Array, unit: chex.Numeric, steps: int
) -> tuple[jax.Array, jax.Array]:
    """Estimates ``(σ, v)`` of the largest singular value of A = matrix / unit (m, n) and its right
    singular vector (n).

    With k steps, U (m, k) and V (n, k + 1) orthonormal, and B bidiagonal (k, k + 1),

        Uᵀ A V = B,     A vᵢ = βᵢ₋₁ uᵢ₋₁ + αᵢ uᵢ,     Aᵀ uᵢ = αᵢ vᵢ + βᵢ vᵢ₊₁,

    σ is the norm of B, and v is V times the right singular vector of B. They are the best pair in
    the spaces of the search. V begins with `start`, a unit vector or zero, plus a small fixed
    vector, because A may map `start` to zero.

    The vectors are not orthogonalised again: the recurrence alone keeps them orthogonal. Rounding
    spoils that in time. It then finds copies of values it has found, which do not harm the largest.
    """
    dtype, (rows, columns) = matrix.dtype, matrix.shape
    steps = min(steps, rows, columns)
    # A is never formed: half of the division comes before each product and half after it, so that
    # neither the product nor its argument overflows.
    root = jnp.sqrt(unit)
    # Any fixed numbers will do to which no matrix of a network is orthogonal by construction. To
    # ones such matrices exist.
    anywhere = np.random.default_rng(0).normal(size=columns)
    start, _ = _normalised(start + jnp.asarray(0.01 * anywhere / np.linalg.norm(anywhere), dtype))

    def step(i, state: _Lanczos) -> _Lanczos:
        right = state.vectors[i]
        # Both lines solve the recurrence for its new vector; its length is the new coefficient.
        left, alpha = _normalised(_product(matrix, right / root) / root - state.beta * state.left)
        following, beta = _normalised(_product(left / root, matrix) / root - alpha * right)
        return _Lanczos(
            vectors=state.vectors.at[i + 1].set(following),
            left=left,
            beta=beta,
            diagonal=state.diagonal.at[i].set(alpha),
            above=state.above.at[i].set(beta),
        )

    zeros = jnp.zeros(steps, dtype)
    vectors = jnp.zeros((steps + 1, columns), dtype).at[0].set(start)
    first = _Lanczos(vectors, jnp.zeros(rows, dtype), jnp.zeros([], dtype), zeros, zeros)
    # A loop and no list of steps: it compiles a quarter of the code, which counts where there are
    # many matrices.
    last = jax.lax.fori_loop(0, steps, step, first)
    on_diagonal = jnp.pad(jnp.diag(last.diagonal), ((0, 0), (0, 1)))
    bidiagonal = on_diagonal + jnp.pad(jnp.diag(last.above), ((0, 0), (1, 0)))
    # The square of B costs small singular values half of their digits, and the largest none.
    squares, rotations = jnp.linalg.eigh(bidiagonal.T @ bidiagonal)
    vector, _ = _normalised(rotations[:, -1] @ last.vectors)
    return jnp.sqrt(jnp.maximum(squares[-1], 0)), vector


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # By default accelerators multiply float32 with three digits, too few for the recurrence.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _normalised(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The vector at length one, zero if it is zero, and its length."""
    length = jnp.sqrt(jnp.sum(vector**2))
    return vector / jnp.where(length == 0, 1, length).astype(vector.dtype), length
