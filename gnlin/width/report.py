"""The spectral condition as a report: norms of weights and updates beside their prescription."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.problem.objective import check_like_params, check_params
from gnlin.tree import Params
from gnlin.width.fans import FansOf, Layout, layouts


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
