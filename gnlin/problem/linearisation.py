"""The model's first-order expansion: one `jax.linearize` and its transpose, shared by everything downstream."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from gnlin import tree
from gnlin.jaxprs import primitive_names
from gnlin.problem.objective import Objective
from gnlin.tree import Batch, Outputs, Params


@dataclasses.dataclass(frozen=True)
class Linearisation:
    r"""A model near an anchor, :math:`f_\mathrm{lin}(\theta) = f(\phi) + J(\phi)(\theta - \phi)`.

    Attributes:
        anchor: φ, the parameters at which the model was linearised.
        outputs: f(φ).
        jvp: push-forward, a tangent shaped like the parameters to one shaped like the outputs, v ↦
            Jv.
        vjp: pull-back, a cotangent shaped like the outputs to one shaped like the parameters, u ↦
            Jᵀu.
        aux: the model's auxiliary data at φ; `None` without `has_aux`.
    """

    anchor: Params
    outputs: Outputs
    jvp: Callable[[Params], Outputs]
    vjp: Callable[[Outputs], Params]
    aux: Any = None

    def predict(self, params: Params) -> Outputs:
        """Outputs of the linearised model at `params`."""
        return tree.add(self.outputs, self.jvp(tree.subtract(params, self.anchor)))


def linearise(objective: Objective, anchor: Params, batch: Batch = None) -> Linearisation:
    """Linearise the objective's model at `anchor`.

    The forward pass is done once. Each later use of ``jvp`` or ``vjp`` costs about two matrix
    products per layer, against three for a gradient. Models that only define a `jax.custom_vjp`
    (fused attention) get their push-forward as the transpose of the pull-back.

    Args:
        objective: the problem.
        anchor: parameters, any pytree of real floating arrays.
        batch: data handed to the model; not needed where the objective is bound.

    Raises:
        ValueError: `batch` is missing, or `anchor` has the holes of `optax.masked`.
        TypeError: a leaf of `anchor` or of the outputs is not a real floating array.

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> objective = gnlin.Objective.least_squares(lambda p: p ** 2)
        >>> linear = gnlin.linearise(objective, jnp.array([3.0]))
        >>> linear.predict(jnp.array([4.0]))   # 9 + 6 (4 - 3), where the model itself gives 16
        Array([15.], dtype=float32)
    """
    outputs, jvp, vjp, aux = linearise_function(
        lambda params: objective.outputs_and_aux(params, batch), anchor
    )
    return Linearisation(anchor, outputs, jvp, vjp, aux)


def linearised_value_and_grad(objective: Objective) -> Callable[..., tuple[Any, Params]]:
    r"""Drop-in for `jax.value_and_grad` in hand-written loops of iterative linearisation.

    The function returned, ``(params, anchor, batch=None) -> (value, gradient)``, evaluates
    :math:`Q(\theta) = \ell(f(\phi) + J(\phi)(\theta - \phi))` and :math:`\nabla Q(\theta)`; with
    `has_aux` the value is the pair ``(value, aux)``, `aux` being the model's at the anchor. Pass
    the anchor as an argument of the compiled step: one that is closed over is a constant, and every
    re-linearisation would compile again.

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


def linearise_function(
    function: Callable[[Any], tuple[Any, Any]], point: Any
) -> tuple[Any, Callable[[Any], Any], Callable[[Any], Any], Any]:
    """``(value, jvp, vjp, aux)`` of ``function(point) -> (value, aux)``, with or without a forward-mode rule."""
    value, jvp, aux = jax.linearize(function, point, has_aux=True)
    if _lacks_forward_rule(jvp, point):
        value, pull_back, aux = jax.vjp(function, point, has_aux=True)
        push_forward = jax.linear_transpose(lambda cotangent: pull_back(cotangent)[0], value)
        return value, lambda v: push_forward(v)[0], lambda u: pull_back(u)[0], aux
    transpose = jax.linear_transpose(jvp, point)
    return value, jvp, lambda u: transpose(u)[0], aux


def _lacks_forward_rule(jvp: Callable[[Any], Any], point: Any) -> bool:
    # `jax.linearize` accepts a model that has only a custom_vjp: it leaves this placeholder in the
    # linear function, which fails when it is at last evaluated, far from here.
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jax.numpy.shape(leaf), jax.numpy.result_type(leaf)), point
    )
    return "custom_lin" in primitive_names(jax.make_jaxpr(jvp)(shapes).jaxpr)
