"""Inverses of large factors from their leading eigenvectors, by NumPy's eigenvalues."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import gnlin
from gnlin.solve import low_rank


def dense(matrices):
    """diag(d) − Q C Qᵀ written out."""
    d, q, c = map(np.asarray, matrices)
    return np.stack([np.diag(d[i]) - q[i] @ c[i] @ q[i].T for i in range(len(d))])


def with_eigenvalues(*spectra, seed):
    """Symmetric matrices of these eigenvalues, and their eigenvectors."""
    roots = [np.linalg.qr(oracles.normal(len(s), len(s), seed=seed + i))[0] for i, s in
             enumerate(spectra)]  # fmt: skip
    return np.stack([u * s @ u.T for u, s in zip(roots, spectra, strict=True)]), np.stack(roots)


def test_a_matrix_of_that_rank_has_its_inverse(x64):
    spectra = [np.r_[[30.0, 4.0, 0.2], np.zeros(17)], np.r_[[1e5, 1.0], np.zeros(18)]]
    matrices, _ = with_eigenvalues(*spectra, seed=0)
    shift = np.array([0.1, 3.0])
    found = low_rank.inverse_of_shifted(jnp.asarray(matrices), jnp.asarray(shift), 4)
    expected = np.linalg.inv(matrices + shift[:, None, None] * np.eye(20))
    np.testing.assert_allclose(dense(found), expected, rtol=1e-8, atol=1e-10)


def test_other_eigenvalues_count_as_their_mean(x64):
    """With a gap behind the leading ones the basis is known to many digits."""
    rest = np.linspace(0.0, 0.02, 36)
    (matrix,), (root,) = with_eigenvalues(np.r_[[2e4, 500.0, 400.0, 300.0], rest], seed=3)
    found = low_rank.inverse_of_shifted(jnp.asarray(matrix)[None], jnp.asarray([0.5]), 4)
    around = np.r_[[2e4, 500.0, 400.0, 300.0], np.full(36, rest.mean())]
    expected = root / (around + 0.5) @ root.T
    np.testing.assert_allclose(dense(found)[0], expected, atol=1e-6)


def test_no_direction_is_lost_in_single_precision():
    """A(A + sI)⁻¹ is within [0, 1] although the largest eigenvalue is 10⁵ shifts."""
    spectrum = np.r_[np.geomspace(1e5, 1e-3, 60), np.zeros(240)]
    (matrix,), (root,) = with_eigenvalues(spectrum, seed=5)
    found = low_rank.inverse_of_shifted(
        jnp.asarray(matrix, jnp.float32)[None], jnp.ones([1], jnp.float32), 48
    )
    found = dense(jax.tree.map(lambda leaf: np.asarray(leaf, float), found))[0]
    np.testing.assert_allclose(found, root / (spectrum + 1) @ root.T, atol=0.02)
    assert np.linalg.eigvalsh((found + found.T) / 2)[0] > -1e-3


@pytest.mark.parametrize("stack", [(), (2,)], ids=["alone", "stacked"])
@pytest.mark.parametrize("transposed", [False, True], ids=["xW", "xWᵀ"])
def test_directions_are_those_of_the_whole_inverse(x64, transposed, stack):
    """Four examples leave no factor with more than four eigenvalues. Some sides are large, some are
    not, and one layer has a bias.
    """
    x, table = oracles.normal(4, 3, seed=0), oracles.normal(40, 3, seed=9)
    params = {
        "first": oracles.normal(3, 36, seed=1),
        "bias": oracles.normal(36, seed=2),
        "last": oracles.normal(36, 4, seed=4),
        "table": table,
        "blocks": {
            "next": oracles.normal(*stack, 36, 36, seed=3) / 6,
            "shift": oracles.normal(*stack, 36, seed=5),
        },
    }

    def turned(params):
        def of_leaf(path, leaf):
            name = path[-1].key
            return leaf if name in ("bias", "shift") else jnp.swapaxes(leaf, -2, -1)

        return jax.tree_util.tree_map_with_path(of_leaf, params) if transposed else params

    def model(p, tokens):
        p = turned(p)
        inputs = jnp.asarray(x) + p["table"][tokens]
        h = jnp.tanh(inputs @ p["first"] + p["bias"][None])
        if stack:
            h, _ = jax.lax.scan(lambda h, block: (of_block(block, h), None), h, p["blocks"])
        else:
            h = of_block(p["blocks"], h)
        return h @ p["last"]

    def of_block(block, h):
        return jnp.tanh(h @ block["next"] + block["shift"][None])

    objective = gnlin.Objective(model, lambda z, _: jnp.sum(jnp.square(z - 0.3)) / 2)
    params, tokens = turned(jax.tree.map(jnp.asarray, params)), jnp.arange(4) * 3
    vector = jax.tree.map(lambda leaf: jnp.sin(3 * leaf), params)

    def direction(rank, refresh):
        solver = gnlin.Kronecker(fraction=1.0, rank=rank, refresh=refresh)

        @jax.jit
        def solve(params):
            system = gnlin.quadratic_model(objective, params, tokens).system(0.3)
            solution, state = solver.solve(system, vector, solver.init(params)[0])
            return solution.direction, solution.stats, state

        found, stats, state = solve(params)
        assert bool(stats["kronecker/finite"])
        return found, state

    whole, kept_whole = direction(None, 5)
    for refresh in (1, 5):
        found, state = direction(4, refresh)
        chex.assert_trees_all_close(found, whole, rtol=1e-6, atol=1e-9)
    # A large side has 4 columns and a diagonal instead of a matrix.
    assert state.kept.inverse.size < kept_whole.kept.inverse.size / 2


def test_a_side_up_to_eight_times_the_rank_is_inverted_whole(x64):
    params = {"w": jnp.asarray(oracles.normal(32, 33, seed=0))}
    state, _ = gnlin.Kronecker(rank=4, refresh=5).init(params)
    # A moment has a spare row and column.
    assert state.kept.inverse.size == 33**2 + 34 * (1 + 4) + 4**2


def test_small_products_are_exact_on_accelerators():
    """In TF32, their default, the leading directions would be lost. A CPU cannot tell."""
    matrices = jnp.eye(20)[None]

    def product(matrices):
        inverse = low_rank.inverse_of_shifted(matrices, jnp.ones([1]), 2)
        (found,) = low_rank.times(inverse, [matrices])
        return low_rank.times_from_right([found], inverse)

    jaxpr = jax.make_jaxpr(product)(matrices).jaxpr
    small = [
        equation.params["precision"]
        for equation in jaxpr.eqns
        if equation.primitive.name == "dot_general" and equation.params["precision"]
    ]
    assert len(small) == 2 + 3 + 3


@pytest.mark.parametrize("rank", [0, 1.5, True])
def test_bad_rank(rank):
    with pytest.raises(ValueError, match="`rank` must be an integer of at least 1; got"):
        gnlin.Kronecker(rank=rank)
