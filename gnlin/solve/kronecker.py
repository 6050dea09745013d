"""Kronecker factors of the Gauss-Newton matrix: a preconditioner, and a solver by itself."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.layers import Layer, matrix_shape, read_layers
from gnlin.solve.system import Solution, System
from gnlin.tree import Outputs, Params


class Factors(NamedTuple):
    """Second moments of one leaf, seen as a matrix; a side longer than `max_side` has their diagonal alone."""

    # One more than the sides of the matrix: the constant input that a bias multiplies.
    rows: jax.Array
    columns: jax.Array


class KroneckerState(NamedTuple):
    count: jax.Array
    factors: tuple[Factors, ...]  # in the order of the leaves


@dataclasses.dataclass(frozen=True)
class Kronecker:
    r"""Block-diagonal Kronecker approximation of the Gauss-Newton matrix, for any network.

    For a dense layer y = xW + b, with :math:`\bar x = (x, 1)`, cotangents :math:`s` of y and R rows in all,

    .. math:: G_W \approx A \otimes S, \qquad A = \frac1R \sum_r \bar x_r^\top \bar x_r, \qquad
              S = \sum_r s_r^\top s_r, \quad s = \frac{\partial z}{\partial y}^{\!\top} H^{1/2} \varepsilon,
              \quad \varepsilon \sim N(0, I).

    Layers are found in the linearisation of the model, so nothing has to be registered. Other leaves have the row
    and column moments of the pseudo-gradient :math:`V = J^\top H^{1/2} \varepsilon`, whose covariance is G:
    :math:`A = VV^\top / \|V\|`, :math:`S = V^\top V / \|V\|`; vectors that are in no layer have their diagonal.
    The sample :math:`H^{1/2}\varepsilon` comes from Lanczos' method on H, in output space, for whatever loss.

    Moments are averaged over steps, in the state of the optimiser. The damping λ of the system is shared between
    the factors,

    .. math:: M = \Big(A + \pi\sqrt{\lambda}\, I\Big) \otimes \Big(S + \tfrac{1}{\pi}\sqrt{\lambda}\, I\Big),
              \qquad \pi^2 = \frac{\operatorname{tr} A / \dim A}{\operatorname{tr} S / \dim S}.

    As a preconditioner, ``CG(preconditioner=Kronecker())``; as a solver, `Kronecker()` gives the direction M⁻¹b, whose
    length is for a step rule to find (`Subspace`, the default of `gauss_newton`). A scaling D of the system is ignored.

    Statistics: ``kronecker/layers``, the leaves that were found in dense layers.

    Args:
        decay: of the average over steps, which begins as a plain mean.
        fraction: share of a batch's rows that enter the moments of a layer; never fewer than 64 rows.
        max_side: longest side with a matrix of moments; a longer one has their diagonal.
        seed: of the samples ε.

    Raises:
        ValueError: an argument is out of its range.

    References: Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, 2015;
    Gupta, Koren & Singer, Shampoo, arXiv 1802.09568 (moments of matrix-shaped gradients).

    Example:
        >>> import gnlin
        >>> gnlin.CG(max_steps=5, preconditioner=gnlin.Kronecker()).max_steps
        5
    """

    decay: float = 0.95
    fraction: float = 0.25
    max_side: int = 4096
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"`decay` must lie in [0, 1); got {self.decay!r}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"`fraction` must lie in (0, 1]; got {self.fraction!r}")
        for name in ("max_side", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"`{name}` must be an integer of at least 0; got {value!r}")

    # As a preconditioner.

    def init_state(self, params: Params) -> KroneckerState:
        dtype = tree.accumulation_dtype(params)

        def moments(side: int) -> jax.Array:
            return jnp.zeros([side + 1] * (2 if side <= self.max_side else 1), dtype)

        def factors(leaf):
            rows, columns = matrix_shape(leaf.shape)
            if leaf.ndim < 2:
                return Factors(jnp.zeros([rows], dtype), jnp.zeros([0], dtype))
            return Factors(moments(rows), moments(columns))

        return KroneckerState(jnp.zeros([], jnp.int32), tuple(factors(leaf) for leaf in jax.tree.leaves(params)))

    def prepare(
        self, system: System, params: Params, state: KroneckerState
    ) -> tuple[Callable[[Params], Params], KroneckerState]:
        """``(v ↦ M⁻¹v, next state)``."""
        dtype = tree.accumulation_dtype(params)
        layers, latest = self._moments(system, params, state)
        keep = jnp.minimum(1 - 1 / (state.count + 1).astype(dtype), self.decay)
        factors = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.factors, latest)
        next_state = KroneckerState(state.count + 1, factors)
        return _inverse(layers, factors, jnp.asarray(system.damping, dtype), params), next_state

    def _moments(self, system, params, state) -> tuple[tuple[Layer, ...], tuple[Factors, ...]]:
        dtype = tree.accumulation_dtype(params)
        key = jax.random.fold_in(jax.random.key(self.seed), state.count)
        reading = read_layers(system.jvp, params)
        like = jax.eval_shape(system.jvp, params)
        sample = root_sample(system.output_hessian, like, key)
        cotangents, others = reading.pull_back(tree.cast_like(sample, like))
        found: dict[int, Factors] = {}
        for layer, cotangent in zip(reading.layers, cotangents, strict=True):
            inputs, outputs, rows = self._rows(layer.inputs.astype(dtype), cotangent.astype(dtype), state.count)
            inputs = jnp.concatenate([inputs, jnp.ones_like(inputs[:, :1])], axis=1)
            outputs = jnp.concatenate([outputs, jnp.zeros_like(outputs[:, :1])], axis=1)
            like_factors = state.factors[layer.weight]
            first, second = (outputs, inputs) if layer.transposed else (inputs, outputs)
            found[layer.weight] = Factors(
                _second_moment(first, like_factors.rows), _second_moment(second, like_factors.columns)
            )
            scales = (rows / len(inputs), 1 / len(inputs))
            if not layer.transposed:
                scales = scales[::-1]
            found[layer.weight] = Factors(
                *(scale * moment for scale, moment in zip(scales, found[layer.weight], strict=True))
            )
        for index, leaf in others.items():
            like_factors = state.factors[index]
            if leaf.ndim < 2:
                found[index] = Factors(jnp.square(leaf.astype(dtype)).ravel(), like_factors.columns)
                continue
            matrix = leaf.astype(dtype).reshape(matrix_shape(leaf.shape))
            size = jnp.linalg.norm(matrix)
            matrix = jnp.pad(matrix / jnp.sqrt(jnp.where(size > 0, size, 1)), ((0, 1), (0, 1)))
            found[index] = Factors(
                _second_moment(matrix.T, like_factors.rows), _second_moment(matrix, like_factors.columns)
            )
        unseen = [index for index in range(len(state.factors)) if index not in found]
        found.update({index: state.factors[index] for index in unseen})  # biases of layers
        return reading.layers, tuple(found[index] for index in range(len(state.factors)))

    def _rows(self, inputs, outputs, count):
        """Some of the rows, another share at each step, and how many there are in all."""
        rows = len(inputs)
        taken = min(rows, max(round(self.fraction * rows), 64))
        start = count * taken % max(rows - taken + 1, 1)
        inputs, outputs = (jax.lax.dynamic_slice_in_dim(each, start, taken) for each in (inputs, outputs))
        return inputs, outputs, rows

    # As a solver.

    def init(self, params: Params) -> tuple[Any, dict[str, jax.Array]]:
        return self.init_state(params), _stats(0)

    def solve(self, system: System, rhs: Params, carry: Any) -> tuple[Solution, Any]:
        apply, carry = self.prepare(system, rhs, carry)
        step = apply(rhs)
        step = tree.select(tree.all_finite(step), step, tree.zeros_like(step))
        return Solution(step, _stats(0)), carry


def root_sample(hessian: Callable[[Outputs], Outputs], like: Outputs, key: jax.Array, steps: int = 8) -> Outputs:
    r"""One sample of :math:`H^{1/2}\varepsilon`, ε ~ N(0, I), in at least float32.

    Lanczos' method: with ``steps`` products :math:`H Q = Q T` on the Krylov space of ε, and
    :math:`H^{1/2}\varepsilon \approx \|\varepsilon\|\, Q\, T^{1/2} e_1`. Negative eigenvalues of T count as 0.

    Reference: Golub & Van Loan, Matrix Computations, 4th edition, section 10.2.
    """
    dtype = tree.accumulation_dtype(like)
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    noise = [jax.random.normal(k, leaf.shape, dtype) for k, leaf in zip(keys, leaves, strict=True)]
    size = tree.norm(noise)
    vector = jax.tree.unflatten(structure, jax.tree.map(lambda leaf: leaf / size, noise))
    before, basis, alphas, betas = tree.zeros_like(vector), [], [], [jnp.zeros([], dtype)]
    for _ in range(steps):
        basis.append(vector)
        product = tree.cast(hessian(tree.cast_like(vector, like)), dtype)
        alphas.append(tree.inner(vector, product))
        rest = tree.add_scaled(tree.add_scaled(product, -alphas[-1], vector), -betas[-1], before)
        length = tree.norm(rest)
        # H is a multiple of the identity for squared losses: nothing but rounding is left.
        ended = length <= 100 * jnp.finfo(dtype).eps * tree.norm(product)
        betas.append(jnp.where(ended, 0, length))
        before, vector = vector, tree.scale(jnp.where(ended, 0, 1 / jnp.where(ended, 1, length)), rest)
    off = jnp.diag(jnp.stack(betas[1:-1]), 1)
    eigenvalues, vectors = jnp.linalg.eigh(jnp.diag(jnp.stack(alphas)) + off + off.T)
    weights = size * vectors @ (jnp.sqrt(jnp.maximum(eigenvalues, 0)) * vectors[0])
    return jax.tree.map(lambda *columns: sum(w * c for w, c in zip(weights, columns, strict=True)), *basis)


def _second_moment(rows: jax.Array, like: jax.Array) -> jax.Array:
    """XᵀX, or its diagonal where `like` is a vector."""
    return rows.T @ rows if like.ndim == 2 else jnp.sum(rows**2, axis=0)


def _inverse(layers, factors, damping, params) -> Callable[[Params], Params]:
    structure, leaves = jax.tree.structure(params), jax.tree.leaves(params)
    layer_of = {layer.weight: layer for layer in layers}
    biases = {layer.bias for layer in layers}
    solves = {}
    for index, leaf in enumerate(leaves):
        if leaf.ndim < 2:
            continue
        layer, sides = layer_of.get(index), matrix_shape(leaf.shape)
        extended = (False, False)
        if layer is not None and layer.bias is not None:
            extended = (not layer.transposed, layer.transposed)
        trimmed = [_trim(f, side + more) for f, side, more in zip(factors[index], sides, extended, strict=True)]
        solves[index] = _damped_solves(trimmed, damping)

    def apply(vector: Params) -> Params:
        flat = jax.tree.leaves(vector)
        out: dict[int, jax.Array] = {}
        for index, leaf in enumerate(flat):
            if index in biases:
                continue
            if leaf.ndim < 2:
                diagonal = factors[index].rows.reshape(leaf.shape)
                out[index] = leaf / (diagonal + jnp.where(diagonal + damping > 0, damping, 1))
                continue
            rows, columns = solves[index]
            matrix = leaf.astype(damping.dtype).reshape(matrix_shape(leaf.shape))
            layer = layer_of.get(index)
            if layer is None or layer.bias is None:
                out[index] = columns(rows(matrix).T).T
            elif layer.transposed:
                bias = flat[layer.bias].astype(damping.dtype).reshape(-1, 1)
                solved = columns(rows(jnp.concatenate([matrix, bias], 1)).T).T
                out[index], out[layer.bias] = solved[:, :-1], solved[:, -1]
            else:
                bias = flat[layer.bias].astype(damping.dtype).reshape(1, -1)
                solved = columns(rows(jnp.concatenate([matrix, bias], 0)).T).T
                out[index], out[layer.bias] = solved[:-1], solved[-1]
        return jax.tree.unflatten(
            structure, [out[i].reshape(leaf.shape).astype(leaf.dtype) for i, leaf in enumerate(flat)]
        )

    return apply


def _trim(moments: jax.Array, length: int) -> jax.Array:
    return moments[:length, :length] if moments.ndim == 2 else moments[:length]


def _damped_solves(moments, damping):
    """``(V ↦ (A + π√λ)⁻¹V, V ↦ (S + √λ/π)⁻¹V)``."""
    means = [jnp.mean(jnp.diagonal(m) if m.ndim == 2 else m) for m in moments]
    eps = jnp.finfo(damping.dtype).eps
    ratio = jnp.sqrt(jnp.where((means[0] > 0) & (means[1] > 0), means[0] / jnp.where(means[1] > 0, means[1], 1), 1))
    shares = [ratio * jnp.sqrt(damping), jnp.sqrt(damping) / ratio]
    return tuple(_solve_with(m, share, mean, eps) for m, share, mean in zip(moments, shares, means, strict=True))


def _solve_with(moments, share, mean, eps):
    side = len(moments)
    # Cholesky's factorisation of a matrix that is singular to working precision would fail.
    share = jnp.maximum(share, jnp.where(mean > 0, 10 * side * eps * mean, 1))
    if moments.ndim == 1:
        return lambda vector: vector / (moments + share)[:, None]
    factor = jax.scipy.linalg.cho_factor(moments + share * jnp.eye(side, dtype=moments.dtype))
    return lambda vector: jax.scipy.linalg.cho_solve(factor, vector)


def _stats(layers) -> dict[str, jax.Array]:
    return {"kronecker/layers": jnp.asarray(layers, jnp.int32)}
