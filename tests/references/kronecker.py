"""Kronecker factors of the Gauss-Newton matrix, from their definition.

The network is written layer by layer. A layer y = xW + b that is applied R times has the factors

    A = 1/R Σ x̄ᵀx̄,   S = Σ sᵀs,   x̄ = (x, 1),   s = (∂z/∂y)ᵀ H^½ ε,   εᵢ = ±1,

and a matrix of more than one layer has the sums of A and of S, each divided by its trace, with the
weights w = tr A tr S, over the root of the sum of the weights. A vector with the gradients v of its
R applications has the diagonal Σ v². A leaf in no layer has, with V = Jᵀ H^½ ε,

    A = VVᵀ/‖V‖,   S = VᵀV/‖V‖   (a matrix),      V²   (a vector).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from references.dense import Point


class Layer(NamedTuple):
    """Inputs and cotangents of one layer, computed by hand."""

    weight: str
    bias: str | None
    inputs: np.ndarray  # x, (R, fan-in)
    cotangents: np.ndarray  # s, (R, fan-out)
    transposed: bool = False  # whether the weight is stored as Wᵀ


class Vector(NamedTuple):
    """A gain, or a bias that is in no layer."""

    leaf: str
    gradients: np.ndarray  # (R, n)


Leaves = dict[str, np.ndarray]
# (all parameters, batch, flat cotangent of the outputs) ↦ layers and vectors.
Layers = Callable[[Leaves, Any, np.ndarray], list[Layer | Vector]]


class Kronecker:
    """The running averages of the factors, and their damped inverse.

    Args:
        layers: the network's layers, by hand.
        decay, fraction, seed: as of `gnlin.Kronecker`.
        root: how H^½ ε is computed.
    """

    def __init__(self, layers: Layers, *, decay=0.95, fraction=0.25, seed=0, root: Callable):
        self.layers, self.root = layers, root
        self.decay, self.fraction, self.seed = decay, fraction, seed
        self.count = 0
        self.factors: dict[str, tuple] = {}  # (A, S) of a matrix, (V²,) of a vector

    def direction(
        self, params: Leaves, batch: Any, point: Point, damping: float, rhs: Leaves
    ) -> Leaves:
        """M⁻¹b, b having the leaves that are trained."""
        noise = self.root(point.loss.hessian, signs(self.seed, self.count, len(point.outputs)))
        layers, vectors = self._trained(params, batch, noise, rhs)
        pseudo_gradient = split(point.jacobian.T @ noise, rhs)
        # A plain mean over the steps so far, until the last would weigh less than 1 − decay.
        keep = min(1 - 1 / (self.count + 1), self.decay)
        for name, new in self._moments(layers, vectors, pseudo_gradient).items():
            old = self.factors.get(name, new)
            self.factors[name] = tuple(
                keep * before + (1 - keep) * now for before, now in zip(old, new, strict=True)
            )
        self.count += 1
        return self._solve(layers, damping, rhs)

    def _trained(self, params, batch, noise, rhs) -> tuple[list[Layer], list[Vector]]:
        """Layers with a weight that is trained, and vectors.

        A bias that is fixed is no row of its weight, and one with a fixed weight stands alone.
        """
        layers, vectors = [], []
        for part in self.layers(params, batch, noise):
            if isinstance(part, Vector):
                vectors += [part] if part.leaf in rhs else []
            elif part.weight in rhs:
                layers.append(part._replace(bias=part.bias if part.bias in rhs else None))
            elif part.bias in rhs:
                vectors.append(Vector(part.bias, part.cotangents))
        return layers, vectors

    def _moments(self, layers, vectors, pseudo_gradient) -> dict[str, tuple]:
        """Those of this step alone."""
        terms: dict[str, list[tuple]] = {}
        for layer in layers:
            applications = len(layer.inputs)
            chosen = applications_taken(applications, self.fraction, self.count)
            x, s = layer.inputs[chosen], layer.cotangents[chosen]
            if layer.bias is not None:
                x = np.concatenate([x, np.ones([len(x), 1])], axis=1)
            # A is a mean. S is a sum over all R, of which only the chosen ones are seen.
            share = len(chosen) / applications
            term = (x.T @ x / len(chosen), s.T @ s / share)
            terms.setdefault(layer.weight, []).append(term)
        moments = {name: combined(found) for name, found in terms.items()}
        moments.update((each.leaf, (np.sum(each.gradients**2, axis=0),)) for each in vectors)
        in_layers = {name for layer in layers for name in (layer.weight, layer.bias)}
        for name, v in pseudo_gradient.items():
            if name in moments:
                continue
            if name not in in_layers and v.ndim == 1:
                moments[name] = (v**2,)
            elif name not in in_layers:
                size = np.linalg.norm(v)
                moments[name] = (v @ v.T / size, v.T @ v / size)
        return moments

    def _solve(self, layers, damping, rhs) -> Leaves:
        solved = {}
        for layer in layers:
            matrix = rhs[layer.weight].T if layer.transposed else rhs[layer.weight]
            if layer.bias is not None:
                matrix = np.concatenate([matrix, rhs[layer.bias][None]])  # (W; b)
            matrix = damped_solve(*self.factors[layer.weight], damping, matrix)
            if layer.bias is not None:
                matrix, solved[layer.bias] = matrix[:-1], matrix[-1]
            solved[layer.weight] = matrix.T if layer.transposed else matrix
        for name in rhs.keys() - solved.keys():
            factors = self.factors[name]
            if len(factors) == 1:
                solved[name] = rhs[name] / (factors[0] + damping)
            else:
                solved[name] = damped_solve(*factors, damping, rhs[name])
        return solved


def combined(terms: list[tuple]) -> tuple:
    """One product for the sum of several."""
    if len(terms) == 1:
        return terms[0]
    weights = [np.trace(a) * np.trace(s) for a, s in terms]
    pairs = list(zip(weights, terms, strict=True))
    root = np.sqrt(sum(weights))
    return tuple(
        sum(w * term[side] / np.trace(term[side]) for w, term in pairs) / root for side in (0, 1)
    )


def damped_solve(a: np.ndarray, s: np.ndarray, damping: float, matrix: np.ndarray) -> np.ndarray:
    """(A + π√λ I)⁻¹ V (S + √λ/π I)⁻¹, π² = (tr A / dim A) / (tr S / dim S)."""
    pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(s) / len(s)))
    left = np.linalg.inv(a + pi * np.sqrt(damping) * np.eye(len(a)))
    right = np.linalg.inv(s + np.sqrt(damping) / pi * np.eye(len(s)))
    return left @ matrix @ right


def applications_taken(applications: int, fraction: float, count: int) -> np.ndarray:
    """Which of the R applications this step takes moments of: a share, at least 64, going round."""
    taken = min(applications, max(round(fraction * applications), 64))
    return np.array([(count * taken + i) % applications for i in range(taken)])


# The sample H^½ ε.


def signs(seed: int, count: int, size: int) -> np.ndarray:
    """ε: 32 independent signs from each random word, the lowest bit first."""
    key = jax.random.fold_in(jax.random.key(seed), count)
    words = np.asarray(jax.random.bits(key, [-(-size // 32), 1], np.uint32))[:, 0]
    bits = [(int(word) >> place) & 1 for word in words for place in range(32)]
    return np.array([1.0 if bit else -1.0 for bit in bits[:size]])


def exact_root(hessian: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """H^½ ε, by the eigenvectors of H."""
    eigenvalues, vectors = np.linalg.eigh(hessian)
    return vectors @ (np.sqrt(np.maximum(eigenvalues, 0)) * (vectors.T @ noise))


def krylov_root(hessian: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """H^½ ε with H restricted to the span of ε, Hε, H²ε and H³ε.

    It is exact where H has at most four eigenvalues there.
    """
    basis = [noise / np.linalg.norm(noise)]
    for _ in range(3):
        following = hessian @ basis[-1]
        for vector in basis + basis:  # orthogonal to rounding after the second time
            following = following - (vector @ following) * vector
        size = np.linalg.norm(following)
        if size <= 1e-12 * np.linalg.norm(hessian):
            break  # H does not lead out of the span
        basis.append(following / size)
    q = np.stack(basis, axis=1)
    return q @ exact_root(q.T @ hessian @ q, q.T @ noise)


# Flat vectors and leaves.


def split(vector: np.ndarray, like: Leaves) -> Leaves:
    """A flat vector as leaves; JAX puts them in the order of their names."""
    leaves, start = {}, 0
    for name in sorted(like):
        size = like[name].size
        leaves[name] = vector[start : start + size].reshape(like[name].shape)
        start += size
    return leaves


def join(leaves: Leaves) -> np.ndarray:
    return np.concatenate([np.ravel(leaves[name]) for name in sorted(leaves)])
