r"""Curvature of the loss through a linearised model.

Let z be the outputs, J their Jacobian in the parameters, and H the Hessian of the loss in z. The
generalised Gauss-Newton (GGN) matrix is G = Jᵀ H J. It is the Hessian of the loss on the linearised
model. Every product with it is a push-forward, a product with H in output space, and a pull-back.

The linearisation comes from `linearisation`. `QuadraticModel` hands a `System` to the solvers of
`gnlin.solve`. The models of the loss at the end serve iterative linearisation, prox-linear steps
and the default step rule.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import optax

from gnlin import tree
from gnlin.checks import shows_signature
from gnlin.problem.linearisation import Linearisation, linearise, linearise_function
from gnlin.problem.masking import with_constants
from gnlin.problem.objective import Objective
from gnlin.tree import Batch, Outputs, Params


@dataclasses.dataclass(frozen=True)
class System:
    """The damped Gauss-Newton system (JᵀHJ + λD) x = b.

    `QuadraticModel.system` makes one; the solvers of `gnlin.solve` take it.

    Attributes:
        jvp: v ↦ Jv.
        vjp: u ↦ Jᵀu.
        output_hessian: u ↦ Hu, in output space.
        damping: λ ≥ 0, a scalar.
        scaling: D, a tree of non-negative diagonal entries. It has the shapes of the parameters and
            their accumulation dtype. `None` is the identity.
    """

    jvp: Callable[[Params], Outputs]
    vjp: Callable[[Outputs], Params]
    output_hessian: Callable[[Outputs], Outputs]
    damping: chex.Numeric
    scaling: Params | None = None

    def ggn(self, vector: Params) -> Params:
        """The product Gv = JᵀHJv, in the dtypes of the parameters."""
        return self.vjp(self.output_hessian(self.jvp(vector)))

    def matvec(self, vector: Params) -> Params:
        """The product (JᵀHJ + λD) v, in the dtypes of the parameters."""
        return tree.add_scaled(self.ggn(vector), self.damping, self.scaled(vector))

    def scaled(self, vector: Params) -> Params:
        """The product Dv."""
        if self.scaling is None:
            return vector
        return jax.tree.map(
            lambda d, v: (d * v.astype(d.dtype)).astype(v.dtype), self.scaling, vector
        )


@dataclasses.dataclass(frozen=True)
class QuadraticModel:
    r"""The Gauss-Newton model of the loss at a point.

    .. math:: \delta \mapsto \ell + g^\top\delta + \tfrac12 \delta^\top G \delta

    Attributes:
        value: ℓ at the point.
        linear: the linearisation of the model there.
        cotangent: gradient of the loss with respect to the outputs.
        output_hessian: u ↦ Hu, Hessian of the loss with respect to the outputs.
    """

    value: jax.Array
    linear: Linearisation
    cotangent: Outputs
    output_hessian: Callable[[Outputs], Outputs]

    def __call__(self, step: Params) -> jax.Array:
        """Predicted loss after `step`, shaped like the parameters."""
        return self.value + self.change(step).astype(self.value.dtype)

    def gradient(self) -> Params:
        """g, the gradient of the loss at the point."""
        return self.linear.vjp(self.cotangent)

    def ggn(self, vector: Params) -> Params:
        """Gv, about 4/3 of the work of a gradient."""
        return self.system(0.0).ggn(vector)

    def change(self, step: Params) -> jax.Array:
        """gᵀδ + ½ δᵀGδ by one push-forward.

        It is free of the cancellation that a difference of two losses suffers from.
        """
        # gᵀδ = <∇ℓ, Jδ> and δᵀGδ = <Jδ, HJδ>: one push-forward serves both terms.
        image = self.linear.jvp(step)
        return tree.inner(self.cotangent, image) + tree.inner(image, self.output_hessian(image)) / 2

    def system(self, damping: chex.Numeric, scaling: Params | None = None) -> System:
        """The damped system (G + λD) x = b of this model. Its right-hand side b comes later."""
        return System(self.linear.jvp, self.linear.vjp, self.output_hessian, damping, scaling)


@shows_signature
def quadratic_model(objective: Objective, params: Params, batch: Batch = None) -> QuadraticModel:
    r"""The Gauss-Newton model of the loss at `params`, a function of the step.

    ``-model.change(step)`` is the decrease that Gauss-Newton predicts for `step`.

    Args:
        objective: the problem.
        params: the parameters at which ℓ, g and G are taken.
        batch: data; not needed where the objective is bound.

    Returns:
        A `QuadraticModel`.

    Raises:
        ValueError, TypeError: as `linearise`.

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> objective = gnlin.Objective.least_squares(lambda p: p ** 2)
        >>> gnlin.quadratic_model(objective, jnp.array([1.0]))(jnp.array([-0.5]))   # ½ (1 − 2·0.5)²
        Array(0., dtype=float32)
    """
    linear = linearise(objective, params, batch)
    cotangent, output_hessian = loss_derivatives(objective, linear.outputs, batch)
    value = objective.loss_of(linear.outputs, batch)
    return QuadraticModel(value, linear, cotangent, output_hessian)


@shows_signature
def ggn_vector_product(
    objective: Objective, params: Params, batch: Batch = None
) -> Callable[[Params], Params]:
    r"""The matrix-free product :math:`v \mapsto G v`, :math:`G = J^\top H J`, at `params`.

    The linearisation is done once and serves every product.

    Args:
        objective: the problem; its `loss` fixes H, averaging included.
        params: parameters at which to linearise.
        batch: data; not needed where the objective is bound.

    Returns:
        A linear function from trees like `params` to trees like `params`.

    Raises:
        ValueError, TypeError: as `linearise`.

    Reference: Schraudolph, Fast curvature matrix-vector products for second-order gradient descent,
    2002.

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> objective = gnlin.Objective.least_squares(lambda p: p ** 2)
        >>> gnlin.ggn_vector_product(objective, jnp.array([3.0]))(jnp.array([1.0]))   # (2·3)² · 1
        Array([36.], dtype=float32)
    """
    return quadratic_model(objective, params, batch).ggn


def loss_derivatives(
    objective: Objective, outputs: Outputs, batch: Batch = None
) -> tuple[Outputs, Callable[[Outputs], Outputs]]:
    """``(gradient, u ↦ Hu)`` of the loss with respect to the outputs, at `outputs`."""

    def gradient(outputs):
        return jax.grad(objective.loss_of)(outputs, batch), None

    # The push-forward of the gradient is the product with H. A loss without a forward-mode rule is
    # differentiated twice in reverse, which serves because H is symmetric.
    expansion = linearise_function(gradient, outputs)
    return expansion.value, expansion.jvp


# Models of the loss, as functions of the displacement δz of the outputs from those at the anchor.

# δz ↦ (the model's value there, its gradient in δz).
OutputLoss = Callable[[Outputs], tuple[jax.Array, Outputs]]
LossModel = Literal["exact", "quadratic"]


def exact_loss(objective: Objective, outputs: Outputs, batch: Batch = None) -> OutputLoss:
    """δz ↦ ℓ(z + δz) and its gradient."""

    def value_and_grad(displacement):
        return jax.value_and_grad(objective.loss_of)(tree.add(outputs, displacement), batch)

    return value_and_grad


def quadratic_loss(objective: Objective, outputs: Outputs, batch: Batch = None) -> OutputLoss:
    """δz ↦ ℓ(z) + gᵀδz + ½ δzᵀ H δz and its gradient: the Gauss-Newton model, in output space."""
    value = objective.loss_of(outputs, batch)
    cotangent, output_hessian = loss_derivatives(objective, outputs, batch)

    def value_and_grad(displacement):
        curved = output_hessian(displacement)
        change = tree.inner(cotangent, displacement) + tree.inner(displacement, curved) / 2
        # The gradient of the model in δz is g + Hδz, of the same product with H.
        return value + change.astype(value.dtype), tree.add(cotangent, curved)

    return value_and_grad


LOSS_MODELS = {"exact": exact_loss, "quadratic": quadratic_loss}


def check_loss_model(loss_model: str) -> None:
    if loss_model not in LOSS_MODELS:
        raise ValueError(f"`loss_model` must be one of {sorted(LOSS_MODELS)}; got {loss_model!r}")


# The linearised problem as a function of the parameters, for inner optimisers.


def linearised_loss(linear: Linearisation, loss: OutputLoss) -> Callable[..., jax.Array]:
    """Q, ``(params, batch=None) -> scalar``, with the loss modelled by `loss`."""

    def value_fn(params, batch=None):
        del batch  # inside `loss`; Optax's line searches want each extra argument consumed
        offset = tree.subtract(tree.cast_like(params, linear.anchor), linear.anchor)
        return loss(linear.jvp(offset))[0]

    return value_fn


def partly_linearised_loss(
    objective: Objective, anchor: Params, exact: Any, loss_model: LossModel, data: Batch
) -> Callable[..., jax.Array]:
    """Q, ``(params, batch=None) -> scalar``, with all leaves linearised but those marked `exact`.

    At (a, b), where b are the exact leaves, it is the loss of f(φ, b) + ∂f/∂a(φ, b) (a − φ).
    """
    objective.check_params(anchor)

    def part(params, chosen):
        return jax.tree.map(
            lambda leaf, is_exact: leaf if is_exact == chosen else optax.MaskedNode(), params, exact
        )

    # The linearised leaves at the anchor. A hole has no leaves, so arithmetic passes over it.
    fixed = part(anchor, chosen=False)

    def value_fn(params, batch=None):
        del batch  # as in `linearised_loss`
        params = tree.cast_like(params, anchor)
        # The gradient in b passes through the linearisation: b moves f(φ, b), and ∂f/∂a, too.
        linear = linearise(with_constants(objective, part(params, chosen=True)), fixed, data)
        loss = LOSS_MODELS[loss_model](objective, linear.outputs, data)
        return loss(linear.jvp(tree.subtract(part(params, chosen=False), fixed)))[0]

    return value_fn
