"""Samples with the covariance H: the right-hand sides of pull-backs that estimate JᵀHJ.

`kronecker` and `jacobi` draw them, and take moments of their pull-backs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.tree import Outputs


def root_sample(
    output_hessian: Callable[[Outputs], Outputs], like: Outputs, key: jax.Array, iterations: int = 4
) -> Outputs:
    r"""One sample of :math:`H^{1/2}\varepsilon`, ε of independent signs, in at least float32.

    Its covariance is H, to the accuracy of so many iterations. Its pull-back
    :math:`J^\top H^{1/2}\varepsilon` then has the covariance G.

    Lanczos' method makes an orthonormal basis Q of the Krylov space of ε, with :math:`HQ = QT`, T
    tridiagonal, and then :math:`H^{1/2}\varepsilon \approx \|\varepsilon\|\, Q\, T^{1/2} e_1`.
    Negative eigenvalues of T count as 0.

    Args:
        output_hessian: u ↦ Hu, H positive semi-definite.
        like: the outputs, for their shapes and dtypes.
        key: of the signs.
        iterations: products with H.

    Reference: Golub & Van Loan, Matrix Computations, 4th edition, section 10.2.
    """
    dtype = tree.accumulation_dtype(like)
    count = tree.size(like)
    # ‖ε‖. The number of outputs may be symbolic, as under `jax.export`.
    size = count**0.5 if isinstance(count, int) else jnp.sqrt(jnp.asarray(count, dtype))
    signs = _signs(key, count, dtype)
    # Signs have the norm √M exactly, so this vector has norm 1.
    first_vector = tree.unflatten(signs / size, tree.zeros_like(like, dtype))

    def iterate(now, _):
        before, vector, beta = now
        product = tree.cast(output_hessian(tree.cast_like(vector, like)), dtype)
        alpha = tree.inner(vector, product)
        # H q − α q − β q', at right angles to q and to the q' before it.
        rest = tree.add_scaled(tree.add_scaled(product, -alpha, vector), -beta, before)
        squared = tree.inner(rest, rest)
        # H is a multiple of the identity for squared losses. Nothing but rounding is left there,
        # and normalising it would make a basis of noise.
        noise = 100 * jnp.finfo(dtype).eps
        ended = squared <= noise**2 * (alpha**2 + beta**2 + squared)
        beta = jnp.where(ended, 0, jnp.sqrt(squared))
        following = tree.scale(jnp.where(ended, 0, 1 / jnp.where(ended, 1, beta)), rest)
        return (vector, following, beta), (vector, alpha, beta)

    # In a loop: unrolled, the iterations would take a fifth of the time to compile a step.
    start = (tree.zeros_like(first_vector), first_vector, jnp.zeros([], dtype))
    _, (basis, alphas, betas) = jax.lax.scan(iterate, start, length=iterations)
    off_diagonal = jnp.diag(betas[:-1], 1)
    eigenvalues, vectors = jnp.linalg.eigh(jnp.diag(alphas) + off_diagonal + off_diagonal.T)
    # T^½ e₁, with T = V diag(eigenvalues) Vᵀ and Vᵀe₁ the first row of V.
    weights = size * vectors @ (jnp.sqrt(jnp.maximum(eigenvalues, 0)) * vectors[0])
    return jax.tree.map(lambda columns: jnp.tensordot(weights, columns, 1), basis)


def _signs(key: jax.Array, count: int, dtype) -> jax.Array:
    """Independent signs, 32 from each random word.

    On a CPU a normal number for each output took half the time of a gradient.
    """
    words = jax.random.bits(key, [-(-count // 32), 1], jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return jnp.where(bits.ravel()[:count] == 1, 1, -1).astype(dtype)
