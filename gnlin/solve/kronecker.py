"""Kronecker factors of the Gauss-Newton matrix: a preconditioner, and a solver by itself."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import check_integer
from gnlin.solve.system import Solution, System
from gnlin.structure.layers import Layer, matrix_shape, read_layers
from gnlin.tree import Outputs, Params


class KroneckerState(NamedTuple):
    """Second moments of the leaves, seen as matrices, on either side; each tree has the form of the
    parameters.

    They are one longer than the matrix: the last row and column belong to the constant input that a
    bias multiplies. A side longer than `max_side` has the diagonal alone, and so have vectors.
    """

    count: jax.Array
    rows: Params
    columns: Params


class _Factors(NamedTuple):
    """Those of one leaf."""

    rows: jax.Array
    columns: jax.Array


@dataclasses.dataclass(frozen=True)
class Kronecker:
    r"""Block-diagonal Kronecker approximation of the Gauss-Newton matrix, for any network.

    For a dense layer y = xW + b, with :math:`\bar x = (x, 1)`, cotangents :math:`s` of y and R rows
    in all,

    .. math:: G_W \approx A \otimes S, \qquad A = \frac1R \sum_r \bar x_r^\top \bar x_r, \qquad
              S = \sum_r s_r^\top s_r, \quad s = \frac{\partial z}{\partial y}^{\!\top} H^{1/2}
              \varepsilon, \quad \varepsilon_i = \pm 1.

    Layers are found in the linearisation of the model, so nothing has to be registered. Other
    leaves have the row and column moments of the pseudo-gradient :math:`V = J^\top H^{1/2}
    \varepsilon`, whose covariance is G: :math:`A = VV^\top / \|V\|`, :math:`S = V^\top V / \|V\|`;
    vectors that are in no layer have their diagonal. The signs ε are independent, and
    :math:`H^{1/2}\varepsilon` comes from Lanczos' method on H, in output space, for whatever loss.

    Moments are averaged over steps, in the state of the optimiser. The damping λ of the system is
    shared between the factors,

    .. math:: M = \Big(A + \pi\sqrt{\lambda}\, I\Big) \otimes \Big(S + \tfrac{1}{\pi}\sqrt{\lambda}\, I\Big),
              \qquad \pi^2 = \frac{\operatorname{tr} A / \dim A}{\operatorname{tr} S / \dim S}.

    As a preconditioner, ``CG(preconditioner=Kronecker())``; as a solver, `Kronecker()` gives the
    direction M⁻¹b, whose length is for a step rule to find (`Subspace`, the default of
    `gauss_newton`). A scaling D of the system is ignored.

    Statistics: ``kronecker/finite``; where it is false the direction is zero.

    Args:
        decay: of the average over steps, which begins as a plain mean.
        fraction: share of a batch's rows that enter the moments of a layer; never fewer than 64
            rows.
        max_side: longest side with a matrix of moments; a longer one has their diagonal.
        seed: of the samples ε.

    Raises:
        ValueError: an argument is out of its range.

    References: Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate
    curvature, 2015; Gupta, Koren & Singer, Shampoo, arXiv 1802.09568 (moments of matrix-shaped
    gradients).

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
            check_integer(name, getattr(self, name), least=0)

    # As a preconditioner.

    def init_state(self, params: Params) -> KroneckerState:
        dtype = tree.accumulation_dtype(params)

        def moments(side: int) -> jax.Array:
            return jnp.zeros([side + 1] * (2 if side <= self.max_side else 1), dtype)

        def on_side(leaf, side):
            if leaf.ndim < 2:
                return jnp.zeros([leaf.size if side == 0 else 0], dtype)
            return moments(matrix_shape(leaf.shape)[side])

        sides = [jax.tree.map(functools.partial(on_side, side=side), params) for side in (0, 1)]
        return KroneckerState(jnp.zeros([], jnp.int32), *sides)

    def prepare(
        self, system: System, params: Params, state: KroneckerState
    ) -> tuple[Callable[[Params], Params], KroneckerState]:
        """``(v ↦ M⁻¹v, next state)``."""
        dtype = tree.accumulation_dtype(params)
        layers, pull_back = read_layers(system.jvp, params)
        before = [
            _Factors(*each)
            for each in zip(*map(jax.tree.leaves, (state.rows, state.columns)), strict=True)
        ]
        latest = self._moments(layers, pull_back, system, params, before, state.count)
        keep = jnp.minimum(1 - 1 / (state.count + 1).astype(dtype), self.decay)
        factors = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, before, latest)
        sides = [
            jax.tree.unflatten(jax.tree.structure(params), side)
            for side in zip(*factors, strict=True)
        ]
        next_state = KroneckerState(state.count + 1, *(sides or (state.rows, state.columns)))
        return _inverse(layers, factors, jnp.asarray(system.damping, dtype), params), next_state

    def _moments(self, layers, pull_back, system, params, before, count) -> list[_Factors]:
        """Those of this system, in the order of the leaves."""
        dtype = tree.accumulation_dtype(params)
        like = jax.eval_shape(system.jvp, params)
        if not tree.size(like):
            raise ValueError(
                "`batch` has no examples, or the model no outputs: there is nothing to take moments of"
            )
        key = jax.random.fold_in(jax.random.key(self.seed), count)
        cotangents, others = pull_back(
            tree.cast_like(root_sample(system.output_hessian, like, key), like)
        )
        found = list(before)  # a bias that belongs to a layer keeps what it has, nothing
        for layer, cotangent in zip(layers, cotangents, strict=True):
            inputs, outputs = self._some_rows(
                layer.inputs.astype(dtype), cotangent.astype(dtype), count
            )
            inputs = jnp.pad(inputs, ((0, 0), (0, 1)), constant_values=1) / jnp.sqrt(
                jnp.asarray(len(inputs), dtype)
            )
            outputs = jnp.pad(outputs, ((0, 0), (0, 1))) * jnp.sqrt(
                jnp.asarray(len(cotangent) / len(outputs), dtype)
            )
            sides = (outputs, inputs) if layer.transposed else (inputs, outputs)
            found[layer.weight] = _Factors(*map(_second_moment, sides, before[layer.weight]))
        for index, gradient in others.items():
            gradient = gradient.astype(dtype)
            if gradient.ndim < 2:
                found[index] = _Factors(gradient.ravel() ** 2, before[index].columns)
                continue
            size = jnp.linalg.norm(gradient)
            matrix = gradient.reshape(matrix_shape(gradient.shape)) / jnp.sqrt(
                jnp.where(size > 0, size, 1)
            )
            matrix = jnp.pad(matrix, ((0, 1), (0, 1)))
            found[index] = _Factors(*map(_second_moment, (matrix.T, matrix), before[index]))
        return found

    def _some_rows(self, inputs, outputs, count):
        """A share of the rows, another at each step."""
        rows = len(inputs)
        taken = min(rows, max(round(self.fraction * rows), 64))
        if taken == rows:
            return inputs, outputs
        chosen = (count * taken + jnp.arange(taken, dtype=count.dtype)) % rows
        return inputs[chosen], outputs[chosen]

    # As a solver.

    def init(self, params: Params) -> tuple[Any, dict[str, jax.Array]]:
        return self.init_state(params), _stats(False)

    def solve(self, system: System, rhs: Params, carry: Any) -> tuple[Solution, Any]:
        apply, carry = self.prepare(system, rhs, carry)
        step = apply(rhs)
        sound = tree.all_finite(step)
        return Solution(tree.select(sound, step, tree.zeros_like(step)), _stats(sound)), carry


def root_sample(
    hessian: Callable[[Outputs], Outputs], like: Outputs, key: jax.Array, steps: int = 4
) -> Outputs:
    r"""One sample of :math:`H^{1/2}\varepsilon`, ε of independent signs, in at least float32.

    Its covariance is H, to the accuracy of so many steps.

    Lanczos' method: with ``steps`` products :math:`H Q = Q T` on the Krylov space of ε, and
    :math:`H^{1/2}\varepsilon \approx \|\varepsilon\|\, Q\, T^{1/2} e_1`. Negative eigenvalues of T
    count as 0.

    Reference: Golub & Van Loan, Matrix Computations, 4th edition, section 10.2.
    """
    dtype = tree.accumulation_dtype(like)
    size = tree.size(like) ** 0.5
    vector = tree.unflatten(
        _signs(key, tree.size(like), dtype) / size, tree.zeros_like(like, dtype)
    )

    def turn(now, _):
        before, vector, beta = now
        product = tree.cast(hessian(tree.cast_like(vector, like)), dtype)
        alpha = tree.inner(vector, product)
        rest = tree.add_scaled(tree.add_scaled(product, -alpha, vector), -beta, before)
        squared = tree.inner(rest, rest)
        # H is a multiple of the identity for squared losses: nothing but rounding is left.
        ended = squared <= (100 * jnp.finfo(dtype).eps) ** 2 * (alpha**2 + beta**2 + squared)
        beta = jnp.where(ended, 0, jnp.sqrt(squared))
        following = tree.scale(jnp.where(ended, 0, 1 / jnp.where(ended, 1, beta)), rest)
        return (vector, following, beta), (vector, alpha, beta)

    # Unrolled, this would be a fifth of what a training step takes to compile.
    first = (tree.zeros_like(vector), vector, jnp.zeros([], dtype))
    _, (basis, alphas, betas) = jax.lax.scan(turn, first, length=steps)
    off = jnp.diag(betas[:-1], 1)
    eigenvalues, vectors = jnp.linalg.eigh(jnp.diag(alphas) + off + off.T)
    weights = size * vectors @ (jnp.sqrt(jnp.maximum(eigenvalues, 0)) * vectors[0])
    return jax.tree.map(lambda columns: jnp.tensordot(weights, columns, 1), basis)


def _signs(key: jax.Array, count: int, dtype) -> jax.Array:
    """Independent signs, 32 from each random word: a normal from each took half the time of a gradient."""
    words = jax.random.bits(key, [-(-count // 32), 1], jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return jnp.where(bits.ravel()[:count] == 1, 1, -1).astype(dtype)


def _second_moment(rows: jax.Array, like: jax.Array) -> jax.Array:
    """XᵀX, or its diagonal where `like` is a vector."""
    return rows.T @ rows if like.ndim == 2 else jnp.sum(rows**2, axis=0)


class _Block(NamedTuple):
    """A matrix-shaped leaf, and the bias that is one more row (side 0) or column (side 1) of it."""

    weight: int
    bias: int | None
    side: int


def _inverse(
    layers: Sequence[Layer], factors: Sequence[_Factors], damping: jax.Array, params: Params
) -> Callable[[Params], Params]:
    leaves, structure = jax.tree.flatten(params)
    layer_of = {layer.weight: layer for layer in layers}
    biases = {layer.bias for layer in layers}
    blocks, solves = [], []
    for index in (
        index for index, leaf in enumerate(leaves) if leaf.ndim >= 2 and index not in biases
    ):
        layer = layer_of.get(index)
        block = _Block(index, layer and layer.bias, int(layer.transposed) if layer else 0)
        lengths = list(matrix_shape(leaves[index].shape))
        if block.bias is not None:
            lengths[block.side] += 1
        moments = [_leading(moment, n) for moment, n in zip(factors[index], lengths, strict=True)]
        blocks.append(block)
        solves.append(_damped_solves(moments, damping))

    def apply(vector: Params) -> Params:
        flat = [leaf.astype(damping.dtype) for leaf in jax.tree.leaves(vector)]
        out = list(flat)
        for block, (solve_rows, solve_columns) in zip(blocks, solves, strict=True):
            matrix = flat[block.weight].reshape(matrix_shape(flat[block.weight].shape))
            if block.bias is not None:
                bias = jnp.expand_dims(flat[block.bias].ravel(), block.side)
                matrix = jnp.concatenate([matrix, bias], axis=block.side)
            matrix = solve_columns(solve_rows(matrix).T).T
            if block.bias is not None:
                matrix, bias = jnp.split(matrix, [matrix.shape[block.side] - 1], axis=block.side)
                out[block.bias] = bias.reshape(flat[block.bias].shape)
            out[block.weight] = matrix.reshape(flat[block.weight].shape)
        for index, leaf in enumerate(flat):
            if leaf.ndim < 2 and index not in biases:
                diagonal = factors[index].rows.reshape(leaf.shape) + damping
                out[index] = leaf / jnp.where(diagonal > 0, diagonal, 1)
        return tree.cast_like(jax.tree.unflatten(structure, out), params)

    return apply


def _leading(moments: jax.Array, length: int) -> jax.Array:
    return moments[:length, :length] if moments.ndim == 2 else moments[:length]


def _damped_solves(
    moments: Sequence[jax.Array], damping: jax.Array
) -> list[Callable[[jax.Array], jax.Array]]:
    """``[V ↦ (A + π√λ I)⁻¹V, V ↦ (S + √λ/π I)⁻¹V]``."""
    means = [jnp.mean(jnp.diagonal(each) if each.ndim == 2 else each) for each in moments]
    known = (means[0] > 0) & (means[1] > 0)
    ratio = jnp.sqrt(jnp.where(known, means[0] / jnp.where(known, means[1], 1), 1))
    shares = [ratio * jnp.sqrt(damping), jnp.sqrt(damping) / ratio]
    return [_solve_with(*each) for each in zip(moments, shares, means, strict=True)]


def _solve_with(
    moments: jax.Array, share: jax.Array, mean: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    # Cholesky's factorisation of a matrix that is singular to working precision would fail.
    floor = 10 * len(moments) * float(jnp.finfo(moments.dtype).eps) * mean
    share = jnp.maximum(share, jnp.where(mean > 0, floor, 1))
    if moments.ndim == 1:
        return lambda matrix: matrix / (moments + share)[:, None]
    factor = jax.scipy.linalg.cho_factor(
        moments + share * jnp.eye(len(moments), dtype=moments.dtype)
    )
    return lambda matrix: jax.scipy.linalg.cho_solve(factor, matrix)


def _stats(finite) -> dict[str, jax.Array]:
    return {"kronecker/finite": jnp.asarray(finite, bool)}
