"""The unit of a λ without units, measured on the first batch of `gauss_newton`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.problem.curvature import QuadraticModel
from gnlin.tree import Params


def damping_unit(
    unit: jax.Array, model: QuadraticModel, gradient: Callable[[], Params], params: Params
) -> tuple[jax.Array, jax.Array]:
    """``(unit of this update, unit to be kept)``: measured until there is one.

    It is 0 while none could be measured. λ then is in units of 1, and no step is taken, because
    the gradient is zero or not finite.
    """

    def measured() -> jax.Array:
        # Only now, because a gradient beside the incoming updates is a pull-back more.
        return measured_unit(model, gradient(), params)

    kept = jax.lax.cond(unit > 0, lambda: unit, measured)
    return jnp.where(kept > 0, kept, 1), kept


def measured_unit(model: QuadraticModel, gradient: Params, params: Params) -> jax.Array:
    """2Δ / (‖θ‖² + ‖c‖²), see `GainRatio`; 0 where it is not a positive number."""
    size = tree.max_abs(gradient)
    # The square of a small gradient would vanish.
    unit_gradient = tree.scale(1 / jnp.where(size > 0, size, 1), gradient)
    image = model.linear.jvp(unit_gradient)
    curved = tree.inner(image, model.output_hessian(image))
    squared = tree.inner(unit_gradient, unit_gradient)
    # c has the length `size · squared / curved` times the unit gradient.
    length = size * squared / jnp.where(curved > 0, curved, 1)
    square = length * squared * length
    # 2Δ = ‖c‖² · curved / squared.
    share = square / (tree.inner(params, params) + square)
    found = share * curved / jnp.where(squared > 0, squared, 1)
    return jnp.where(jnp.isfinite(found) & (found > 0), found, 0).astype(float)
