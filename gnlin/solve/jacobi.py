"""The diagonal of the Gauss-Newton matrix: a preconditioner.

`cg` calls `Jacobi.prepare` once for each system. The layers come from `gnlin.structure.layers`, and
the samples from `sampling`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import check_fraction, check_integer, shows_signature
from gnlin.problem.curvature import System
from gnlin.sharding import by_compiler, check_mesh
from gnlin.solve.protocols import Preparation, Stats
from gnlin.solve.sampling import root_sample
from gnlin.structure.layers import DenseReading, read_dense_layers
from gnlin.tree import Outputs, Params


class JacobiState(NamedTuple):
    count: jax.Array  # of systems
    diagonal: Params  # estimate of diag G, in at least float32


@shows_signature
@dataclasses.dataclass(frozen=True)
class Jacobi:
    r"""Diagonal preconditioner of the damped Gauss-Newton system, ``CG(preconditioner=Jacobi())``.

    .. math:: M = (\operatorname{diag} G + \lambda D)^{\alpha}, \qquad G = J^\top H J.

    The diagonal is estimated from pull-backs of :math:`H^{1/2}\varepsilon`, where ε are independent
    signs. It is averaged over steps, in the state of the optimiser. For a dense layer y = xW + b,
    with cotangents s of y,

    .. math:: G_{W_{ij} W_{ij}} = \mathbb E \sum_r x_{ri}^2\, s_{rj}^2, \qquad
              G_{b_j b_j} = \mathbb E \sum_r s_{rj}^2,

    where the applications r are the examples. They are independent, so terms between different ones
    are nothing but noise, and are left out. They are left out as well where the outputs couple
    examples (normalisation over the batch).

    Other leaves take the square of the pseudo-gradient, which is always unbiased:
    :math:`\operatorname{diag} G = \mathbb E\, (J^\top H^{1/2} \varepsilon)^2`. So do layers that
    are not applied once for each example (tokens).

    It pays where curvature differs between parameters by orders of magnitude, as in a regression on
    features of many scales. For perceptrons on standardised inputs CG needs more iterations with it
    than without, and the fewer the smaller α is (measured by ``examples/preconditioners.py``).

    M is positive definite: entries below ε times the largest count as that, where ε is the
    resolution of their dtype.

    Args:
        exponent: α. 1 is Jacobi's. A smaller one tempers the errors of the estimate, and those of a
            matrix without its off-diagonal.
        probes: samples ε for each system, pulled back together.
        decay: of the average over steps. The average begins as a plain mean.
        seed: of the samples.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Martens, Deep learning via Hessian-free optimization, 2010, section 4.7 (α = 3/4, λ
        inside the power).

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> scales = jnp.array([100.0, 1.0, 0.01])
        >>> objective = gnlin.Objective.least_squares(lambda p: scales * p - 1.0)
        >>> solver = gnlin.CG(rtol=1e-6, preconditioner=gnlin.Jacobi(exponent=1.0, probes=4))
        >>> tx = gnlin.scale_by_gauss_newton(objective, damping=0.0, solver=solver)
        >>> updates, _ = tx.update(None, tx.init(jnp.zeros(3)), jnp.zeros(3))
        >>> -updates.round(2)
        Array([1.e-02, 1.e+00, 1.e+02], dtype=float32)
    """

    exponent: float = 0.75
    probes: int = 1
    decay: float = 0.95
    seed: int = 0

    def __post_init__(self):
        check_fraction("exponent", self.exponent)
        check_fraction("decay", self.decay, one=False)
        for name, least in (("probes", 1), ("seed", 0)):
            check_integer(name, getattr(self, name), least)

    def init(self, params: Params) -> tuple[JacobiState, Stats]:
        diagonal = tree.zeros_like(params, tree.accumulation_dtype(params))
        return JacobiState(jnp.zeros([], jnp.int32), diagonal), {}

    def prepare(
        self, system: System, params: Params, state: JacobiState
    ) -> tuple[Preparation, JacobiState]:
        check_mesh(params)
        dtype = tree.accumulation_dtype(params)
        key = jax.random.fold_in(jax.random.key(self.seed), state.count)
        reading, like = read_dense_layers(system.jvp, params), jax.eval_shape(system.jvp, params)

        def estimate(key):
            sample = root_sample(system.output_hessian, like, key)
            squares = _squares(reading, tree.cast_like(sample, like), dtype)
            return [squares[index] for index in range(len(squares))]

        samples = jax.vmap(estimate)(jax.random.split(key, self.probes))
        latest = [jnp.mean(each, axis=0) for each in samples]
        leaves, structure = jax.tree.flatten(state.diagonal)
        # A plain mean, until the average over steps has as much of the past as `decay` says.
        keep = jnp.minimum(1 - 1 / (state.count + 1).astype(dtype), self.decay)
        averaged = [
            keep * old + (1 - keep) * new.reshape(old.shape)
            for old, new in zip(leaves, latest, strict=True)
        ]
        diagonal = jax.tree.unflatten(structure, averaged)
        apply = _inverse(system, diagonal, self.exponent)
        return Preparation(apply, {}), JacobiState(state.count + 1, diagonal)


def _squares(reading: DenseReading, sample: Outputs, dtype) -> dict[int, jax.Array]:
    """One sample of diag G: a leaf's position ↦ its entries, in their order."""
    cotangents, others = reading.pull_back(sample)
    # One length for all outputs, or examples cannot be told apart.
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(sample)}
    found = {index: jnp.square(leaf.astype(dtype)) for index, leaf in others.items()}
    for layer, cotangent in zip(reading.layers, cotangents, strict=True):
        x, s = layer.inputs.astype(dtype), cotangent.astype(dtype)
        # Whether applications are the examples.
        squares = _of_examples if lengths == {x.shape[0]} else _of_all_together
        weight, bias = by_compiler(squares, x, s)
        found[layer.weight] = weight.T if layer.transposed else weight
        if layer.bias is not None:
            found[layer.bias] = bias
    return found


def _of_examples(x: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Σ_r x² s², without the terms between different r, and the same of a bias."""
    return jnp.square(x).T @ jnp.square(s), jnp.sum(jnp.square(s), axis=0)


def _of_all_together(x: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The square of the pseudo-gradient, (Σ_r x s)²."""
    return jnp.square(x.T @ s), jnp.square(jnp.sum(s, axis=0))


def _inverse(system: System, diagonal: Params, exponent: float) -> Callable[[Params], Params]:
    ones = jax.tree.map(jnp.ones_like, diagonal) if system.scaling is None else system.scaling
    total = tree.add_scaled(diagonal, system.damping, ones)
    largest = tree.max_abs(total)
    # A negative power of 0 would be infinite.
    least = jnp.where(largest == 0, 1, jnp.finfo(largest.dtype).eps * largest)
    weights = jax.tree.map(lambda leaf: jnp.maximum(leaf, least) ** -exponent, total)
    return lambda vector: jax.tree.map(
        lambda w, v: (w * v.astype(w.dtype)).astype(v.dtype), weights, vector
    )
