"""The spectral condition as a report: the norms of weights and updates beside the prescription."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import shows_signature
from gnlin.problem.objective import check_like_params, check_params
from gnlin.tree import Params
from gnlin.width.fans import FansOf, Layout, layouts


class SpectralNorms(NamedTuple):
    """Spectral norms of one leaf and of its update.

    The norms are numbers, or arrays with one number for each of the leaf's separate matrices.

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


@shows_signature
def spectral_report(
    params: Params, updates: Params, fans: FansOf = None
) -> dict[str, SpectralNorms]:
    r"""Spectral norms of weights and of their last updates, beside the prescription.

    .. math:: \|W\| \sim \sqrt{\frac{\text{fan-out}}{\text{fan-in}}},
              \qquad \|\Delta W\| \sim \sqrt{\frac{\text{fan-out}}{\text{fan-in}}}.

    Norms are exact, by singular value decompositions. That is meant for inspection, and is too
    expensive for every step. Works under `jit`.

    Args:
        params: the parameters W.
        updates: ΔW, the numbers added to them, of the same shapes.
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
    plan = jax.tree.structure(params).flatten_up_to(layouts(fans, params))
    leaves = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(updates), plan, strict=True)
    report = {}
    for (path, weight), update, layout in leaves:
        report[jax.tree_util.keystr(path)] = SpectralNorms(
            fan_in=layout.fan_in,
            fan_out=layout.fan_out,
            prescription=layout.prescription,
            weight=_exact_norms(weight, layout),
            update=_exact_norms(update, layout),
        )
    return report


def _exact_norms(leaf: jax.Array, layout: Layout) -> jax.Array:
    """The norm of each separate matrix of a leaf, of the shape of its batch axes."""
    matrices = layout.split(leaf.astype(tree.accumulation_dtype(leaf)))
    if not leaf.size:
        return jnp.zeros(layout.batch_shape, matrices.dtype)
    of_blocks = jnp.linalg.norm(matrices, 2, axis=(2, 3))
    return jnp.max(of_blocks, axis=1).reshape(layout.batch_shape)
