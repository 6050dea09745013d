"""The spectral condition at initialisation."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import check_positive
from gnlin.width.fans import Fans, layout_of


def spectral_init(
    key: jax.Array,
    shape: Sequence[int],
    dtype: Any = None,
    *,
    fans: Fans | None = None,
    scale: float = 1.0,
) -> jax.Array:
    r"""Random weights all of whose singular values are √(fan-out/fan-in).

    Their spectral norm is what the spectral condition asks for, and with fan-in ≤ fan-out every
    input, not only some, has outputs with entries of the size of its own, through any number of
    layers. Normal entries with that norm would halve the features at each square layer.

    An initialiser of JAX and Flax as it is (``kernel_init=gnlin.width.spectral_init``);
    `functools.partial` binds `fans` and `scale`. Biases are best zero and gains one.

    Args:
        key: of the random numbers.
        shape: of the weights.
        dtype: of the weights; `None` is the default floating dtype.
        fans: their axes, as for `scale_by_spectral_condition`.
        scale: factor, such as √2 before a ReLU, which lets half of the square of its inputs
            through.

    Returns:
        Weights of this shape and dtype, orthogonal up to their scale: distributed evenly over all
        such.

    Raises:
        ValueError, TypeError: `fans` does not fit the shape, or is missing for three axes; `scale`
        is not positive.

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
    normal = jax.random.normal(
        key, (matrices, blocks, max(rows, columns), min(rows, columns)), wide
    )
    orthogonal, triangle = jnp.linalg.qr(normal)
    # The signs of the decomposition are a convention of its implementation; these make it unique.
    signs = jnp.where(jnp.diagonal(triangle, axis1=-2, axis2=-1) < 0, -1, 1).astype(wide)
    orthogonal = orthogonal * signs[:, :, None]
    stack = orthogonal if rows >= columns else jnp.swapaxes(orthogonal, -1, -2)
    return (layout.join(stack) * jnp.asarray(scale * layout.prescription, wide)).astype(dtype)
