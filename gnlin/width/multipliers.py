"""The spectral condition in learning rates: one constant factor for each leaf."""

import math
from collections.abc import Callable

import jax
import optax

from gnlin import tree
from gnlin.problem.objective import check_params
from gnlin.tree import Params
from gnlin.width.fans import FansOf, Layout, layouts


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
