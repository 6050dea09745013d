"""The spectral condition at initialisation, in learning rates, and as a report."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from gnlin import tree
from gnlin.checks import check_positive
from gnlin.problem.objective import check_like_params, check_params
from gnlin.tree import Params
from gnlin.width.fans import Fans, FansOf, Layout, layout_of, layouts


class SpectralNorms(NamedTuple):
    """Spectral norms of one leaf and of its update; numbers, or one for each of the leaf's separate
    matrices.

    Attributes:
        fan_in: number of inputs.
        fan_out: number of outputs.
        prescription: √(fan-out/fan-in).
        weight: ‖W‖.
        update: ‖ΔW‖.
    """

    fan_in: chex.Numeric
    fan_out: chex.Numeric
    prescription: chex.Numeric
    weight: jax.Array
    update: jax.Array

    @property
    def weight_ratio(self) -> jax.Array:
        """‖W‖ / √(fan-out/fan-in)."""
        return self.weight / self.prescription

    @property
    def update_ratio(self) -> jax.Array:
        """‖ΔW‖ / √(fan-out/fan-in)."""
        return self.update / self.prescription


def spectral_report(
    params: Params, updates: Params, fans: FansOf = None
) -> dict[str, SpectralNorms]:
    """Spectral norms of weights and of their last updates, against the prescription
    √(fan-out/fan-in).

    Norms are exact, by singular value decompositions: for looking, and not for every step. Works
    under `jit`.

    Args:
        params: the parameters.
        updates: what was, or will be, added to them.
        fans: as for `scale_by_spectral_condition`.

    Returns:
        For each leaf, by its path as `jax.tree_util.keystr` writes it, a `SpectralNorms`.

    Raises:
        ValueError, TypeError: `updates` does not match `params`; `fans` does not fit.

    Reference: Yang, Simon & Bernstein, arXiv 2310.17813 (Condition 1).

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> params = {"kernel": jnp.eye(3, 12), "bias": jnp.zeros(12)}
        >>> updates = {"kernel": 0.2 * jnp.eye(3, 12), "bias": jnp.ones(12)}
        >>> report = gnlin.width.spectral_report(params, updates)
        >>> kernel = report["['kernel']"]
        >>> kernel.prescription, float(kernel.weight), round(float(kernel.update_ratio), 3)
        (2.0, 1.0, 0.1)
    """
    check_params(params, allow_holes=True)
    check_like_params("updates", updates, params, "pass what tx.update returned")
    structure = jax.tree.structure(params)
    plan = structure.flatten_up_to(layouts(fans, params))
    return {
        jax.tree_util.keystr(path): SpectralNorms(
            layout.fan_in,
            layout.fan_out,
            layout.prescription,
            _exact_norms(leaf, layout),
            _exact_norms(update, layout),
        )
        for (path, leaf), update, layout in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(updates), plan, strict=True
        )
    }


def _exact_norms(leaf: jax.Array, layout: Layout) -> jax.Array:
    matrices = layout.split(leaf.astype(tree.accumulation_dtype(leaf)))
    if not leaf.size:
        return jnp.zeros(layout.batch_shape, matrices.dtype)
    return jnp.max(jnp.linalg.norm(matrices, 2, axis=(2, 3)), axis=1).reshape(layout.batch_shape)


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


def scale_by_maximal_update_sgd(
    fans: FansOf = None, *, base: Params | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Learning rates by layer for updates that are *linear in the gradient*: SGD, with or without
    momentum.

    .. math:: U \leftarrow \frac{\text{fan-out}}{\text{fan-in}}\, U \quad\text{of a matrix.}

    A gradient xᵀδ has a norm of order √fan-in · 1/√fan-out, for its cotangents δ are smaller the
    more features share an effect; the factor makes of it the √(fan-out/fan-in) of the spectral
    condition. It is a constant of each leaf: nothing is measured, and the size of the gradient
    still has its say.

    Stands behind `optax.sgd` or `optax.trace`. Biases get fan-out, gains their number of features.

    Args:
        fans: as for `scale_by_spectral_condition`.
        base: parameters, or their shapes, of a narrower network of the same form; factors are then
            relative to its factors, so that rates tuned on it without this transform keep their
            meaning. By default factors are absolute, and a rate is the change of features to
            expect, in their own size.

    Returns:
        An `optax.GradientTransformationExtraArgs` without state.

    Raises:
        ValueError, TypeError: at init: `fans` or `base` does not fit the parameters.

    Reference: Yang, Simon & Bernstein, arXiv 2310.17813 (Parametrization 1); Yang & Hu, arXiv
        2011.14522.

    Example:
        >>> import gnlin, jax.numpy as jnp, optax
        >>> tx = optax.chain(optax.sgd(0.1), gnlin.width.scale_by_maximal_update_sgd())
        >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
        >>> updates, _ = tx.update(params, tx.init(params))
        >>> updates["kernel"][0], updates["bias"]                                     # 2/4, 2/1
        (Array([-0.05, -0.05], dtype=float32), Array([-0.2, -0.2], dtype=float32))
    """
    return _by_fans(lambda layout: layout.fan_out * _sign_like(layout), fans, base)


def scale_by_maximal_update_adam(
    fans: FansOf = None, *, base: Params | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Learning rates by layer for updates whose *entries have a given size*: Adam, RMSprop, Lion,
    sign descent.

    .. math:: U \leftarrow \frac{1}{\text{fan-in}}\, U \quad\text{of a matrix.}

    A matrix of entries ±1 and low rank has a norm of order √(fan-in · fan-out); the factor makes of
    it the √(fan-out/fan-in) of the spectral condition. It is a constant of each leaf: nothing is
    measured.

    Stands behind `optax.adam` or `optax.scale_by_adam`. Biases, gains and embeddings get 1. Adam's
    ε has to stay small beside the gradients, which shrink as the network widens.

    Args:
        fans: as for `scale_by_spectral_condition`.
        base: as for `scale_by_maximal_update_sgd`.

    Returns:
        An `optax.GradientTransformationExtraArgs` without state.

    Raises:
        ValueError, TypeError: at init: `fans` or `base` does not fit the parameters.

    Reference: Yang, Simon & Bernstein, arXiv 2310.17813; Yang et al., Tensor Programs V, arXiv
        2203.03466.

    Example:
        >>> import gnlin, jax.numpy as jnp, optax
        >>> tx = optax.chain(optax.adam(0.1), gnlin.width.scale_by_maximal_update_adam())
        >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
        >>> updates, _ = tx.update(params, tx.init(params))
        >>> updates["kernel"][0].round(3), updates["bias"].round(3)                   # 1/4, 1/1
        (Array([-0.025, -0.025], dtype=float32), Array([-0.1, -0.1], dtype=float32))
    """
    return _by_fans(_sign_like, fans, base)


def _sign_like(layout: Layout) -> float:
    """What takes a leaf of entries ±1 to its prescription: a block of them has the norm √(rows · columns)."""
    _, _, rows, columns = layout.stack
    return layout.prescription / math.sqrt(max(rows * columns, 1))


def _by_fans(
    factor: Callable[[Layout], float], fans: FansOf, base: Params | None
) -> optax.GradientTransformationExtraArgs:
    def factors(params):
        """A tree of numbers like `params`."""
        own = jax.tree.map(factor, layouts(fans, params))
        if base is None or not jax.tree.leaves(params):
            return own
        try:
            return jax.tree.map(
                lambda mine, layout: mine / factor(layout), own, layouts(fans, base)
            )
        except ValueError as error:
            raise ValueError(
                f"`base` must be of the form of the parameters, only narrower; got {jax.tree.structure(base)} for "
                f"{jax.tree.structure(params)}"
            ) from error

    def init_fn(params):
        check_params(params, allow_holes=True)
        factors(params)  # what does not fit is better said now
        return optax.EmptyState()

    def update_fn(updates, state, params: Params = None, **extra_args):
        del params, extra_args
        if updates is None:
            raise ValueError(
                "`updates` is missing: what is scaled is the update that the transform before it made"
            )
        return jax.tree.map(
            lambda update, each: tree.scale(each, update), updates, factors(updates)
        ), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
