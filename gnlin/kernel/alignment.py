"""Comparison of kernels: how far one has turned or moved, and how many directions it has."""

import jax
import jax.numpy as jnp

from gnlin import tree


def kernel_alignment(a: jax.Array, b: jax.Array, *, centred: bool = True) -> jax.Array:
    r"""Cosine between two kernels, in the Frobenius inner product.

    .. math:: A(a, b) = \frac{\langle CaC, CbC\rangle_F}{\|CaC\|_F\,\|CbC\|_F},
              \qquad C = I - \tfrac1N 1 1^\top

    With `centred`, the features' mean over examples is taken out. Without it C = I, and 1 − A is
    Fort's kernel distance. The alignment does not change with the scale of a kernel, or with the
    order of its parameters or examples.

    Args:
        a: as `empirical_ntk` returns it: (N, M), (C, N, M) or (N, C, M, C), where C counts outputs.
        b: of the same shape.
        centred: whether to centre both over examples.

    Returns:
        A scalar in [−1, 1], for positive semi-definite kernels in [0, 1]; 0 where a (centred)
        kernel vanishes.

    Raises:
        ValueError: the shapes differ, or are not those of kernels.

    References: Cortes, Mohri & Rostamizadeh, Algorithms for learning kernels based on centered
        alignment, JMLR 2012; Fort et al., arXiv 2010.15110.

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> float(gnlin.kernel.kernel_alignment(jnp.eye(3), 2 * jnp.eye(3)))
        1.0
    """
    a, b = _kernels(a, b)
    if centred:
        a, b = _centre(a), _centre(b)
    # Rounding alone must not take it beyond 1.
    return jnp.clip(tree.inner(_unit(a), _unit(b)), -1, 1)


def _unit(kernel: jax.Array) -> jax.Array:
    """A kernel of norm 1; 0 where it vanishes."""
    norm = tree.norm(kernel)
    return kernel / jnp.where(norm > 0, norm, 1)


def kernel_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    r"""Distance of a kernel from a reference, relative to the reference's size.

    .. math:: D(a, b) = \|a - b\|_F \,/\, \|b\|_F

    Unlike the alignment it sees growth: D(2b, b) = 1.

    Args:
        a: as `empirical_ntk` returns it.
        b: the reference, of the same shape.

    Returns:
        A scalar ≥ 0; infinite where the reference vanishes and `a` does not.

    Raises:
        ValueError: the shapes differ, or are not those of kernels.

    Reference: Lee et al., arXiv 1902.06720, figure 1 (relative change of the kernel in training).

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> float(gnlin.kernel.kernel_distance(3 * jnp.eye(2), jnp.eye(2)))
        2.0
    """
    a, b = _kernels(a, b)
    moved, size = tree.norm(a - b), tree.norm(b)
    return jnp.where(moved == 0, 0, moved / size)  # NaN stays NaN


def kernel_spectrum(kernel: jax.Array) -> jax.Array:
    r"""Eigenvalues of a kernel between a batch and itself, the largest first.

    .. math:: K = \sum_i \lambda_i\, q_i q_i^\top, \qquad \lambda_1 \ge \lambda_2 \ge \dots

    Args:
        kernel: as `empirical_ntk` returns it, with N = M.

    Returns:
        (N,) of a trace, (C, N) of a diagonal, (N·C,) of a full kernel; those that rounding made
        negative are 0.

    Raises:
        ValueError: the kernel is not square.

    Reference: Jacot, Gabriel & Hongler, arXiv 1806.07572, section 5 (the error along qᵢ decays as
        exp(−ηλᵢt)).

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> gnlin.kernel.kernel_spectrum(jnp.diag(jnp.array([1.0, 3.0])))
        Array([3., 1.], dtype=float32)
    """
    (kernel,) = _kernels(kernel)
    if kernel.ndim == 4:
        kernel = kernel.reshape(kernel.shape[0] * kernel.shape[1], -1)
    if kernel.shape[-1] != kernel.shape[-2]:
        raise ValueError(
            f"`kernel` must be between a batch and itself; got the shape {kernel.shape}"
        )
    return jnp.maximum(jnp.flip(jnp.linalg.eigvalsh(kernel), axis=-1), 0)


def effective_rank(kernel: jax.Array) -> jax.Array:
    r"""The number of directions of a kernel, each counted by its weight.

    .. math:: \exp\Big(-\sum_i p_i \log p_i\Big), \qquad p_i = \lambda_i / \sum_j \lambda_j

    Between 1, for a kernel of rank one, and N, for a multiple of the identity.

    Args:
        kernel: as `kernel_spectrum`.

    Returns:
        A scalar; (C,) of a diagonal kernel; 0 where the kernel vanishes.

    Raises:
        ValueError: the kernel is not square.

    Reference: Roy & Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO
        2007.

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> float(gnlin.kernel.effective_rank(jnp.eye(4)).round(3))
        4.0
    """
    values = kernel_spectrum(kernel)
    total = jnp.sum(values, axis=-1)
    shares = values / jnp.where(total > 0, total, 1)[..., None]
    # The limit of p log p at 0 is 0; without the inner `where` it would be NaN.
    terms = jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1)), 0)
    rank = jnp.exp(-jnp.sum(terms, axis=-1))
    # A NaN is no positive share, so the sum would hide it.
    return jnp.where(total == 0, 0, jnp.where(jnp.isfinite(total), rank, jnp.nan))


# From the number of axes of a kernel to the two that count examples.
_EXAMPLE_AXES = {2: (0, 1), 3: (1, 2), 4: (0, 2)}


def _kernels(*kernels: jax.Array) -> list[jax.Array]:
    """Kernels in their accumulation dtypes. All must have the same shape, and a kernel's."""
    arrays = [jnp.asarray(kernel) for kernel in kernels]
    for array in arrays:
        if array.ndim not in _EXAMPLE_AXES or array.shape != arrays[0].shape:
            raise ValueError(
                "kernels must have the shape (N, M), (C, N, M) or (N, C, M, C) that "
                "gnlin.kernel.empirical_ntk gives them, and the same; "
                f"got {[each.shape for each in arrays]}"
            )
    return [array.astype(tree.accumulation_dtype(array)) for array in arrays]


def _centre(kernel: jax.Array) -> jax.Array:
    """C K C, for each pair of outputs."""
    # Means of the columns first, then of the rows: C from the left, and C from the right.
    for axis in _EXAMPLE_AXES[kernel.ndim]:
        kernel = kernel - jnp.mean(kernel, axis=axis, keepdims=True)
    return kernel
