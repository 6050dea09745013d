"""The spectral condition at the start: initial weights of the prescribed norm."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import check_positive, shows_signature
from gnlin.width.fans import Fans, layout_of


@shows_signature
def spectral_init(
    key: jax.Array,
    shape: Sequence[int],
    dtype: Any = None,
    *,
    fans: Fans | None = None,
    scale: float = 1.0,
) -> jax.Array:
    r"""Random weights all of whose singular values are √(fan-out/fan-in).

    .. math:: W = \sqrt{\frac{\text{fan-out}}{\text{fan-in}}}\; Q, \qquad Q \text{ orthogonal.}

    Their spectral norm is the one of the spectral condition. Where fan-in ≤ fan-out, the outputs of
    every input have entries of the size of its own, through any number of layers. Normal entries
    with that norm would halve the features at each square layer.

    It is an initialiser of JAX and Flax as it stands (``kernel_init=gnlin.width.spectral_init``);
    `functools.partial` binds `fans` and `scale`. Biases are best zero and gains one.

    Args:
        key: of the random numbers.
        shape: of the weights.
        dtype: of the weights; `None` is the default floating dtype.
        fans: their axes, as for `scale_by_spectral_condition`.
        scale: factor, such as √2 before a ReLU, which lets half of the square of its inputs
            through.

    Returns:
        Weights of this shape and dtype, orthogonal up to their scale, with the uniform distribution
        over all such weights.

    Raises:
        ValueError, TypeError: `fans` does not fit the shape, or is missing for three axes; `scale`
            is not positive; `dtype` is not a real floating dtype.

    Reference: Yang, Simon & Bernstein, arXiv 2310.17813 (Condition 1; their Parametrization 1 has
        normal entries).

    Example:
        >>> import gnlin, jax, jax.numpy as jnp
        >>> weights = gnlin.width.spectral_init(jax.random.key(0), (16, 64))
        >>> jnp.linalg.norm(weights, 2).round(4)
        Array(2., dtype=float32)
    """
    check_positive("scale", scale)
    dtype = jax.dtypes.canonicalize_dtype(float if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` must be a real floating dtype; got {dtype}")
    layout = layout_of("the weights", fans, tuple(shape))
    matrices, blocks, rows, columns = layout.stack
    wide = tree.accumulation_dtype(jnp.zeros([], dtype))
    # The columns of Q are orthonormal only where there are at least as many rows.
    tall = (matrices, blocks, max(rows, columns), min(rows, columns))
    orthogonal, triangle = jnp.linalg.qr(jax.random.normal(key, tall, wide))
    # The signs of the decomposition are a convention of its implementation. A positive diagonal of
    # R makes Q unique, and its distribution uniform.
    signs = jnp.where(jnp.diagonal(triangle, axis1=-2, axis2=-1) < 0, -1, 1).astype(wide)
    orthogonal = orthogonal * signs[:, :, None]
    stack = orthogonal if rows >= columns else jnp.swapaxes(orthogonal, -1, -2)
    return (layout.join(stack) * jnp.asarray(scale * layout.prescription, wide)).astype(dtype)
