"""The spectral condition in learning rates: one constant factor for each leaf."""

import math
from collections.abc import Callable

import jax
import optax

from gnlin import tree
from gnlin.checks import shows_signature
from gnlin.problem.objective import check_params
from gnlin.tree import Params
from gnlin.width.fans import FansOf, Layout, layouts


@shows_signature
def scale_by_maximal_update_sgd(
    fans: FansOf = None, *, base: Params | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Learning rates by layer for updates *linear in the gradient*: SGD, with or without momentum.

    .. math:: U \leftarrow \frac{\text{fan-out}}{\text{fan-in}}\, U \quad\text{of a matrix.}

    The norm of a gradient xᵀδ is of order √fan-in · 1/√fan-out: its cotangents δ are smaller the
    more features share an effect. The factor turns this into the √(fan-out/fan-in) of the spectral
    condition. It is a constant of each leaf. Nothing is measured, and an update still grows with
    its gradient.

    It stands after `optax.sgd` or `optax.trace`. The factor of a bias is fan-out, that of a gain is
    its number of features.

    Args:
        fans: as for `scale_by_spectral_condition`.
        base: parameters, or their shapes, of a narrower network of the same form. Factors are then
            divided by those of that network. Rates that were tuned on it without this transform
            keep their meaning. By default factors are absolute. A rate is then the expected change
            of features, in units of their own size.

    Returns:
        An `optax.GradientTransformationExtraArgs` without state. Updates keep their shapes and
        dtypes.

    Raises:
        ValueError, TypeError: at init: `fans` or `base` does not fit the parameters.

    Reference: Yang, Simon & Bernstein, arXiv 2310.17813 (Parametrization 1); Yang & Hu, arXiv
        2011.14522.

    Example:
        >>> import gnlin, jax.numpy as jnp, optax
        >>> tx = optax.chain(optax.sgd(0.1), gnlin.width.scale_by_maximal_update_sgd())
        >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
        >>> updates, _ = tx.update(params, tx.init(params))
        >>> updates["kernel"][0], updates["bias"]                               # 2/4, 2/1
        (Array([-0.05, -0.05], dtype=float32), Array([-0.2, -0.2], dtype=float32))
    """
    return _by_fans(lambda layout: layout.fan_out * _sign_factor(layout), fans, base)


@shows_signature
def scale_by_maximal_update_adam(
    fans: FansOf = None, *, base: Params | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Learning rates by layer for updates with *entries of a given size*, as Adam makes them.

    .. math:: U \leftarrow \frac{1}{\text{fan-in}}\, U \quad\text{of a matrix.}

    A matrix of entries ±1 and low rank has a norm of order √(fan-in · fan-out). The factor turns
    this into the √(fan-out/fan-in) of the spectral condition. It is a constant of each leaf.
    Nothing is measured.

    It stands after `optax.adam` or `optax.scale_by_adam`. It also suits RMSprop, Lion and sign
    descent. Biases, gains and embeddings get 1. Adam's ε has to stay small beside the gradients,
    which shrink as the network widens.

    Args:
        fans: as for `scale_by_spectral_condition`.
        base: as for `scale_by_maximal_update_sgd`.

    Returns:
        An `optax.GradientTransformationExtraArgs` without state. Updates keep their shapes and
        dtypes.

    Raises:
        ValueError, TypeError: at init: `fans` or `base` does not fit the parameters.

    Reference: Yang, Simon & Bernstein, arXiv 2310.17813; Yang et al., Tensor Programs V, arXiv
        2203.03466.

    Example:
        >>> import gnlin, jax.numpy as jnp, optax
        >>> tx = optax.chain(optax.adam(0.1), gnlin.width.scale_by_maximal_update_adam())
        >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
        >>> updates, _ = tx.update(params, tx.init(params))
        >>> updates["kernel"][0].round(3), updates["bias"].round(3)             # 1/4, 1/1
        (Array([-0.025, -0.025], dtype=float32), Array([-0.1, -0.1], dtype=float32))
    """
    return _by_fans(_sign_factor, fans, base)


def _sign_factor(layout: Layout) -> float:
    """The factor that takes a leaf of entries ±1 to its prescription."""
    # A block of such entries has the norm √(rows · columns) where its rank is one.
    size = layout.stack.rows * layout.stack.columns
    return layout.prescription / math.sqrt(max(size, 1))


def _by_fans(
    factor: Callable[[Layout], float], fans: FansOf, base: Params | None
) -> optax.GradientTransformationExtraArgs:
    """Multiply each leaf by the factor of its layout, relative to that of `base`."""

    def factors(params):
        """A tree of numbers of the form of `params`."""
        own = jax.tree.map(factor, layouts(fans, params))
        if base is None or not jax.tree.leaves(params):
            return own
        try:
            return jax.tree.map(
                lambda mine, layout: mine / factor(layout), own, layouts(fans, base)
            )
        except ValueError as error:
            raise ValueError(
                "`base` must be of the form of the parameters, only narrower; got "
                f"{jax.tree.structure(base)} for {jax.tree.structure(params)}"
            ) from error

    def init_fn(params):
        check_params(params, allow_holes=True)
        factors(params)  # raises here, and not at the first update
        return optax.EmptyState()

    def update_fn(updates, state, params: Params = None, **extra_args):
        del params, extra_args
        if updates is None:
            raise ValueError(
                "`updates` is missing: pass the update of the transform before this one, which is "
                "the one that is scaled"
            )

        def scaled(update, multiplier):
            return tree.scale(multiplier, update)

        return jax.tree.map(scaled, updates, factors(updates)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
