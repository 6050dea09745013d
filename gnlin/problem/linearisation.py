"""The first-order expansion of the model: one `jax.linearize` and its transpose.

Gradients, curvature products, factors and kernels share it. `curvature` takes it next, and adds the
loss.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import shows_signature
from gnlin.jaxprs import primitive_names
from gnlin.problem.objective import Objective
from gnlin.tree import Batch, Outputs, Params


@dataclasses.dataclass(frozen=True)
class Linearisation:
    r"""A model near an anchor, :math:`f_\mathrm{lin}(\theta) = f(\phi) + J(\phi)(\theta - \phi)`.

    Attributes:
        anchor: φ, the parameters at which the model was linearised.
        outputs: f(φ).
        jvp: push-forward v ↦ Jv, from a tangent shaped like the parameters to one shaped like the
            outputs.
        vjp: pull-back u ↦ Jᵀu, from a cotangent shaped like the outputs to one shaped like the
            parameters.
        aux: auxiliary data of the model at φ; `None` without `has_aux`.
    """

    anchor: Params
    outputs: Outputs
    jvp: Callable[[Params], Outputs]
    vjp: Callable[[Outputs], Params]
    aux: Any = None

    def predict(self, params: Params) -> Outputs:
        """Outputs of the linearised model at `params`."""
        return tree.add(self.outputs, self.jvp(tree.subtract(params, self.anchor)))


@shows_signature
def linearise(objective: Objective, anchor: Params, batch: Batch = None) -> Linearisation:
    """Linearise the model of an objective at `anchor`.

    The forward pass is done once. Each later use of ``jvp`` or ``vjp`` costs about two matrix
    products per layer; a gradient costs three. A model with only a `jax.custom_vjp` (fused
    attention) gets its push-forward as the transpose of the pull-back.

    Args:
        objective: the problem.
        anchor: parameters, any pytree of real floating arrays.
        batch: data handed to the model; not needed where the objective is bound.

    Returns:
        A `Linearisation`.

    Raises:
        ValueError: `batch` is missing, or `anchor` has the holes of `optax.masked`.
        TypeError: a leaf of `anchor` or of the outputs is not a real floating array.

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> objective = gnlin.Objective.least_squares(lambda p: p ** 2)
        >>> linear = gnlin.linearise(objective, jnp.array([3.0]))
        >>> linear.predict(jnp.array([4.0]))   # 9 + 6 (4 - 3); the model itself gives 16
        Array([15.], dtype=float32)
    """
    expansion = linearise_function(lambda params: objective.outputs_and_aux(params, batch), anchor)
    return Linearisation(anchor, *expansion)


def linearised_value_and_grad(objective: Objective) -> Callable[..., tuple[Any, Params]]:
    r"""`jax.value_and_grad` of the linearised problem, for loops written by hand.

    The function that is returned, ``(params, anchor, batch=None) -> (value, gradient)``, evaluates
    :math:`Q(\theta) = \ell(f(\phi) + J(\phi)(\theta - \phi))` and :math:`\nabla Q(\theta)`. With
    `has_aux` the value is the pair ``(value, aux)``, where `aux` is that of the model at the
    anchor. Pass the anchor as an argument of the compiled step. An anchor that is closed over is a
    constant, and every re-linearisation would compile again.

    Reference: Goldwaser & Ge, arXiv 2211.12345, section 3.

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> objective = gnlin.Objective.least_squares(lambda p: p ** 2)
        >>> gnlin.linearised_value_and_grad(objective)(jnp.array([1.5]), jnp.array([1.0]))
        (Array(2., dtype=float32), Array([4.], dtype=float32))
    """

    def value_and_grad(params, anchor, batch=None):
        linear = linearise(objective, anchor, batch)
        value, cotangent = jax.value_and_grad(objective.loss_of)(linear.predict(params), batch)
        grads = linear.vjp(cotangent)
        return ((value, linear.aux), grads) if objective.has_aux else (value, grads)

    return value_and_grad


class Expansion(NamedTuple):
    """Value, push-forward, pull-back and auxiliary data of a function at a point."""

    value: Any
    jvp: Callable[[Any], Any]
    vjp: Callable[[Any], Any]
    aux: Any


def linearise_function(function: Callable[[Any], tuple[Any, Any]], point: Any) -> Expansion:
    """Expand ``function(point) -> (value, aux)``, with or without a forward-mode rule."""
    value, jvp, aux = jax.linearize(function, point, has_aux=True)
    if _lacks_forward_rule(jvp, point):
        # The other way round: reverse mode gives the pull-back, and its transpose is the
        # push-forward.
        value, pull_back, aux = jax.vjp(function, point, has_aux=True)
        push_forward = jax.linear_transpose(lambda cotangent: pull_back(cotangent)[0], value)
        return Expansion(value, lambda v: push_forward(v)[0], lambda u: pull_back(u)[0], aux)
    # Transposed, and not differentiated again, so that the forward pass is done once.
    transpose = jax.linear_transpose(jvp, point)
    return Expansion(value, jvp, lambda u: transpose(u)[0], aux)


def _lacks_forward_rule(jvp: Callable[[Any], Any], point: Any) -> bool:
    # `jax.linearize` accepts a model that has only a custom_vjp. It leaves this placeholder in the
    # linear function, which fails only when it is evaluated, far from here. Tracing on shapes finds
    # it without any work.
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), point
    )
    return "custom_lin" in primitive_names(jax.make_jaxpr(jvp)(shapes).jaxpr)
