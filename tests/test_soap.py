"""SOAP against a transcription of the paper's algorithms 3 and 4 in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import third_party

from gnlin.compare.entrants.eigenbasis import scale_by_soap, soap

B1, B2, EPS, EVERY = 0.9, 0.8, 1e-8, 3


def transcribed(gradients, left_basis, right_basis):
    """The directions N of one matrix, from the eigenvectors after the first gradient.

    Algorithm 3 with Adam's bias correction. The first gradient does not move the matrix.
    """
    m, n = gradients[0].shape
    first, mean, square = gradients[0], np.zeros((m, n)), np.zeros((m, n))
    left, right = (1 - B2) * first @ first.T, (1 - B2) * first.T @ first
    directions = [np.zeros((m, n))]
    for t, gradient in enumerate(gradients[1:], start=1):
        inside = left_basis.T @ gradient @ right_basis
        mean = B1 * mean + (1 - B1) * gradient
        square = B2 * square + (1 - B2) * inside**2
        adam = (left_basis.T @ mean @ right_basis) / (1 - B1**t)
        adam = adam / (np.sqrt(square / (1 - B2**t)) + EPS / np.sqrt(1 - B2**t))
        directions.append(left_basis @ adam @ right_basis.T)
        left = B2 * left + (1 - B2) * gradient @ gradient.T
        right = B2 * right + (1 - B2) * gradient.T @ gradient
        if t % EVERY == 0:
            left_basis, rows = eigenvectors(left, left_basis)
            right_basis, columns = eigenvectors(right, right_basis)
            square = square[rows][:, columns]
    return directions


def eigenvectors(factor, basis):
    """Algorithm 4, with the columns in descending order of their eigenvalues."""
    values = [column @ factor @ column for column in basis.T]
    order = sorted(range(len(values)), key=lambda index: -values[index])
    return np.linalg.qr(factor @ basis[:, order])[0], order


def run(tx, gradients, params):
    """Updates and states for a list of gradients."""
    tx = third_party(tx)
    state = tx.init(params)
    step = jax.jit(tx.update)
    updates, states = [], []
    for gradient in gradients:
        update, state = step(gradient, state, params)
        updates.append(update)
        states.append(state)
    return updates, states


def draw(*shape, count=10):
    generator = np.random.default_rng(0)
    # Directions of different sizes, so that no two eigenvalues are close.
    return [generator.normal(size=shape) * np.geomspace(1, 8, shape[-1]) for _ in range(count)]


@pytest.mark.parametrize("shape", [(4, 4), (6, 4), (3, 5)])
def test_a_matrix_moves_as_in_the_paper(shape, x64):
    gradients = draw(*shape)
    updates, states = run(scale_by_soap(B1, B2, EPS, EVERY), gradients, jnp.zeros(shape))
    (begun,) = states[0].factors
    # The basis of a null space is arbitrary, so the transcription takes over the first one.
    for factor, basis in ((begun.left, begun.left_basis), (begun.right, begun.right_basis)):
        turned = basis.T @ factor @ basis
        np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-12)
        np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-11)
        assert (np.diff(np.diag(turned)) < 1e-11).all()
    expected = transcribed(gradients, np.array(begun.left_basis), np.array(begun.right_basis))
    for number, (ours, theirs) in enumerate(zip(updates, expected, strict=True)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9, err_msg=str(number))


def test_a_stack_is_its_matrices_and_a_kernel_is_one(x64):
    """Full-rank squares, whose eigenvectors are unique up to signs."""
    gradients = draw(3, 4, 4)
    stacked, _ = run(scale_by_soap(every=2), gradients, jnp.zeros((3, 4, 4)))
    for number in range(3):
        alone = [gradient[number] for gradient in gradients]
        own, _ = run(scale_by_soap(every=2), alone, jnp.zeros((4, 4)))
        for ours, theirs in zip(stacked, own, strict=True):
            np.testing.assert_allclose(ours[number], theirs, rtol=1e-7, atol=1e-9)
    kernel = [gradient[0].reshape(2, 1, 2, 4) for gradient in gradients]
    as_kernel, _ = run(scale_by_soap(every=2), kernel, jnp.zeros((2, 1, 2, 4)))
    for ours, theirs in zip(as_kernel, stacked, strict=True):
        np.testing.assert_allclose(ours.reshape(4, 4), theirs[0], rtol=1e-7, atol=1e-9)


def test_a_vector_has_adam_one_update_late(x64):
    gradients = draw(5)
    ours, _ = run(scale_by_soap(0.9, 0.99), gradients, jnp.zeros(5))
    adam, _ = run(optax.scale_by_adam(0.9, 0.99), gradients[1:], jnp.zeros(5))
    np.testing.assert_array_equal(ours[0], np.zeros(5))
    for mine, theirs in zip(ours[1:], adam, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_the_settings_are_those_of_the_paper(x64):
    """β₁ = β₂ = 0.95, a refresh every ten updates, weight decay 1e-4 times the rate."""
    gradients, params = draw(4, 4, count=24), jnp.asarray(draw(4, 4)[3])
    ours, states = run(soap(0.5), gradients, params)
    plain, _ = run(scale_by_soap(0.95, 0.95, 1e-8, 10), gradients, params)
    for mine, direction in zip(ours, plain, strict=True):
        np.testing.assert_allclose(mine, -0.5 * (direction + 1e-4 * params), rtol=1e-9, atol=1e-12)
    bases = [np.asarray(state[0].factors[0].left_basis) for state in states]
    changes = [
        number
        for number, (old, new) in enumerate(itertools.pairwise(bases), start=1)
        if not np.array_equal(old, new)
    ]
    assert changes == [10, 20]
