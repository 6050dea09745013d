"""The meter against the same work written out, so that XLA counts all of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import pallas

import gnlin
from gnlin.compare.entrants.optimisers import damped_gauss_newton, iterative_linearisation
from gnlin.compare.runs.cost import flops, gradient_flops
from gnlin.compare.runs.meter import metered
from gnlin.compare.tasks.handwriting import digits

SIZE = 64
PRODUCT = 2 * SIZE**3


def product(c, a):
    return jnp.tanh(c @ a)


def loop(a, times):
    return jax.lax.while_loop(
        lambda s: s[0] < times, lambda s: (s[0] + 1, product(s[1], a)), (0, a)
    )[1]


with_derivatives_of_its_own = jax.custom_vjp(loop)
with_derivatives_of_its_own.defvjp(
    lambda a, times: (loop(a, times), None), lambda residuals, g: (g, None)
)


def counted(function, a, times):
    """The meter's count of a call, in products; the call computes the same as without a meter."""
    meter = metered(function, a, times)
    assert meter.varies
    value, more = jax.jit(meter.call)(a, times)
    np.testing.assert_allclose(value, function(a, times), rtol=1e-5)
    return (meter.flops + float(more)) / PRODUCT


@pytest.fixture
def matrix():
    return jax.random.normal(jax.random.key(0), (SIZE, SIZE)) / 8


@pytest.mark.parametrize("times", [0, 1, 5])
def test_a_loop_is_counted_as_it_turned(matrix, times):
    assert counted(loop, matrix, times) == pytest.approx(times, abs=0.03 * times + 0.01)


def test_the_condition_of_a_loop_is_work_too(matrix):
    def function(a, times):
        goes_on = lambda s: 0 * product(s[1], a).sum() + s[0] < times  # noqa: E731
        return jax.lax.while_loop(goes_on, lambda s: (s[0] + 1, s[1] / 2), (0, a))[1]

    assert counted(function, matrix, 5) == pytest.approx(5 + 1, rel=0.15)


def test_an_inverse_is_one_factorisation_and_two_solves(matrix):
    found = flops(jnp.linalg.inv, matrix) / SIZE**3
    assert found == pytest.approx(2 / 3 + 2, rel=0.05)


@pytest.mark.parametrize(
    "nested",
    [
        lambda a, times: jax.jit(loop)(a, times),
        lambda a, times: jax.checkpoint(loop)(a, times),
        lambda a, times: with_derivatives_of_its_own(a, times),
        lambda a, times: jax.lax.scan(lambda c, _: (loop(c, times), None), a, None, length=1)[0],
        lambda a, times: jax.vmap(lambda scale: loop(a * scale, times))(jnp.ones(1))[0],
        lambda a, times: jax.lax.cond(times > 0, loop, lambda a, times: a, a, times),
        lambda a, times: jax.lax.cond(
            times > 0, lambda: loop(a, times), lambda: loop(loop(loop(a, 7), 7), 7)
        ),
    ],
    ids=["jit", "checkpoint", "custom_vjp", "scan", "vmap", "cond", "dearer-branch"],
)
def test_a_loop_within_something_else(matrix, nested):
    assert counted(nested, matrix, 5) == pytest.approx(5, rel=0.03)


def test_a_loop_within_loops(matrix):
    def function(a, times):
        once = lambda i, c: loop(c, times + i)  # noqa: E731
        twice = jax.lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, once(s[0], s[1])), (0, a)
        )[1]
        return jax.lax.fori_loop(0, 3, once, twice)

    assert counted(function, matrix, 4) == pytest.approx((4 + 5) + (4 + 5 + 6), rel=0.03)


def test_a_branch_is_counted_as_it_was_taken(matrix):
    def function(a, times):
        branches = [
            lambda a: a,
            lambda a: product(a, a),
            lambda a: jnp.linalg.cholesky(a @ a.T + jnp.eye(SIZE)),
        ]
        return jax.lax.switch(times, branches, a)

    for times, expected in enumerate([0, 1, 1 + (SIZE**3 / 3) / PRODUCT]):
        assert counted(function, matrix, times) == pytest.approx(expected, abs=0.07)


def test_a_loop_that_nobody_reads_costs_nothing(matrix):
    def function(a, times):
        loop(a, times + 7)
        return loop(a, times)

    assert counted(function, matrix, 2) == pytest.approx(2, rel=0.03)


def test_what_cannot_be_counted_is_said(matrix):
    def kernel(a, out):
        out[...] = jax.lax.fori_loop(0, a[0, 0].astype(int), lambda i, c: c / 2, a[...])

    function = pallas.pallas_call(kernel, out_shape=matrix, interpret=True)
    with pytest.raises(
        NotImplementedError,
        match="work of loops or branches within 'pallas_call' cannot be counted",
    ):
        jax.make_jaxpr(metered(function, matrix).call)(matrix)


def test_without_loops_and_branches_there_is_nothing_to_add(matrix):
    meter = metered(product, matrix, matrix)
    assert not meter.varies
    assert meter.call(matrix, matrix)[1] == 0
    assert meter.flops == flops(product, matrix, matrix)


def test_conjugate_gradients_of_jax(matrix):
    """As many turns as the matrix has different eigenvalues, and a product more for the first
    residual.
    """
    eigenvalues = jnp.asarray([1.0, 2.0, 5.0])[jnp.arange(SIZE) % 3]
    basis = jnp.linalg.qr(matrix)[0]
    system = basis @ jnp.diag(eigenvalues) @ basis.T
    meter = metered(
        lambda right: jax.scipy.sparse.linalg.cg(lambda x: system @ x, right, tol=1e-5)[0],
        matrix[0],
    )
    solved, more = jax.jit(meter.call)(matrix[0])
    np.testing.assert_allclose(system @ solved, matrix[0], atol=1e-4)
    assert (meter.flops + float(more)) / (2 * SIZE**2) == pytest.approx(3 + 1, rel=0.2)


# Optimisers.


@pytest.fixture(scope="module")
def task():
    return digits()


def step_flops(task, build, options, steps):
    """FLOPs of each of the first steps on one batch."""
    method = build(task, options)
    params, key, batch = (
        task.init(jax.random.key(0)),
        jax.random.key(0),
        jax.tree.map(lambda x: x[:128], task.train),
    )
    state = method.init(params, batch, key)
    meter = metered(method.step, params, state, batch, key)
    call, found = jax.jit(meter.call), []
    for _ in range(steps):
        (params, state), more = call(params, state, batch, key)
        found.append(meter.flops + float(more))
    return np.asarray(found), state


@pytest.fixture
def optax_own():
    """Optax's own optimisers are written for the usual promotion of dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_a_gauss_newton_step_costs_what_an_unrolled_one_does(task):
    options = {
        "damping": 0.1,
        "control": "constant",
        "learning_rate": 1.0,
        "solver": "cg",
        "batch": "mini",
    }
    (found,), state = step_flops(
        task,
        damped_gauss_newton,
        {**options, "decay": 20.0, "max_iterations": 4, "rtol": 0.0, "warm_start": 0.0},
        1,
    )
    assert gnlin.metrics(state)["cg/iterations"] == 4

    def step(params, batch):
        _, grads = task.objective.value_and_grad(params, batch)
        image_of = gnlin.ggn_vector_product(task.objective, params, batch)
        x = jax.tree.map(jnp.zeros_like, params)
        residual = direction = grads
        for _ in range(4):
            image = jax.tree.map(lambda g, d: g + 0.1 * d, image_of(direction), direction)
            rr = optax.tree.vdot(residual, residual)
            length = rr / optax.tree.vdot(direction, image)
            x = jax.tree.map(lambda a, d, length=length: a + length * d, x, direction)
            residual = jax.tree.map(lambda r, i, length=length: r - length * i, residual, image)
            ratio = optax.tree.vdot(residual, residual) / rr
            direction = jax.tree.map(lambda r, d, ratio=ratio: r + ratio * d, residual, direction)
        return jax.tree.map(jnp.subtract, params, x)

    batch = jax.tree.map(lambda leaf: leaf[:128], task.train)
    assert found == pytest.approx(flops(step, task.init(jax.random.key(0)), batch), rel=0.03)


@pytest.mark.usefixtures("optax_own")
def test_what_happens_once_in_a_cycle_is_counted_once(task):
    """The step that moves the anchor leaves out a push-forward; the last step of a cycle tries four
    steps.
    """
    unit = gradient_flops(task)
    options = {
        "period": 4,
        "inner": "sgd",
        "momentum": 0.0,
        "learning_rate": 0.1,
        "loss_model": "exact",
    }
    plain, _ = step_flops(
        task, iterative_linearisation, {**options, "reset": False, "line_search": False}, 8
    )
    np.testing.assert_allclose(plain / unit, [1.0, 1.6, 1.6, 1.6] * 2, atol=0.05)
    searched, _ = step_flops(
        task, iterative_linearisation, {**options, "reset": False, "line_search": True}, 8
    )
    forward = flops(
        task.objective.value,
        task.init(jax.random.key(0)),
        jax.tree.map(lambda x: x[:128], task.train),
    )
    np.testing.assert_allclose((searched - plain) / forward, [0, 0, 0, 4] * 2, atol=0.1)


def test_a_gradient_that_is_given_is_not_made_again():
    """A loop over layers: XLA does not merge the passes through it that are equal."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "blocks": {
            "w": jax.random.normal(keys[0], (4, 16, 16)) / 4,
            "b": jnp.zeros((4, 16)),
        }
    }
    x = jax.random.normal(keys[1], (512, 16))
    batches = [{"x": x, "y": jnp.sin(scale * x)} for scale in (1.0, 2.0)]

    def model(params, batch):
        def block(hidden, layer):
            return jnp.tanh(jnp.dot(hidden, layer["w"]) + layer["b"][None]), None

        return jax.lax.scan(block, batch["x"], params["blocks"])[0]

    objective = gnlin.Objective(
        model, lambda outputs, batch: 0.5 * jnp.mean(jnp.square(outputs - batch["y"]))
    )
    tx = gnlin.gauss_newton(objective)
    gradient = metered(lambda p, b: objective.value_and_grad(p, b)[1], params, batches[0])

    def least_of_six(is_given):
        def step(grads, state, params, batch):
            given: Any = grads if is_given else None
            return tx.update(given, state, params, batch=batch)

        start, state, place = params, tx.init(params), params
        meter = metered(step, start, state, place, batches[0])
        call, found = jax.jit(meter.call), []
        for count in range(6):
            batch = batches[count % 2]
            grads = jax.jit(gradient.call)(place, batch)[0]
            (updates, state), more = call(grads, state, place, batch)
            place = optax.apply_updates(place, updates)
            found.append(meter.flops + float(more))
        return min(found)

    # The least is a step without factors or trial. Without the gradient it lacks a pull-back, two
    # of the three products of a gradient.
    assert least_of_six(False) - least_of_six(True) > 0.6 * gradient.flops
