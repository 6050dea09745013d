r"""The empirical neural tangent kernel K = J Jᵀ: how outputs move together in training.

Take a step of gradient descent of size η on the loss ℓ of example m. To first order, output c of
example n moves by −η Σ_d K[n, c, m, d] ∂ℓ/∂z[m, d].

This module checks the arguments and cuts the batches. `assembly` puts the kernel together, from the
rows of `rows` and their products in `products`.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import check_number, shows_signature
from gnlin.kernel.assembly import Request, Side, as_a_whole, in_parts
from gnlin.kernel.products import Pairs
from gnlin.problem.linearisation import linearise
from gnlin.problem.objective import Objective, check_not_bound, check_objective, without_binding
from gnlin.structure.parts import cut_of
from gnlin.tree import Batch, Outputs, Params

_PAIRS: tuple[Pairs, ...] = ("full", "diagonal", "trace")


@shows_signature
def empirical_ntk(
    objective: Objective,
    params: Params,
    batch: Batch = None,
    other: Batch = None,
    *,
    pairs: Pairs = "full",
    max_bytes: float = 2**32,
) -> jax.Array:
    r"""The empirical neural tangent kernel between the outputs of two batches.

    .. math:: K_{nc,md} = \Big\langle \frac{\partial f_c(x_n)}{\partial\theta},
                                      \frac{\partial f_d(x_m)}{\partial\theta} \Big\rangle

    The Jacobian is not formed where that can be avoided. Dense layers add products of their inputs
    and cotangents. Other leaves add products of a block of the Jacobian at a time. Only a leaf
    whose use mixes the examples of a batch (batch normalisation) takes a pull-back and a
    push-forward for each output.

    Where the model is shown to treat examples one by one, batches are worked on in parts. Then the
    result and the intermediate results stay within `max_bytes`. Leaves of a batch with N along
    their first axis are cut. Others (a key, frozen statistics) are passed whole.

    The function is compiled for each objective, and for the shapes of `params` and batches: call it
    with the same `objective`. All leaves of a batch are traced. A value that the model branches on
    belongs into the model.

    Args:
        objective: the problem; its loss plays no part.
        params: θ.
        batch: N examples; not needed where the objective is bound.
        other: M examples of the same structure; `None` for `batch` itself.
        pairs: which pairs of the C outputs of an example: ``"full"`` for all, ``"diagonal"`` for
            each with itself, ``"trace"`` for the sum of these. Several leaves of outputs count as
            one, in the order of the tree; scalar outputs are those of one example.
        max_bytes: bound on the memory of the result and the intermediate results, beside the
            arguments.

    Returns:
        (N, C, M, C) for ``"full"``, so that ``reshape(N * C, M * C)`` is J Jᵀ; (C, N, M) for
        ``"diagonal"``; (N, M) for ``"trace"``. In the accumulation dtype of `params`, at least
        float32.

    Raises:
        ValueError: `max_bytes` is too small for the kernel or for the work on two examples. Or
            `pairs` is none of the three, `other` has another structure than `batch`, or outputs
            are for different numbers of examples.
        ValueError, TypeError: as `linearise`.

    References: Jacot, Gabriel & Hongler, arXiv 1806.07572; Novak, Sohl-Dickstein & Schoenholz,
        arXiv 2206.08720.

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> objective = gnlin.Objective(lambda p, x: x @ p, lambda z, x: jnp.sum(z ** 2))
        >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> gnlin.kernel.empirical_ntk(objective, jnp.zeros((2, 3)), x, pairs="trace")   # 3 x xᵀ
        Array([[ 3.,  3.],
               [ 3., 15.]], dtype=float32)
    """
    _check(objective, params, batch, other)
    if pairs not in _PAIRS:
        raise ValueError(f"`pairs` must be one of {_PAIRS}; got {pairs!r}")
    check_number("max_bytes", max_bytes, positive=True, finite=False)
    # Data inside the objective becomes an argument again, for a constant cannot be cut.
    objective, batch = without_binding(objective, batch)
    # An integer, for it is a static argument. No machine has 2⁶² bytes: that is no bound.
    max_bytes = math.ceil(min(max_bytes, 2**62))
    return _kernel(params, batch, other, objective=objective, pairs=pairs, max_bytes=max_bytes)


@shows_signature
def ntk_vector_product(
    objective: Objective, params: Params, batch: Batch = None, other: Batch = None
) -> Callable[[Outputs], Outputs]:
    r"""Products :math:`v \mapsto J_a J_b^\top v` with the kernel between two batches.

    No kernel is formed. The linearisations are done once, and each product then costs one pull-back
    and one push-forward.

    Args:
        objective: the problem; its loss plays no part.
        params: θ.
        batch: data a; not needed where the objective is bound.
        other: data b; `None` for `batch` itself.

    Returns:
        A linear function from trees like the outputs on `other` to trees like the outputs on
        `batch`.

    Raises:
        ValueError, TypeError: as `empirical_ntk`.

    Reference: Novak, Sohl-Dickstein & Schoenholz, arXiv 2206.08720, section 3.3.

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> objective = gnlin.Objective(lambda p, x: x @ p, lambda z, x: jnp.sum(z ** 2))
        >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> product = gnlin.kernel.ntk_vector_product(objective, jnp.zeros(2), x)
        >>> product(jnp.array([1.0, 1.0]))   # x xᵀ v
        Array([2., 6.], dtype=float32)
    """
    _check(objective, params, batch, other)
    linear = linearise(objective, params, batch)
    pull = linear.vjp if other is None else linearise(objective, params, other).vjp
    return lambda cotangent: linear.jvp(pull(cotangent))


def _check(objective: Objective, params: Params, batch: Batch, other: Batch) -> None:
    check_objective(objective)
    objective.check_params(params)
    objective.check_batch(batch)
    check_not_bound("batch", objective, batch)
    if other is None:
        return
    check_not_bound("other", objective, other)
    if jax.tree.structure(other) != jax.tree.structure(batch):
        raise ValueError(
            "`other` must have the structure of `batch`.\n"
            f"  other: {jax.tree.structure(other)}\n  batch: {jax.tree.structure(batch)}"
        )


@functools.partial(jax.jit, static_argnames=("objective", "pairs", "max_bytes"))
def _kernel(
    params: Params,
    batch: Batch,
    other: Batch,
    *,
    objective: Objective,
    pairs: Pairs,
    max_bytes: int,
) -> jax.Array:
    """`empirical_ntk`, compiled. Batches are cut where that is shown to be right."""

    def model(params: Params, batch: Batch) -> Outputs:
        return objective.outputs_and_aux(params, batch)[0]

    own = cut_of(model, params, batch)
    theirs = own if other is None else cut_of(model, params, other)
    n, c, m = own.examples, own.outputs_per_example, theirs.examples
    if c != theirs.outputs_per_example:
        raise ValueError(
            f"`other` has {theirs.outputs_per_example} outputs of an example, but `batch` has {c}"
        )
    shape = {"full": (n, c, m, c), "diagonal": (c, n, m), "trace": (n, m)}[pairs]
    size, dtype = math.prod(shape), tree.accumulation_dtype(params)
    # In numbers, not in bytes.
    room = max_bytes // dtype.itemsize - size
    if room <= 0:
        raise ValueError(
            f"`max_bytes` is {max_bytes}, but the kernel by itself takes {size * dtype.itemsize}: "
            'ask for fewer examples, for pairs="trace", or raise `max_bytes`'
        )
    # J has no columns then, and K is zero.
    if not tree.size(params):
        return jnp.zeros(shape, dtype)
    a, b = Side(batch, own), Side(batch if other is None else other, theirs)
    request = Request(objective, params, a, b, pairs, room)
    return in_parts(request) if own.apart and theirs.apart else as_a_whole(request)
