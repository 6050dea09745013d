"""SOAP: Adam in the eigenbasis of Shampoo's factors, as an Optax transform.

No package of it for Optax was found on PyPI. This follows algorithms 3 and 4 of the paper. What the
pseudo-code leaves open (start, bias correction, order of eigenvectors) is as in the authors' code.

References: Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, arXiv 2409.11321;
https://github.com/nikhilvyas/SOAP.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Factors(NamedTuple):
    """The factors of one leaf, and their eigenvectors as columns; batched over a stack."""

    left: jax.Array
    right: jax.Array
    left_basis: jax.Array
    right_basis: jax.Array


class SoapState(NamedTuple):
    """The state of `scale_by_soap`.

    Attributes:
        count: number of updates.
        mean: first moments M, of the shapes of the parameters.
        square: second moments V, in the eigenbases.
        factors: a tuple with `Factors` for each leaf; `None` for vectors and numbers.
    """

    count: jax.typing.ArrayLike
    mean: optax.Updates
    square: optax.Updates
    factors: Any


def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    every: int = 10,
    weight_decay: float = 1e-4,
) -> optax.GradientTransformation:
    """SOAP with decoupled weight decay; the defaults are the settings of the paper.

    Args:
        learning_rate: a number or a schedule.
        b1: decay β₁ of the first moment.
        b2: decay β₂ of the second moment and of the factors.
        eps: added to the root of the second moment.
        every: updates from one refresh of the eigenvectors to the next.
        weight_decay: times the parameters, is added to the direction.
    """
    return optax.chain(
        scale_by_soap(b1, b2, eps, every),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_soap(
    b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8, every: int = 10
) -> optax.GradientTransformation:
    r"""Adam in the eigenbasis of Shampoo's factors.

    For a matrix with gradient G, moments M and V, factors L and R with eigenvectors Q and P:

    .. math::
        M &\leftarrow \beta_1 M + (1 - \beta_1)\, G \\
        V &\leftarrow \beta_2 V + (1 - \beta_2)\, (Q^\top G P)^{\odot 2} \\
        N &= Q \left(\frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \frac{Q^\top M P}{\sqrt{V} + \varepsilon}\right) P^\top \\
        L &\leftarrow \beta_2 L + (1 - \beta_2)\, G G^\top, \qquad
        R \leftarrow \beta_2 R + (1 - \beta_2)\, G^\top G

    N is the update. Every so many updates Q becomes the orthogonal factor of LQ, and P that of RP.
    The columns are first sorted by their estimated eigenvalues, from the largest, and V with them.
    The first update is zero: its gradient gives the first eigenvectors.

    A leaf with three axes is a stack of matrices. One with more is a matrix whose columns belong to
    the last axis, as a convolution's kernel is. Vectors and numbers have Adam without a basis.
    """

    def init_fn(params):
        factors = tuple(_no_factors(leaf) for leaf in jax.tree.leaves(params))
        zeros = jax.tree.map(jnp.zeros_like, params)
        return SoapState(jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.copy, zeros), factors)

    def update_fn(updates, state, params=None):
        del params
        begins = state.count == 0
        grads, tree = jax.tree.flatten(updates)
        means, squares = jax.tree.leaves(state.mean), jax.tree.leaves(state.square)
        moments = [
            _moments(old, b1, b2, begins)
            for old in zip(grads, means, squares, state.factors, strict=True)
        ]
        correction = _correction(state.count, b1, b2)
        directions = [
            _direction(mean, square, factors, correction, eps)
            for (mean, square), factors in zip(moments, state.factors, strict=True)
        ]
        # 0 begins, 1 keeps the eigenvectors, 2 refreshes them.
        action = jnp.where(begins, 0, 1 + (state.count % every == 0))
        turned = [
            _turned(grad, square, factors, b2, action)
            for grad, (_, square), factors in zip(grads, moments, state.factors, strict=True)
        ]
        new = SoapState(
            optax.safe_increment(state.count),
            jax.tree.unflatten(tree, [mean for mean, _ in moments]),
            jax.tree.unflatten(tree, [square for square, _ in turned]),
            tuple(factors for _, factors in turned),
        )
        return jax.tree.unflatten(tree, directions), new

    return optax.GradientTransformation(init_fn, update_fn)


# One leaf.


def _matrices(leaf: jax.Array) -> jax.Array:
    """A leaf as a matrix or a stack of them."""
    return leaf if leaf.ndim <= 3 else leaf.reshape(-1, leaf.shape[-1])


def _no_factors(leaf: jax.Array) -> Factors | None:
    if leaf.ndim < 2:
        return None
    *stack, rows, columns = _matrices(leaf).shape
    zeros = [jnp.zeros((*stack, side, side), leaf.dtype) for side in (rows, columns)]
    bases = [
        jnp.broadcast_to(jnp.eye(side, dtype=leaf.dtype), zero.shape)
        for side, zero in zip((rows, columns), zeros, strict=True)
    ]
    return Factors(*zeros, *map(jnp.copy, bases))


def _into(leaf: jax.Array, factors: Factors | None) -> jax.Array:
    """QᵀGP."""
    if factors is None:
        return leaf
    turned = factors.left_basis.mT @ _matrices(leaf) @ factors.right_basis
    return turned.reshape(leaf.shape)


def _out_of(leaf: jax.Array, factors: Factors | None) -> jax.Array:
    """QNPᵀ."""
    if factors is None:
        return leaf
    turned = factors.left_basis @ _matrices(leaf) @ factors.right_basis.mT
    return turned.reshape(leaf.shape)


def _moments(old: Any, b1: float, b2: float, begins: jax.Array) -> tuple[jax.Array, jax.Array]:
    """M and V. They stay zero at the first update, which has no eigenvectors yet."""
    grad, mean, square, factors = old
    mean = jnp.where(begins, mean, b1 * mean + (1 - b1) * grad)
    squared = jnp.square(_into(grad, factors))
    return mean, jnp.where(begins, square, b2 * square + (1 - b2) * squared)


def _correction(count: jax.Array, b1: float, b2: float) -> jax.Array:
    """√(1 − β₂ᵗ) / (1 − β₁ᵗ); the first update does not count, and is not corrected."""
    t = jnp.maximum(count, 1).astype(float)
    return jnp.sqrt(1 - b2**t) / (1 - b1**t)


def _direction(
    mean: jax.Array, square: jax.Array, factors: Factors | None, correction: jax.Array, eps: float
) -> jax.Array:
    """N, which is zero where M is."""
    inside = _into(mean, factors) / (jnp.sqrt(square) + eps)
    return _out_of(correction.astype(mean.dtype) * inside, factors)


def _turned(
    grad: jax.Array, square: jax.Array, factors: Factors | None, b2: float, action: jax.Array
) -> tuple[jax.Array, Factors | None]:
    """V and the factors after an update."""
    if factors is None:
        return square, None
    matrix = _matrices(grad)
    left = b2 * factors.left + (1 - b2) * matrix @ matrix.mT
    right = b2 * factors.right + (1 - b2) * matrix.mT @ matrix
    averaged = Factors(left, right, factors.left_basis, factors.right_basis)
    square_matrix = _matrices(square)
    new_square, new = jax.lax.switch(action, [_begun, _kept, _refreshed], square_matrix, averaged)
    return new_square.reshape(square.shape), new


def _begun(square: jax.Array, factors: Factors) -> tuple[jax.Array, Factors]:
    """Eigenvectors, those of the largest eigenvalue first."""
    left, right = (jnp.linalg.eigh(each)[1][..., ::-1] for each in factors[:2])
    return square, Factors(factors.left, factors.right, left, right)


def _kept(square: jax.Array, factors: Factors) -> tuple[jax.Array, Factors]:
    return square, factors


def _refreshed(square: jax.Array, factors: Factors) -> tuple[jax.Array, Factors]:
    """One step of orthogonal iteration, with V in the new order of the columns."""
    left, rows = _iterated(factors.left, factors.left_basis)
    right, columns = _iterated(factors.right, factors.right_basis)
    square = jnp.take_along_axis(square, rows[..., :, None], axis=-2)
    square = jnp.take_along_axis(square, columns[..., None, :], axis=-1)
    return square, Factors(factors.left, factors.right, left, right)


def _iterated(factor: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The orthogonal factor of LQ with sorted columns, and their order."""
    product = factor @ basis
    order = jnp.argsort(-jnp.sum(basis * product, axis=-2), axis=-1)
    return jnp.linalg.qr(jnp.take_along_axis(product, order[..., None, :], axis=-1))[0], order
